import ast
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from numformer.demo import data
from numformer.demo.corpus import HELD_OUT, Document, bits_per_byte_of_compressors, read_documents, split
from numformer.demo.errors import DemoError
from numformer.demo.examples import FUNCTIONS, PARAGRAPHS, cut_functions, cut_paragraphs
from numformer.demo.plan import plan_for
from numformer.demo.scorer import closed, distinct, score

# the plan


def test_a_plan_depends_on_the_minutes_alone_and_grows_with_them():
    plans = [plan_for(minutes) for minutes in range(61)]
    assert [plan.minutes for plan in plans] == list(range(61))
    for name in ("steps", "sft_steps", "reward_steps", "ppo_iterations", "test_prompts"):
        counts = [getattr(plan, name) for plan in plans]
        assert counts == sorted(counts) and isinstance(counts[7], int), name
    assert plan_for(17) == plan_for(17)


def test_every_plan_fits_together():
    for plan in map(plan_for, range(61)):
        assert plan.header_tokens + plan.body_tokens <= plan.block_size
        assert plan.ppo_batch % plan.ppo_minibatch == 0 and plan.n_embd % plan.n_head == 0
        assert plan.warmup < plan.steps and plan.evaluations <= plan.steps
    assert 10 <= plan_for(6).ppo_iterations <= 20 and plan_for(6).pairs == 512


@pytest.mark.parametrize("minutes", [-1, 61])
def test_minutes_outside_the_table_are_refused(minutes):
    with pytest.raises(DemoError, match=f"--minutes must be from 0 to 60, got {minutes}"):
        plan_for(minutes)


# the split


def documents(count, size=1000):
    rng = np.random.default_rng(0)
    return [Document(f"{i}.py", "x" * size, size, int(rng.integers(1000))) for i in range(count)]


def test_files_are_held_out_whole_and_by_their_number_alone():
    every = documents(400)
    train, held_out = split(every)
    assert {d.path for d in train} | {d.path for d in held_out} == {d.path for d in every}
    assert not {d.path for d in train} & {d.path for d in held_out}
    assert {d.path for d in held_out} == {d.path for d in every if d.number < HELD_OUT}
    kept = [d for d in split(every[:300])[1]]           # other files change nothing for a file
    assert [d for d in held_out if int(d.path[:-3]) < 300] == kept


def test_where_no_number_is_low_enough_the_lowest_are_held_out():
    every = [Document(f"{i}.py", "x", 1000, 100 + i) for i in range(10)]
    assert [d.path for d in split(every)[1]] == ["0.py"]


def test_compressors_are_measured_on_the_bytes():
    found = bits_per_byte_of_compressors([Document("a", "ä" * 5000, 10000, 0), Document("b", "ä" * 5000, 10000, 1)])
    assert 0 < found["gzip"] < found["gzip_by_file"] < 0.1 and 0 < found["xz"] < found["xz_by_file"] < 0.2


