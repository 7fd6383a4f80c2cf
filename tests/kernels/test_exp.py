"""exp, expm1, log, tanh, sigmoid and SiLU on the whole line. The float64 reference of a float32 result is libm's;
of a float64 result mpmath's, on fewer points."""
import mpmath
import numpy as np
import pytest

from numformer import _core
from tests.oracle import ulps

mpmath.mp.dps = 30


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


# name: float64 reference, the same in mpmath, largest error in ULP
FUNCTIONS = {
    "exp": (np.exp, mpmath.exp, 1),
    "expm1": (np.expm1, mpmath.expm1, 2),
    "log": (np.log, mpmath.log, 1),
    "tanh": (np.tanh, mpmath.tanh, 3),
    "sigmoid": (sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), 3),
    "silu": (lambda x: x * sigmoid(x), lambda x: x / (1 + mpmath.exp(-x)), 3),
}


def everywhere(dtype):
    """Patterns spread evenly over all numbers, the ordinary range, and the edges."""
    unsigned, info = (np.uint32, np.finfo(np.float32)) if dtype == np.float32 else (np.uint64, np.finfo(np.float64))
    n = 60000 if dtype == np.float32 else 300
    spread = np.linspace(0, float(np.iinfo(unsigned).max) * (1 - 1e-9), n).astype(unsigned).view(dtype)
    most = 120 if dtype == np.float32 else 760
    edges = [0.0, -0.0, 1, -1, info.tiny, -info.tiny, info.smallest_subnormal, info.max, -info.max, 88.72, 88.73, -87.3,
             -103.9, -104, 709.78, 709.79, -708.4, -745.1, -745.2]
    spread = spread[np.isfinite(spread)]
    x = np.concatenate([spread, np.linspace(-most, most, n), np.linspace(-2, 2, n), np.linspace(-12, 12, n), edges])
    with np.errstate(over="ignore"):
        return x.astype(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_is_accurate_on_the_whole_line(name):
    reference, _, limit = FUNCTIONS[name]
    x = everywhere(np.float32)
    x = x[x >= 0] if name == "log" else x
    with np.errstate(all="ignore"):
        want = reference(x.astype(np.float64))
    assert ulps(getattr(_core, name)(x), want).max() <= limit


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_is_accurate_on_the_whole_line(name):
    _, reference, limit = FUNCTIONS[name]
    x = everywhere(np.float64)
    x = x[x > 0] if name == "log" else x
    want = [reference(mpmath.mpf(float(v))) for v in x]
    got = getattr(_core, name)(x)
    worst = 0
    for g, w in zip(got, want):
        if np.isinf(g):
            assert abs(w) > np.finfo(np.float64).max
            continue
        exponent = max(int(mpmath.floor(mpmath.log(abs(w), 2))) if w else -1022, -1022)
        worst = max(worst, abs(mpmath.mpf(float(g)) - w) / mpmath.mpf(2) ** (exponent - 52))
    assert worst <= limit


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges_are_what_c_gives(dtype):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -0.0, 0.0, inf, nan, 1], dtype)
    for name, want in {
        "exp": [0, 1, 1, inf, nan, np.exp(1)],
        "expm1": [-1, -0.0, 0.0, inf, nan, np.expm1(1)],
        "log": [nan, -inf, -inf, inf, nan, 0],
        "tanh": [-1, -0.0, 0.0, 1, nan, np.tanh(1)],
        "sigmoid": [0, 0.5, 0.5, 1, nan, 1 / (1 + np.exp(-1))],
        "silu": [-0.0, -0.0, 0.0, inf, nan, 1 / (1 + np.exp(-1))],
        "relu": [0, 0, 0, inf, nan, 1],
    }.items():
        got = getattr(_core, name)(x)
        np.testing.assert_allclose(got, np.array(want, dtype), rtol=1e-6, err_msg=name)
        if name in ("expm1", "tanh", "silu"):
            assert (np.signbit(got[:3]) == [True, True, False]).all(), name
    assert np.isnan(_core.log(np.array([-1, -1e-40, -1e30], dtype))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_slope_of_silu_is_that_of_the_formula(dtype):
    x = np.linspace(-30, 30, 1001).astype(dtype)
    s = sigmoid(x.astype(np.float64))
    want = s * (1 + x * sigmoid(-x.astype(np.float64)))
    np.testing.assert_allclose(_core.silu_backward(x, np.ones_like(x)), want, rtol=1e-5, atol=np.finfo(dtype).eps)
    ends = _core.silu_backward(np.array([-np.inf, np.inf, np.nan], dtype), np.ones(3, dtype))
    assert ends[0] == 0 and ends[1] == 1 and np.isnan(ends[2])
