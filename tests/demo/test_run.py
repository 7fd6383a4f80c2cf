"""The demo as a user runs it: whole runs of toy size in processes of their own."""
import html
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import numformer as nf
from numformer.demo import cli
from numformer.demo.plan import plan_for
from numformer.demo.run import Run
from numformer.demo.stages import STAGES
from numformer.demo.talk import MODELS
from tests.demo import corpus

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run that nothing disturbed: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, out, error = corpus.run("--minutes", 0, "--seed", 3, "--data", source, "--out", folder)
    assert code == 0, error
    return folder, out


def test_a_terminal_that_lacks_a_sign_shows_a_question_mark(whole, source, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(metrics.replace(str(source), "ä", 1))
    code, out, error = corpus.run("--resume", "--out", folder, env={"PYTHONIOENCODING": "ascii"})
    assert code == 0, error
    assert "\n1 data               ?: " in out


def results(folder):
    """All files of a run that must not depend on the clock, by path."""
    paths = [folder / "metrics.jsonl", folder / "run.json", *folder.glob("models/*/*"), *folder.glob("data/*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_run_leaves_a_report_metrics_and_models_that_open_again(whole):
    folder, out = whole
    assert sorted(p.name for p in folder.iterdir()) == ["data", "metrics.jsonl", "models", "report.html", "run.json",
                                                        "timings.jsonl"]
    lines = read(folder)
    keys = [(line["stage"], line.get("step")) for line in lines]
    assert len(set(keys)) == len(keys)
    assert {"reward", *MODELS} == {path.name for path in (folder / "models").iterdir()}
    for name in MODELS:
        model = nf.models.load(folder / "models" / name)
        assert len(model.generate([1, 2], 3, temperature=0)) == 5
        assert (folder / "models" / name / "tokenizer.json").exists()
    assert [line["stage"] for line in lines if line.get("done")] == [stage.name for stage in STAGES]
    for stage in STAGES:
        assert f"\n{stage.title} " in out


def test_ppo_begins_with_a_kl_of_exactly_0_and_pruned_arrays_are_smaller(whole):
    done = {line["stage"]: line for line in read(whole[0]) if line.get("done")}
    assert done["ppo"]["first_kl"] == 0
    assert done["prune"]["heads"] < done["prune"]["heads_before"]
    assert done["prune"]["parameters"] < done["prune"]["parameters_before"]
    sizes = {model["name"]: model["weight_bytes"] for model in done["quantize"]["models"]}
    assert sizes["int4-gptq"] == sizes["int4-rtn"] < sizes["int8"]


def test_the_report_needs_nothing_from_outside(whole):
    page = (whole[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/svg+xml;base64,") == 6
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower().split()


def test_the_command_in_the_report_can_be_given_again(whole, source, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    order = (folder / "run.json").read_text()
    (folder / "run.json").write_text(order.replace(str(source), "/my text"))
    code, _, error = corpus.run("--resume", "--out", folder)
    assert code == 0, error
    page = html.unescape((folder / "report.html").read_text())
    assert "python -m numformer.demo --minutes 0 --seed 3 --data '/my text' " in page


def test_control_signs_that_a_model_says_reach_neither_the_terminal_nor_the_report(whole, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    lines = read(folder)
    for model in lines[-1]["models"]:
        model["samples"][0]["text"] = "red \x1b[31m bell \a nul \0 line\r\n back\r page\f c1 \x9b tab\t end"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, error = corpus.run("--resume", "--out", folder)
    assert code == 0, error
    for text in out, (folder / "report.html").read_text():
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
        assert "red \ufffd[31m bell \ufffd nul \ufffd line\n" in text
        assert " back\ufffd page\ufffd c1 \ufffd tab\t end" in text


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(whole, source, tmp_path):
    folder = tmp_path / "out"
    total = len((whole[0] / "metrics.jsonl").read_text().splitlines())
    points = sorted(random.Random(5).sample(range(total), 4))
    for count, lines in enumerate(points):
        arguments = ["--resume"] if count else ["--minutes", 0, "--seed", 3, "--data", source]
        process = corpus.demo(*arguments, "--out", folder)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and metrics.read_bytes().count(b"\n") > lines:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    code, _, error = corpus.run("--resume", "--out", folder)
    assert code == 0, error
    expected, found = results(whole[0]), results(folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(folder.rglob("*.part")) and not (folder / "state").exists()


_KILLED_BEHIND_ITS_CHECKPOINT = """
import os, sys
from numformer import train
from numformer.demo import cli, pretrain
from numformer.rlhf import ppo
pretrain.train.__kwdefaults__["every"] = 5          # so that a toy run has a checkpoint on the way
for module in train, ppo:
    def write(path, arrays, write=module.write_safetensors):
        write(path, arrays)
        if path.name == sys.argv[1] + ".safetensors":
            os.kill(os.getpid(), 9)
    module.write_safetensors = write
cli.main(sys.argv[2:])
"""


def test_a_run_that_is_killed_behind_a_checkpoint_goes_on_from_there(whole, source, tmp_path):
    folder, arguments = tmp_path / "out", ["--minutes", "0", "--seed", "3", "--data", str(source)]
    for stage in ("pretrain-experts", "pretrain-dense", "sft", "reward", "ppo"):
        code = subprocess.run([sys.executable, "-c", _KILLED_BEHIND_ITS_CHECKPOINT, stage, "--out", str(folder),
                               *arguments], timeout=120, capture_output=True).returncode
        assert code == -signal.SIGKILL and (folder / "state" / f"{stage}.safetensors").exists()
        arguments = ["--resume"]
    code, _, error = corpus.run("--resume", "--out", folder)
    assert code == 0, error
    expected, found = results(whole[0]), results(folder)
    assert [name for name in expected if found.get(name) != expected[name]] == []


@pytest.mark.parametrize(("stage", "path", "content", "message"), [
    ("reward", "data/pairs.json", "{", "pairs.json is broken; remove it and go on with --resume"),
    ("ppo", "models/sft/model.safetensors", "half a file", "is not a whole safetensors file"),
    ("prune", "models/ppo/config.json", "{}", "config.json names no model_type; give another --out"),
    ("generate", "models/int8/config.json", None, "int8 has no config.json: not a model's folder; give another --out"),
])
def test_what_a_done_stage_wrote_and_is_broken_now_is_said_in_one_line(whole, tmp_path, capsys, stage, path, content,
                                                                       message):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    for name in ("metrics.jsonl", "timings.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        begin = next(i for i, line in enumerate(lines) if json.loads(line)["stage"] == stage)
        (folder / name).write_text("".join(lines[:begin]))
    (folder / path).unlink()
    if content is not None:
        (folder / path).write_text(content)
    assert cli.main(["--resume", "--out", str(folder)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"numformer.demo: {folder}/") and message in error


@pytest.mark.parametrize(("stage", "key"), [("data", "bytes_per_token"), ("pretrain-experts", "load"),
                                            ("ppo", "kl_coef"), ("ppo", "best_of_n"), ("quantize", "models")])
def test_a_field_that_metrics_lack_is_said_in_one_line(whole, tmp_path, capsys, stage, key):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    lines = read(folder)
    for line in lines:
        if line["stage"] == stage:
            line.pop(key, None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["--resume", "--out", str(folder)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (f"numformer.demo: {folder}/metrics.jsonl is broken: '{key}' is missing in a line of it; give "
                     "another folder")


def test_a_run_that_was_killed_over_its_first_file_can_be_begun_again(tmp_path, source):
    (tmp_path / ".run.json.12.34.part").write_text('{"program": "numf')
    run = Run.begin(tmp_path, plan_for(0), 0, str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"] and run.seed == 0
