"""Every test in this folder runs at every instruction set that the machine has."""
import pytest

from numformer import _core
from tests.conftest import levels


@pytest.fixture(params=levels(), autouse=True)
def isa(request):
    before = _core.get_isa()
    _core.cap_isa(request.param)
    yield request.param
    _core.cap_isa(before)
