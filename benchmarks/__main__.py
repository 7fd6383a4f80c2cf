"""Every benchmark (or those named), each in a process of its own, and one table of all results.

    python -m benchmarks [NAME ...]         run, then print the table of benchmarks/results/*/*.json
    python -m benchmarks --help             what else there is
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.units import amount, kind_of

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
LEVELS = ("avx512vnni", "avx512", "avx2", "baseline")
BEGIN, END = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->\n"


def table():
    """All results as Markdown: a line for each machine, then a row a piece of work and a column a kind."""
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*/*.json"))]
    results.sort(key=lambda result: LEVELS.index(result["machine"]["isa"]))
    kinds = list(dict.fromkeys(kind_of(result["machine"]) for result in results))
    machines = dict.fromkeys(machine_of(result["machine"]) for result in results)
    benchmarks = {}
    for result in results:
        kind, heading = kind_of(result["machine"]), f"**{result['title']}**"
        rows = benchmarks.setdefault(result["title"], {heading: {}})
        rows[heading][kind] = result["date"]
        for row in result["rows"]:
            rows.setdefault(row["name"], {"goal": row["goal"] or ""})[kind] = cell_of(row)
    lines = [*machines, "", line("work", "goal", *kinds), "|---|---|" + "---|" * len(kinds)]
    for title in sorted(benchmarks):
        lines += [line(name, *(cells.get(column, "") for column in ("goal", *kinds)))
                  for name, cells in benchmarks[title].items()]
    return "\n".join(lines) + "\n"


def machine_of(where):
    family = f", family {where['family']}" if where["family"] is not None else ""
    return (f"- {kind_of(where)}: {where['processor']}{family}, {where['threads']} threads, NumPy {where['numpy']}, "
            f"torch {where['torch']}")


def cell_of(row):
    """Our share of the machine's limit, or our rate; then how many times as fast as each peer we are."""
    (_, ours), *peers = row["entries"].items()
    if row["roof_kind"]:
        own = f"{100 * ours['share']['median']:.0f} % of {row['roof_kind']}"
    else:
        own = amount(ours["rate"]["median"], row["unit"])
    return "; ".join([own, *(f"{label} {spread(entry['ratio'])}" for label, entry in peers)])


def spread(ratio):
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}-{ratio['max']:.2f}]"


def line(*cells):
    return f"| {' | '.join(cells)} |"


def write_readme():
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])


def main():
    every = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure, and print the table of all results.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(every)}; all if none is named")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--table", action="store_true", help="only print the table, as Markdown")
    instead.add_argument("--readme", action="store_true", help="only put it into README.md, between its two marks")
    wanted = parser.parse_args()
    unknown = set(wanted.names) - set(every)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if wanted.readme:
        return write_readme()
    if not wanted.table:
        for name in wanted.names or every:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}"], check=True)
    print(table())


if __name__ == "__main__":
    main()
