"""The out folder of a run: what is done, and how to go on after a kill.

    run.json        what was asked for; written first
    metrics.jsonl   every result, a line each: {"stage", "step", ...}, and {"stage", "done": true, ...} after each stage
    timings.jsonl   every duration and speed, in the same way: kept apart, so that results can be compared bit for bit
    data/           tokens, tokenizer, examples
    models/         the models
    state/          checkpoints of the stage under way; gone at the end
    report.html

A stage counts as done once its line is in metrics.jsonl, and its files were written before. After a kill the lines of
the stage under way that lie beyond its checkpoint are cut off, and the stage goes on from there.
"""
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from numformer.demo.errors import DemoError
from numformer.files import replace_file

__all__ = ["Run"]


class Run:
    """An out folder that is open for writing.

    Parameters
    ----------
    folder : Path
    plan : Plan
    seed : int
    data : str or None
        The folder of the text; None is the standard library.

    Attributes
    ----------
    results : dict
        Stage -> what it found, of the stages that are done.
    log : dict
        Stage -> list of its lines with a step.
    """

    def __init__(self, folder, plan, seed, data):
        self.folder, self.plan, self.seed, self.data = Path(folder), plan, seed, data
        self.results, self.log = {}, {}
        self.speeds, self.times = {}, {}        # the same of timings.jsonl
        self.stage = None

    # Opening

    @classmethod
    def begin(cls, folder, plan, seed, data):
        """A new run in `folder`, which must be missing or empty."""
        folder = Path(folder)
        if folder.exists():
            if not folder.is_dir():
                raise DemoError(f"--out {folder} is not a folder")
            if (folder / "run.json").exists():
                old = cls.read_order(folder)
                raise DemoError(f"--out {folder} holds a run already (--minutes {old['minutes']} --seed "
                                f"{old['seed']}): go on with it by --resume, or give another folder")
            # a kill while run.json was written leaves its .part
            if any(not path.match(".run.json.*.part") for path in folder.iterdir()):
                raise DemoError(f"--out {folder} is not empty and holds no run of this program; give another folder")
        run = cls(folder, plan, seed, data)
        run._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        run._lock()
        order = {"program": "numformer.demo", "minutes": plan.minutes, "seed": seed, "data": data}
        replace_file(folder / "run.json", json.dumps(order, indent=2) + "\n")
        run._open()
        return run

    def discard(self):
        """Leave things as they were before :meth:`begin`, where no stage was done."""
        for name in ("run.json", "metrics.jsonl", "timings.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in self._made:
            if not any(folder.iterdir()):
                folder.rmdir()

    @classmethod
    def resume(cls, folder, plan_for, **given):
        """The run that `folder` holds; `given` (minutes, seed, data), where not None, must be as it began."""
        folder = Path(folder)
        order = cls.read_order(folder)
        for name, value in given.items():
            if value is not None and value != order[name]:
                raise DemoError(f"--out {folder} holds a run with --{name} {order[name]}, not {value}: leave --{name} "
                                "away, or give another folder")
        try:
            plan = plan_for(order["minutes"])
        except DemoError:
            raise DemoError(f"{folder / 'run.json'} is broken; give another folder") from None
        run = cls(folder, plan, order["seed"], order["data"])
        run._lock()
        run._open()
        begun = run.results.get("data", {})
        for name in ("minutes", "seed"):
            if name in begun and begun[name] != order[name]:
                raise DemoError(f"{folder / 'run.json'} says {name} {order[name]}, and the run began with "
                                f"{begun[name]}: put that back, or give another folder")
        return run

    @staticmethod
    def read_order(folder):
        """What run.json says."""
        path = Path(folder) / "run.json"
        try:
            order = json.loads(path.read_text())
            if order["program"] != "numformer.demo" or not isinstance(order["data"], str | None):
                raise ValueError
            if type(order["minutes"]) is not int or type(order["seed"]) is not int or order["seed"] < 0:
                raise ValueError
        except FileNotFoundError:
            raise DemoError(f"--out {folder} holds no run to go on with (there is no run.json)") from None
        except (ValueError, KeyError, TypeError):
            raise DemoError(f"{path} is broken; give another folder") from None
        return order

    def _lock(self):
        """Hold the folder until the process ends, however it ends."""
        self._folder_handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._folder_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(f"--out {self.folder} is in use by another run") from None

    def _open(self):
        for part in self.folder.rglob(".*.part"):           # of a write that was killed
            part.unlink()
        self.log, self.results = _read_lines(self.folder / "metrics.jsonl")
        self.times, self.speeds = _read_lines(self.folder / "timings.jsonl")
        for stage in self.results.keys() - self.speeds.keys():
            raise DemoError(f"{self.folder}/timings.jsonl lacks the line of {stage}, which is done; give another "
                            "folder", code=1)

    # Stages

    def begin_stage(self, stage, done=None):
        """Lines of `stage` follow; those of it from step `done` on, from before a kill, are dropped.

        Where `done` is None, all are, unless the stage has a checkpoint: it then says how far that is.
        """
        self.stage = stage
        for lines in self.log, self.times:
            lines.setdefault(stage, [])
        if done is None and not self.checkpoint(stage).exists():
            done = 0
        if done is not None:
            for lines in self.log, self.times:
                lines[stage] = [line for line in lines[stage] if line["step"] < done]
            if [line["step"] for line in self.log[stage]] != list(range(done)):
                raise DemoError(f"{self.folder}/metrics.jsonl lacks steps of {stage} before its checkpoint; remove "
                                f"{self.checkpoint(stage)} and go on with --resume", code=1)
            self._rewrite()
        self._before = sum(line["seconds"] for line in self.times[stage])
        self._began = time.perf_counter()

    def write(self, step, result, seconds):
        """A line for a step of the stage."""
        self._append("metrics.jsonl", {"stage": self.stage, "step": step, **result}, self.log)
        self._append("timings.jsonl", {"stage": self.stage, "step": step, "seconds": seconds}, self.times)

    def end_stage(self, result, speeds):
        """The stage is done: all that it wrote comes before this."""
        speeds = {"seconds": self._before + time.perf_counter() - self._began, **speeds}
        self.results[self.stage], self.speeds[self.stage] = _plain(result), _plain(speeds)
        self._append("timings.jsonl", {"stage": self.stage, "done": True, **speeds})
        self._append("metrics.jsonl", {"stage": self.stage, "done": True, **result})
        self.checkpoint(self.stage).unlink(missing_ok=True)

    def finish(self):
        """Nothing is left to go on with."""
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    @staticmethod
    def clock():
        """Seconds, from anywhere."""
        return time.perf_counter()

    def checkpoint(self, stage):
        """Where the stage under way keeps what it needs to go on."""
        return self.folder / "state" / f"{stage}.safetensors"

    def model(self, name):
        """The folder of a model."""
        return self.folder / "models" / name

    def rng(self, *purpose):
        """A generator that the seed and `purpose` (words) alone decide."""
        return np.random.default_rng([self.seed, *"/".join(purpose).encode()])

    def _append(self, name, line, log=None):
        line = _plain(line)
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")
            if line.get("done"):
                file.flush()
                os.fsync(file.fileno())
        if log is not None:
            log[self.stage].append(line)

    def _rewrite(self):
        for name, log, results in (("metrics.jsonl", self.log, self.results),
                                   ("timings.jsonl", self.times, self.speeds)):
            lines = []
            for stage, steps in log.items():
                lines += steps
                if stage in results and stage != self.stage:
                    lines.append({"stage": stage, "done": True, **results[stage]})
            replace_file(self.folder / name, "".join(json.dumps(line) + "\n" for line in lines))


class _Line(dict):
    """An object of a file; what it lacks is an error that names the file."""

    def __init__(self, path, items):
        super().__init__(items)
        self.path = path

    def __missing__(self, key):
        raise DemoError(f"{self.path} is broken: {key!r} is missing in a line of it; give another folder", code=1)


def _read_lines(path):
    """({stage: lines with a step}, {stage: its last line}) of a file; a line that a kill cut off does not count."""
    log, results = {}, {}
    if path.exists():
        for text in path.read_text(errors="backslashreplace").splitlines(keepends=True):
            if not text.endswith("\n"):
                continue
            try:
                line = json.loads(text, object_hook=lambda items: _Line(path, items))
                stage = line.pop("stage")
                log.setdefault(stage, [])
                if line.pop("done", False):
                    results[stage] = line
                else:
                    log[stage].append(_Line(path, {"stage": stage, "step": line.pop("step"), **line}))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DemoError(f"{path} is broken: {text.strip()[:60]!r} is no line of it", code=1) from None
    return log, results


def _plain(value):
    """`value` with Python's numbers in place of NumPy's."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
