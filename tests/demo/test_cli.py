"""Every error is one line on stderr with an exit code that says whose it is."""
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from numformer.demo import cli, data
from tests.demo import corpus

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def one_line(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert lines[-1].startswith("numformer.demo: ")
    return lines[-1]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--data", "{tmp}/missing"], "no such folder"),
    (["--data", "{tmp}/empty"], "0 text files of 0 bytes; at least 2 files"),
    (["--data", "{tmp}/file"], "not a folder"),
    (["--data", "{tmp}/empty", "--out", "{tmp}/new/newer"], "0 text files of 0 bytes; at least 2 files"),
    (["--minutes", "61"], "--minutes must be from 0 to 60, got 61"),
    (["--data", ""], "--data is empty; give a folder"),
    (["--data", "{tmp}/\udcff"], "is a name that is no UTF-8"),
    (["--out", ""], "--out is empty; give a folder"),
    (["--out", "{tmp}/\udcff"], "is a name that is no UTF-8"),
    (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    (["--out", "{tmp}/file"], "is not a folder"),
    (["--out", "{tmp}/full"], "is not empty and holds no run"),
    (["--out", "{tmp}/run"], "holds a run already (--minutes 6 --seed 4): go on with it by --resume"),
    (["--out", "{tmp}/run", "--resume", "--seed", "5"], "holds a run with --seed 4, not 5"),
    (["--out", "{tmp}/empty", "--resume"], "holds no run to go on with"),
    (["--out", "{tmp}/broken", "--resume"], "run.json is broken"),
    (["--out", "{tmp}/foreign", "--resume"], "run.json is broken"),
    (["--out", "{tmp}/long", "--resume"], "run.json is broken"),
    (["--out", "{tmp}/edited", "--resume"], "run.json says minutes 6, and the run began with 0: put that back"),
])
def test_what_cannot_be_done_is_said_in_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys,
                                                                        monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full", "run", "broken", "foreign", "long", "edited"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full" / "letter.txt").write_text("dear")
    order = {"program": "numformer.demo", "minutes": 6, "seed": 4, "data": None}
    (tmp_path / "run" / "run.json").write_text(json.dumps(order))
    (tmp_path / "foreign" / "run.json").write_text(json.dumps(order | {"minutes": "6"}))
    (tmp_path / "long" / "run.json").write_text(json.dumps(order | {"minutes": 61}))
    (tmp_path / "edited" / "run.json").write_text(json.dumps(order))
    for name in ("metrics.jsonl", "timings.jsonl"):
        done = {"stage": "data", "done": True, "minutes": 0, "seed": 4, "seconds": 1.0}
        (tmp_path / "edited" / name).write_text(json.dumps(done) + "\n")
    (tmp_path / "broken" / "run.json").write_text('{"program": "numf')
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    assert message in one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main([]) == 2
    assert "pip install 'numformer[demo]'" in one_line(capsys)


def test_a_full_disk_is_said_in_one_line(tmp_path, capsys, monkeypatch, source):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr(data, "replace_file", full)
    assert cli.main(["--minutes", "0", "--data", str(source), "--out", str(tmp_path / "out")]) == 1
    line = one_line(capsys)
    assert "No space left on device (make room, then go on with --resume)" in line


def test_a_stop_says_how_to_go_on(tmp_path, source):
    # a shell's background job is born deaf to Ctrl-C
    process = corpus.demo("--minutes", 0, "--data", source, "--out", tmp_path / "an out",
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for line in process.stdout:
        if line.startswith("1 data"):
            break
    error = None
    while error is None:            # an interrupt that falls into a destructor is lost to Python
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            error = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == ("numformer.demo: stopped; to go on: python -m numformer.demo --resume --out "
                                      f"'{tmp_path}/an out'")


def test_a_stop_before_the_run_is_begun_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setitem(sys.modules, "numformer.demo.stages", ModuleType("stages"))
    sys.modules["numformer.demo.stages"].__getattr__ = interrupt        # while it is imported
    assert cli.main(["--out", str(tmp_path / "out")]) == 130
    assert one_line(capsys) == "numformer.demo: stopped before anything was begun"
    assert not (tmp_path / "out").exists()


def test_a_broken_checkpoint_and_broken_data_are_said_in_one_line(tmp_path, source):
    folder = tmp_path / "out"
    process = corpus.demo("--minutes", 0, "--data", source, "--out", folder)
    for line in process.stdout:
        if line.startswith("1 data"):
            break
    process.kill()
    process.communicate()

    def said():
        code, _, error = corpus.run("--resume", "--out", folder)
        assert code == 1 and "Traceback" not in error
        return error.splitlines()[-1]

    (folder / "state").mkdir(exist_ok=True)
    checkpoint = folder / "state" / "pretrain-experts.safetensors"
    checkpoint.write_bytes(b"half a file")
    line = said()
    assert line.startswith(f"numformer.demo: {checkpoint} is not a whole safetensors file")
    assert "remove it and go on with --resume" in line
    assert checkpoint.read_bytes() == b"half a file"
    checkpoint.unlink()
    for name, content in (("examples.json", b"{}"), ("tokenizer.json", b"{"), ("train.npy", b"half a file")):
        whole = (folder / "data" / name).read_bytes()
        (folder / "data" / name).write_bytes(content)
        assert said().startswith(f"numformer.demo: {folder}/data is broken (")
        (folder / "data" / name).write_bytes(whole)
    (folder / "timings.jsonl").unlink()
    assert f"{folder}/timings.jsonl lacks the line of data, which is done" in said()


@pytest.mark.parametrize("line", [b'{"a": 1}', b"[1]", b"\xff\xfe", b"\0\0\0", b'{"stage": "sft"}',
                                  b'{"stage": ["sft"]}'])
def test_a_line_of_metrics_that_is_none_is_said_in_one_line(tmp_path, capsys, line):
    order = {"program": "numformer.demo", "minutes": 0, "seed": 4, "data": None}
    (tmp_path / "run.json").write_text(json.dumps(order))
    (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "data", "done": true}\n' + line + b"\n")
    assert cli.main(["--resume", "--out", str(tmp_path)]) == 1
    assert "metrics.jsonl is broken: " in one_line(capsys)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_stops_the_run_in_one_line(tmp_path, source, stream):
    with corpus.demo("--minutes", 0, "--data", source, "--out", tmp_path / "out") as process:
        getattr(process, stream).close()
        error = process.stderr.read() if stream == "stdout" else ""
    assert process.returncode == 1
    assert "Traceback" not in error and "Exception ignored" not in error
    if stream == "stdout":
        assert error.splitlines()[-1] == ("numformer.demo: stopped, as nobody reads what it says; to go on: "
                                          f"python -m numformer.demo --resume --out {tmp_path}/out")


def test_a_run_without_standard_streams_runs_to_its_end(tmp_path, source):
    code, *_ = corpus.run("--minutes", 0, "--data", source, "--out", tmp_path / "out",
                          preexec_fn=lambda: os.closerange(0, 3))
    assert code == 0 and (tmp_path / "out" / "report.html").exists()


def test_help_explains_all(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--minutes", "--seed", "--out", "--data", "--resume", "report.html", "metrics.jsonl", "Exit codes"):
        assert word in text
