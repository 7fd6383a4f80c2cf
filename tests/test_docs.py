"""Every Python block of the README and of docs/ runs as it stands, the blocks of a page one after the other."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """(line, code) of each."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_was_run_and_its_code_runs(notebook, monkeypatch):
    """All but the cells that measure, from the one that starts processes on."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(notebook.parent)
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    names = {"__name__": "notebook"}
    with pyplot.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells):
            code = "".join(cell["source"])
            if "PROGRAM =" in code:
                break
            exec(compile(code, f"{notebook.name}, cell {number + 1}", "exec"), names)
    assert number > 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_small_and_names_no_place_on_a_machine(notebook):
    text = notebook.read_text()
    assert len(text) < 300_000 and not re.search(r"/(home|tmp|root|Users|work)/", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_points_to_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_the_readme_carries_the_table_of_the_recorded_benchmarks():
    benchmarks = pytest.importorskip("benchmarks.__main__")
    assert benchmarks.table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("rate", "unit", "text"), [
    (54.32e9, "FLOP", "54.3 GFLOP/s"), (1.69e9, "elements", "1.69 G elements/s"), (5.3e8, "B", "530 MB/s"),
    (2232.4, "tokens", "2,232 tokens/s"), (8.03, "imports", "8 imports/s")])
def test_a_rate_says_what_it_counts(rate, unit, text):
    units = pytest.importorskip("benchmarks.units")
    assert units.amount(rate, unit) == text
