"""Every test in this folder runs at every instruction set that the machine has."""
import collections
import os

import pytest

from numformer import _core
from tests.conftest import levels


@pytest.fixture(params=levels(), autouse=True)
def isa(request):
    before = _core.get_isa()
    _core.cap_isa(request.param)
    yield request.param
    _core.cap_isa(before)


def pytest_collection_modifyitems(config, items):
    """NUMFORMER_EVERY=n keeps every n-th case of each test, its first at least: emulated processors are slow."""
    every, cases = int(os.environ.get("NUMFORMER_EVERY", 1)), collections.Counter()
    kept, left = [], []
    for item in items:
        (left if cases[item.function] % every else kept).append(item)
        cases[item.function] += 1
    if left:
        items[:] = kept
        config.hook.pytest_deselected(items=left)
