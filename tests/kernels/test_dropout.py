import numpy as np
import pytest

import numformer as nf
from numformer import _core


def philox(key, counter):
    """The four words of a counter, from the paper: Salmon et al. 2011, table 2 and section 3.3."""
    x, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [q >> 32 ^ x[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ x[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def test_the_reference_gives_the_published_numbers():
    # Random123's known answers for philox4x32-10.
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 15, 63, 64, 65, 130])
def test_the_mask_is_philox_of_key_and_index(n, dtype):
    key, p = 0x1234_5678_9ABC_DEF0, 0.375
    y = _core.dropout(np.ones(n, dtype), p, key)
    for i in range(n):
        word = philox(key, i // 64 * 16 + i % 16)[i % 64 // 16]
        assert y[i] == (0 if word < p * 2**32 else dtype(1 / (1 - p)))


def test_the_mask_depends_on_neither_threads_nor_dtype_nor_layout(threads):
    x = np.ones((300, 401), np.float32)
    whole = _core.dropout(x, 0.5, 7)
    assert (_core.dropout(x.astype(float), 0.5, 7) == whole).all()
    assert (_core.dropout(np.ones((401, 300), np.float32).T, 0.5, 7) == whole).all()
    threads(1)
    assert (_core.dropout(x, 0.5, 7) == whole).all()


def test_the_share_of_zeros_is_p_and_the_mean_stays():
    y = nf.dropout(np.ones(200000, np.float32), 0.1, np.random.default_rng(0))
    assert abs((y == 0).mean() - 0.1) < 0.003 and abs(y.mean() - 1) < 0.003
    assert abs(np.corrcoef(y[:-1], y[1:])[0, 1]) < 0.01


def test_the_backward_uses_the_same_mask_and_the_same_generator_state_gives_the_same_mask():
    x = np.random.default_rng(1).standard_normal((20, 33)).astype(np.float32)
    t = nf.Tensor(x, requires_grad=True)
    y = nf.dropout(t, 0.3, np.random.default_rng(5))
    y.backward(np.broadcast_to(np.float32(1), x.shape))
    assert ((t.grad == 0) == (y.data == 0)).all()
    assert (nf.dropout(x, 0.3, np.random.default_rng(5)) == y.data).all()
    rng = np.random.default_rng(5)
    assert (nf.dropout(x, 0.3, rng) != nf.dropout(x, 0.3, rng)).any()


def test_p_of_zero_is_the_identity_and_of_one_is_zero():
    x = np.array([1, np.inf, np.nan], np.float32)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert nf.dropout(x, 0, rng) is x and nf.dropout(x, 0.0, None) is x and rng.bit_generator.state == before
    assert (nf.dropout(x, 1, rng) == 0).all()


def test_a_dropped_nan_or_inf_is_zero():
    x = np.full(1000, np.nan, np.float32)
    y = nf.dropout(x, 0.5, np.random.default_rng(0))
    assert (y == 0).sum() + np.isnan(y).sum() == 1000 and 400 < (y == 0).sum() < 600


def test_bad_arguments_are_named():
    x = np.ones(3, np.float32)
    rng = np.random.default_rng(0)
    for p in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="p must be between 0 and 1"):
            nf.dropout(x, p, rng)
    for call in (lambda p: nf.dropout(x, p, rng), lambda p: nf.nn.Dropout(p, rng=rng)):
        with pytest.raises(TypeError, match=r"(?i)dropout: p must be a real number, got None"):
            call(None)
    with pytest.raises(TypeError, match="rng must be a numpy"):
        nf.dropout(x, 0.5, None)
    with pytest.raises(TypeError, match="rng must be a numpy"):
        nf.dropout(x, 0.5, 3)
    with pytest.raises(TypeError, match="dropout: x must be float32"):
        nf.dropout(np.arange(3), 0.5, rng)
