"""What every test may ask for."""
import os

import pytest

from numformer import _core

LEVELS = ["baseline", "avx2", "avx512", "avx512vnni"]
COMBINATIONS = int(os.environ.get("NUMFORMER_ATTENTION", 500))      # of attention's features, at random


def levels():
    """The instruction sets that this processor (or NUMFORMER_ISA) allows, weakest first."""
    return LEVELS[: LEVELS.index(_core.get_isa()) + 1]


@pytest.fixture
def threads():
    """Sets the number of threads for one test: ``threads(1)``."""
    before = _core.get_num_threads()
    yield _core.set_num_threads
    _core.set_num_threads(before)
