"""Every benchmark (or those named), each in a process of its own, and one table of all results.

    python -m benchmarks [NAME ...]         run, then print the table
    python -m benchmarks --table            only print the table of benchmarks/results/*.json, as Markdown
    python -m benchmarks --readme           only put it into README.md, between its two marks
"""
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.units import amount

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->\n"


def table():
    """All results as Markdown: a row a piece of work, under a line for each machine."""
    machines = {}
    for path in sorted((FOLDER / "results").glob("*.json")):
        result = json.loads(path.read_text())
        where = result["machine"]
        machine = (f"{where['processor']}, kernels {where['isa']}, {where['threads']} threads, NumPy {where['numpy']}, "
                   f"torch {where['torch']}")
        machines.setdefault(machine, []).append(result)
    lines = []
    for machine, results in machines.items():
        lines += [f"{machine}:", "", "| work | numformer | peer | times as fast [least-most] | goal |",
                  "|---|---|---|---|---|"]
        for result in results:
            lines += [f"| **{result['title']}** ({result['date']}) | | | | |"]
            lines += [row_of(row) for row in result["rows"]]
        lines += [""]
    return "\n".join(lines)


def row_of(row):
    def rate(entry):
        if row["roof_kind"]:
            return f"{100 * entry['share']['median']:.0f} % of {row['roof_kind']}"
        return amount(entry["rate"]["median"], row["unit"])

    (_, ours), *peers = row["entries"].items()
    theirs = "; ".join(f"{label} {rate(entry)}" for label, entry in peers)
    ratios = "; ".join(spread(entry["ratio"]) for _, entry in peers)
    return f"| {row['name']} | {rate(ours)} | {theirs} | {ratios} | {row['goal'] or ''} |"


def spread(ratio):
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}-{ratio['max']:.2f}]"


def write_readme():
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    every = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    unknown = set(names) - set(every)
    if unknown:
        sys.exit(f"benchmarks: no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if "--readme" in sys.argv:
        return write_readme()
    if "--table" not in sys.argv:
        for name in names or every:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}"], check=True)
    print(table())


if __name__ == "__main__":
    main()
