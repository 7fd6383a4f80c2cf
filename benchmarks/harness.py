"""One way to measure everything: numformer, its peers and the machine's own roof, interleaved in one process.

A suite compares functions that do the same work. Every round measures the roof and then each function, so that
what else the machine is doing falls on all of them alike; a round whose roof fell below 90 % of the best is
measured again (as many times as there are rounds). Reported are medians over the rounds: each function's rate as
a share of its round's roof, and our rate over each peer's, with the least and the most.
"""
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks import THREADS
from benchmarks.units import amount, kind_of
from numformer import _core

try:
    import torch
    torch.set_num_threads(THREADS)
except ImportError:
    torch = None

_core.set_num_threads(THREADS)

_UNITS = {"fma": "FLOP", "dot": "OP", "read": "B", "copy": "B"}
_LEAST_SECONDS = 0.02           # what is quicker is repeated until it takes this long
_BUFFER = 64 << 20              # float32 elements: 256 MB, beyond every cache

_rng = np.random.default_rng(0)
_memory = {}


def normal(*shape, dtype=np.float32):
    """Standard normal numbers."""
    return _rng.standard_normal(shape, np.float32).astype(dtype, copy=False)


def _buffer(name):
    if name not in _memory:
        _memory[name] = np.ones(_BUFFER, np.float32)
    return _memory[name]


# Of reads that the processor foresees alone, and that it is asked for 1 KB ahead, the quicker is the limit.
_ROOFS = {
    "fma": [lambda: _core.roof_fma(1 << 22)],
    "dot": [lambda: _core.roof_dot(1 << 22)],
    "read": [lambda: _core.roof_read(_buffer("from"), 0), lambda: _core.roof_read(_buffer("from"), 1024)],
    "copy": [lambda: _core.roof_copy(_buffer("from"), _buffer("to"))],
}


def measure_roof(kind):
    """The machine's limit now, in operations or bytes a second."""
    if kind in ("read", "copy"):
        _buffer("from"), _buffer("to")
    best = 0.0
    for work_of in _ROOFS[kind]:
        begin = time.perf_counter()
        work = work_of()
        best = max(best, work / (time.perf_counter() - begin))
    return best


def seconds(function, repeats=1):
    """Seconds a call takes."""
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats


def machine():
    """What the figures were measured on."""
    facts = {}
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {name.strip(): fact.strip() for name, _, fact in (line.partition(":") for line in lines)}
    model, family = facts.get("model name", platform.processor() or platform.machine()), facts.get("cpu family")
    return {"processor": model, "family": family and int(family), "cores": os.cpu_count(), "isa": _core.get_isa(),
            "threads": THREADS, "python": platform.python_version(), "numpy": np.__version__,
            "torch": torch.__version__ if torch else None}


def _spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Suite:
    """A table of comparisons: a row is a piece of work, its first function is ours."""

    def __init__(self, title):
        self.title = title
        self.rows = []

    def compare(self, name, work, roof="fma", *, unit=None, goal=None, rounds=9, **functions):
        """Measure `functions` (name=function, ours first; None is left out) at `work` operations or bytes a call.

        `roof` is "fma", "dot", "read" or "copy"; or None, and `unit` then says what `work` counts ("elements",
        "calls" ...). `goal` is text for the table. Returns the row.
        """
        if (roof is None) == (unit is None):
            raise ValueError(f"compare: give a roof or a unit, got {roof!r} and {unit!r}")
        functions = {label: f for label, f in functions.items() if f is not None}
        rates, tops = self._rounds(functions, work, roof, rounds)
        ours = next(iter(functions))
        row = {"name": name, "work": work, "roof_kind": roof, "goal": goal, "roof": statistics.median(tops),
               "unit": unit or _UNITS[roof], "entries": {}}
        for label, values in rates.items():
            shares = [v / t for v, t in zip(values, tops, strict=True)]
            ratios = [a / b for a, b in zip(rates[ours], values, strict=True)]
            row["entries"][label] = {"rate": _spread(values), "share": _spread(shares), "ratio": _spread(ratios)}
        self.rows.append(row)
        print(self._line(row), flush=True)
        return row

    @staticmethod
    def _rounds(functions, work, roof, rounds):
        repeats = {}
        for label, f in functions.items():
            f()
            repeats[label] = max(1, math.ceil(_LEAST_SECONDS / max(seconds(f), 1e-9)))
        rates = {label: [] for label in functions}
        tops, spare, best = [], rounds, 0.0
        while len(tops) < rounds:
            top = measure_roof(roof) if roof else 1.0
            best = max(best, top)
            if top < 0.9 * best and spare:
                spare -= 1
                continue
            tops.append(top)
            for label, f in functions.items():
                time.sleep(0.005)           # a peer's threads go to sleep
                rates[label].append(work / seconds(f, repeats[label]))
        return rates, tops

    @staticmethod
    def _line(row):
        parts = []
        for i, (label, entry) in enumerate(row["entries"].items()):
            if row["roof_kind"]:
                text = f"{label} {100 * entry['share']['median']:.0f} %"
                text += f" of {amount(row['roof'], row['unit'])}" if i == 0 else ""
            else:
                text = f"{label} {amount(entry['rate']['median'], row['unit'])}"
            if i:
                ratio = entry["ratio"]
                text += f", {ratio['median']:.2f}x [{ratio['min']:.2f}-{ratio['max']:.2f}]"
            parts.append(text)
        goal = f"   goal {row['goal']}" if row["goal"] else ""
        return f"{row['name']:<44} {' | '.join(parts)}{goal}"

    def finish(self):
        """Write benchmarks/results/<kind of machine>/<title>.json with the machine described."""
        where = machine()
        path = Path(__file__).parent / "results" / kind_of(where) / f"{self.title}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": self.title, "date": time.strftime("%Y-%m-%d"), "machine": where,
                                    "rows": self.rows}, indent=1) + "\n")
        print(f"written: benchmarks/results/{path.parent.name}/{path.name}")
