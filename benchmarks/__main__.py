"""Every benchmark (or those named), each in a process of its own, and one table of all results.

    python -m benchmarks [NAME ...]         run, then print the table
    python -m benchmarks --table            only print the table of benchmarks/results/*.json, as Markdown
"""
import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def table():
    """All results, a row a piece of work."""
    for path in sorted((FOLDER / "results").glob("*.json")):
        result = json.loads(path.read_text())
        where = result["machine"]
        print(f"\n**{result['title']}** ({where['processor']}, {where['threads']} threads, {where['isa']}, "
              f"{result['date']})\n")
        print("| work | numformer | peers: share, and how many times faster numformer is [least-most] | goal |")
        print("|---|---|---|---|")
        for row in result["rows"]:
            print(f"| {row['name']} | {cells(row)} | {row['goal'] or ''} |")


def cells(row):
    def rate(entry):
        if row["roof_kind"]:
            return f"{100 * entry['share']['median']:.0f} % of {row['roof_kind']}"
        return f"{entry['rate']['median'] / 1e9:.3g} {row['unit']}"

    (_, ours), *peers = row["entries"].items()
    theirs = "; ".join(f"{label} {rate(entry)}, {entry['ratio']['median']:.2f}x "
                       f"[{entry['ratio']['min']:.2f}-{entry['ratio']['max']:.2f}]" for label, entry in peers)
    return f"{rate(ours)} | {theirs}"


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    every = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    unknown = set(names) - set(every)
    if unknown:
        sys.exit(f"benchmarks: no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    if "--table" not in sys.argv:
        for name in names or every:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}"], check=True)
    table()


if __name__ == "__main__":
    main()
