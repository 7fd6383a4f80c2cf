"""How long `import numformer` takes, beside NumPy's import, which it includes, and torch's; and what is on disk."""
import os
import subprocess
import sys
from pathlib import Path

import numformer
from benchmarks.harness import Suite, torch


def importing(module):
    """A function that imports the module in a fresh interpreter, compiled before as an installed package is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment)


def megabytes(folder):
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6


def main():
    suite = Suite("import")
    row = suite.compare("import in a fresh interpreter", 1, None, unit="imports", goal="60 ms above NumPy's", rounds=9,
                        numformer=importing("numformer"), numpy=importing("numpy"),
                        torch=importing("torch") if torch else None)
    times = {label: 1e3 / entry["rate"]["median"] for label, entry in row["entries"].items()}
    print("; ".join(f"{label} {ms:.0f} ms" for label, ms in times.items()),
          f"; above NumPy: {times['numformer'] - times['numpy']:.0f} ms")
    print(f"on disk: numformer {megabytes(Path(numformer.__file__).parent):.1f} MB"
          + (f", torch {megabytes(Path(torch.__file__).parent):.0f} MB" if torch else ""))
    suite.finish()


if __name__ == "__main__":
    main()
