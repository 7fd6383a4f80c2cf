import numpy as np
import pytest

import numformer as nf
from tests import oracle

SIZES = [0, 1, 3, 15, 16, 17, 31, 33, 97, 16384, 16385, 50001]


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("n", SIZES)
def test_matches_the_float64_formula(n, approximate):
    x = np.linspace(-6, 6, n, dtype=np.float32)
    np.testing.assert_allclose(nf.gelu(x, approximate), oracle.gelu(x, approximate), rtol=1e-6, atol=1e-20)


def test_bits_do_not_depend_on_threads_strides_or_company(threads):
    x = np.random.default_rng(0).standard_normal((300, 401)).astype(np.float32)
    whole = nf.gelu(x)
    threads(1)
    assert (nf.gelu(x) == whole).all()
    assert (nf.gelu(x[:, ::3]) == whole[:, ::3]).all()
    assert (nf.gelu(x[7, 9]) == whole[7, 9]).all()


def test_an_unknown_form_is_named_in_the_error():
    with pytest.raises(ValueError, match="approximate"):
        nf.gelu(np.zeros(3), approximate="fast")
