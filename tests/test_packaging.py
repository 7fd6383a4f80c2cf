"""What is installed, and what a source archive holds."""
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

import numformer
from numformer import _core

ROOT = Path(__file__).parent.parent


def setup(*commands):
    """Run setup.py, which leaves nothing in the checkout."""
    pytest.importorskip("setuptools")
    subprocess.run([sys.executable, "setup.py", "-q", *map(str, commands)], cwd=ROOT, check=True)


def test_the_wheel_stays_below_3_megabytes(tmp_path):
    """What a wheel holds, compressed as a wheel is."""
    package = Path(numformer.__file__).parent
    files = [f for pattern in ("*.py", "*.pyi", "py.typed") for f in package.rglob(pattern)] + [Path(_core.__file__)]
    with ZipFile(tmp_path / "wheel.zip", "w", ZIP_DEFLATED) as wheel:
        for file in files:
            wheel.write(file)
    assert (tmp_path / "wheel.zip").stat().st_size < 3e6


def test_the_wheel_holds_the_whole_package_its_types_and_nothing_else(tmp_path):
    setup("build_py", "--build-lib", tmp_path / "lib", "egg_info", "--egg-base", tmp_path)
    built = {str(f.relative_to(tmp_path / "lib")) for f in (tmp_path / "lib").rglob("*") if f.is_file()}
    source = ROOT / "python"
    wanted = {str(f.relative_to(source)) for f in (source / "numformer").rglob("*.py")}
    assert built == wanted | {"numformer/py.typed", "numformer/_core.pyi"}


def test_a_source_archive_holds_all_that_building_and_testing_take(tmp_path):
    setup("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    wanted = {str(f.relative_to(ROOT)) for folder in ("csrc", "python", "tests", "docs", "benchmarks")
              for suffix in (".c", ".h", ".inc", ".py", ".pyi", ".typed", ".md", ".png", ".json")
              for f in (ROOT / folder).rglob("*" + suffix)}
    assert len(wanted) > 200 and not wanted - held
    assert {"setup.py", "pyproject.toml", "Makefile", "README.md", ".ci/run"} <= held
    assert not any(name.endswith(".so") for name in held)


def test_the_version_is_that_of_the_distribution(tmp_path):
    setup("egg_info", "--egg-base", tmp_path)
    described = (tmp_path / "numformer.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: {numformer.__version__}\n" in described
    assert numformer.show_config("dict")["numformer"].startswith(numformer.__version__)
