"""What is installed."""
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numformer
from numformer import _core


def test_the_wheel_stays_below_3_megabytes(tmp_path):
    """What a wheel holds, compressed as a wheel is."""
    package = Path(numformer.__file__).parent
    files = [f for pattern in ("*.py", "*.pyi", "py.typed") for f in package.rglob(pattern)] + [Path(_core.__file__)]
    with ZipFile(tmp_path / "wheel.zip", "w", ZIP_DEFLATED) as wheel:
        for file in files:
            wheel.write(file)
    assert (tmp_path / "wheel.zip").stat().st_size < 3e6