def test_a_text_that_says_end_does_not_end_there(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("tqdm")
    words = np.array(["one", "two", "three", "four", "five", "<|end|>"])
    for i, rows in enumerate(np.random.default_rng(0).integers(6, size=(30, 60, 24))):
        paragraphs = [" ".join(words[row]) for row in rows]
        (tmp_path / f"{i}.txt").write_text("\n\n".join(paragraphs))
    run = SimpleNamespace(folder=tmp_path / "out", plan=plan_for(0), data=tmp_path, seed=0)
    result, _ = data.work(run)
    corpus = data.Corpus(run)
    for path, files in ((corpus.train, result["train_files"]), (corpus.held_out, result["held_out_files"])):
        assert (np.load(path) == corpus.end).sum() == files
    for prompt, completion in corpus.examples["train"]:
        assert corpus.end not in prompt and completion.index(corpus.end) == len(completion) - 1
    assert corpus.decode(corpus.tokenizer.encode(paragraphs[0]).ids) == paragraphs[0]


def test_only_text_is_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    text = "a line of text\n" * 1000
    for name in ("a.txt", "sub/b.md", ".hidden", ".git/c"):
        (tmp_path / name).write_text(text)
    (tmp_path / "d.bin").write_bytes(b"\0" * 20000)
    (tmp_path / "e.latin").write_bytes(b"\xe4" * 20000)
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    found = read_documents(tmp_path, 1_000_000)
    assert [d.path for d in found] == ["a.txt", "sub/b.md"]
    assert all(0 <= d.number < 1000 and d.size == len(text) for d in found)


def test_a_byte_order_mark_is_no_text(tmp_path):
    source = "def keep(thing):\n    return thing\n" * 1000
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8-sig")
    for document in read_documents(tmp_path, 1_000_000):
        assert (document.text, document.size) == (source, len(source))
        assert cut_functions(document.text)


def test_no_more_is_read_than_asked_for(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("word " * 2000)
    assert sum(d.size for d in read_documents(tmp_path, 45_000)) == 40_000


def test_a_name_that_is_no_utf8_is_a_name_and_what_the_run_itself_writes_is_no_text_of_it(tmp_path, monkeypatch):
    text = "word " * 2000
    out = tmp_path / "sub" / "out"
    (out / "data").mkdir(parents=True)
    for path in (os.fsencode(tmp_path) + b"/\xff.txt", tmp_path / "a.txt", out / "run.json", out / "data" / "b.txt"):
        with open(path, "w") as file:
            file.write(text)
    monkeypatch.chdir(tmp_path / "sub")
    for without in (out, Path("out")):
        assert {d.path for d in read_documents(tmp_path, 1_000_000, without)} == {"a.txt", os.fsdecode(b"\xff.txt")}
    assert len(read_documents(tmp_path, 1_000_000)) == 4


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(DemoError, match="0 text files of 0 bytes; at least 2 files"):
        read_documents(tmp_path, 1000)
    with pytest.raises(DemoError, match="no such folder"):
        read_documents(tmp_path / "missing", 1000)
    for name in "ab":
        (tmp_path / name).write_bytes(b"word " * 900_000)
    with pytest.raises(DemoError, match="and links, hidden files, files above 4 MB and what is not UTF-8 do not"):
        read_documents(tmp_path, 16_000_000)
    for name in "ab":
        (tmp_path / name).write_bytes(b"word " * 700_000)
    with pytest.raises(DemoError, match="files above 2 MB"):
        read_documents(tmp_path, 2_000_000)


# examples

SOURCE = '''
class Box:
    def put(self, thing, *more):
        """Put it in."""
        # all of it
        self.inside = [thing, *more]
        return self

    def empty(self):
        return self.inside == []

    @property
    def one_line(self, a): return a

async def later(x):
    return x

def outer(
    first,
    second=1,
):
    def inner(y):
        return first + y
    return inner(second)
'''


def test_functions_are_cut_where_the_body_begins_and_moved_to_the_margin():
    found = dict(cut_functions(SOURCE))
    assert found["def put(self, thing, *more):\n"] == "    self.inside = [thing, *more]\n    return self\n"
    assert found["def outer(\n    first,\n    second=1,\n):\n"].startswith("    def inner(y):\n        return first")
    assert found["def inner(y):\n"] == "    return first + y\n"
    assert len(found) == 3          # no argument, on one line, async: left out


def test_what_is_cut_parses_again():
    source = Path(ast.__file__).read_text()
    found = cut_functions(source)
    assert len(found) > 50
    for header, body in found:
        assert len(ast.parse(header + body).body) == 1 and header.endswith(":\n") and body.startswith("    ")


def test_a_source_that_does_not_parse_gives_no_functions():
    assert cut_functions("def f(x):\n  return (\n") == []


@pytest.mark.parametrize("sign", ["\f", "\v", "\x1c", "\x85", "\u2028"])
def test_a_sign_that_ends_no_line_of_python_moves_no_function(sign):
    source = f"# a page\n\f\nmark = '{sign}'\ndef keep(thing):\n    return thing, '{sign}'\n"
    assert cut_functions(source) == [("def keep(thing):\n", f"    return thing, '{sign}'\n")]
    assert cut_functions(source.replace("\n", "\r\n"))[0][0] == "def keep(thing):\r\n"


def test_paragraphs_are_cut_between_words_and_nothing_is_lost():
    text = "one two three four five six\n\n\nshort one\n\nseven eight nine ten eleven twelve thirteen"
    pairs = cut_paragraphs(text)
    assert pairs[0] == ("one two", " three four five six")
    assert [a + b for a, b in pairs] == [p for p in text.replace("\n\n\n", "\n\n").split("\n\n") if p != "short one"]
    assert cut_paragraphs(text.replace("\n", "\r\n")) == pairs


# the program that judges

HEADER = "def add(self, a, b):\n"


@pytest.mark.parametrize(("body", "ended", "expected"), [
    ("    return a + b\n", True, 1.0),
    ("    return a + b\n", False, 0.0),         # cut off
    ("    return a + (b\n", True, 0.5),         # does not parse
    ("    return (a\n", True, 0.25),
    ("    return a\n", True, 0.75),             # one of two arguments
    ("    a = b = 1\n", True, 0.5),             # written, not read
    ("    pass\n", True, 0.5),
    ("    pass (\n", True, 0.0),
    ("", True, 0.0),
    ("    return a + b\ndef more(x):\n    return x\n", True, 0.5),      # goes on after the function
])
def test_score_of_a_function(body, ended, expected):
    assert score(FUNCTIONS, HEADER, body, ended) == expected


def test_the_compilers_advice_on_a_sample_is_neither_shown_nor_an_error():
    assert score(FUNCTIONS, HEADER, '    return a, b, "\\d"\n', True) == 1


def test_repetition_costs():
    body = "    print(a, b)\n" * 8
    assert 0 < score(FUNCTIONS, HEADER, body, True) < 0.3
    assert distinct("a b c d e") == 1 and distinct("x") == 1 and distinct("a a a a a a") == pytest.approx(1 / 3)


def test_score_of_a_paragraph():
    assert score(PARAGRAPHS, "He said", ' "yes (of course)" and went.', True) == 1
    assert score(PARAGRAPHS, "He said", ' "yes (of course" and went.', True) < 1
    assert score(PARAGRAPHS, "He said", " yes.", False) == 0
    assert closed("(a] [b)") < 0.6 and closed("no signs") == 1
