import mpmath
import numpy as np
import pytest

import numformer as nf
from tests import oracle

mpmath.mp.dps = 30
SIZES = [0, 1, 3, 15, 16, 17, 31, 33, 97, 16384, 16385, 50001]


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("n", SIZES)
def test_matches_the_float64_formula(n, approximate):
    x = np.linspace(-6, 6, n, dtype=np.float32)
    np.testing.assert_allclose(nf.gelu(x, approximate), oracle.gelu(x, approximate), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize(("approximate", "least"), [("none", -39.0), ("tanh", -22.0), ("quick", -440.0)])
def test_float64_is_right_down_to_the_denormals(approximate, least):
    x = np.linspace(least, 6, 20001)
    np.testing.assert_allclose(nf.gelu(x, approximate), oracle.gelu(x, approximate), rtol=1e-11, atol=2e-323)


def test_bits_do_not_depend_on_threads_strides_or_company(threads):
    x = np.random.default_rng(0).standard_normal((300, 401)).astype(np.float32)
    whole = nf.gelu(x)
    threads(1)
    assert (nf.gelu(x) == whole).all()
    assert (nf.gelu(x[:, ::3]) == whole[:, ::3]).all()
    assert (nf.gelu(x[7, 9]) == whole[7, 9]).all()


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_bits_do_not_depend_on_how_large_the_neighbours_are(approximate):
    x = np.random.default_rng(0).uniform(-8, 8, 400).astype(np.float32)
    crowd = np.full((400, 16), -7, np.float32)
    crowd[:, 3] = x
    assert (nf.gelu(crowd, approximate)[:, 3] == [nf.gelu(v, approximate) for v in x]).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bits_do_not_depend_on_where_a_number_stands(approximate):
    x = np.random.default_rng(0).uniform(-17, 6, 1200).astype(np.float32)
    x[::97] = [np.nan, -np.inf, np.inf, -0.0, 0.0, -3.75, 3.75, -14.6, -10.8, -1e38, 1e38, -1e-40, 5.5]
    whole = np.array([nf.gelu(v, approximate) for v in x])
    for begin, end in ((0, 1200), (1, 130), (5, 132), (127, 400), (129, 1199)):
        np.testing.assert_array_equal(nf.gelu(x[begin:end], approximate), whole[begin:end])
    biased = nf.bias_gelu(x.reshape(4, 300), np.zeros(300, np.float32), approximate)
    np.testing.assert_array_equal(biased.ravel(), whole)
    nf.gelu(x, approximate, out=x)
    np.testing.assert_array_equal(x, whole)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("apart", [1, 4, 8, 16])
def test_nan_behind_a_number_of_the_tail_does_not_hide_it(approximate, apart):
    x = np.zeros(512, np.float32)
    x[0], x[apart] = -8, np.nan
    y = nf.gelu(x, approximate)
    assert y[0] == nf.gelu(x[0], approximate) and np.isnan(y[apart]) and np.isnan(y).sum() == 1


def test_an_unknown_form_is_named_in_the_error():
    with pytest.raises(ValueError, match="approximate"):
        nf.gelu(np.zeros(3), approximate="fast")


@pytest.mark.parametrize("op", [nf.gelu, nf.silu])
def test_an_out_that_does_not_fit_is_named(op):
    x, name = np.ones((2, 3), np.float32), op.__name__
    read_only = np.broadcast_to(np.float32(1), (2, 3))
    for out, error, says in (([0], TypeError, "an ndarray, got list"),
                             (np.ones((2, 3)), TypeError, "float32, got float64"),
                             (np.ones((2, 2, 3), np.float32), ValueError, r"shape \(2, 3\), got \(2, 2, 3\)"),
                             (read_only, ValueError, "writeable")):
        with pytest.raises(error, match=f"{name}: out must (be|have) {says}"):
            op(x, out=out)
    assert op(x, out=x) is x


@pytest.mark.parametrize("op", [
    nf.gelu, nf.silu, lambda x, out: nf.rotary_embedding(x, np.ones((2, 2)), np.ones((2, 2)), out=out)])
def test_a_tensor_is_not_written_over(op):
    x = nf.Tensor(np.ones((2, 4)), requires_grad=True)
    with pytest.raises(ValueError, match="out must not share memory with x where that is a Tensor"):
        op(x, out=x.data[...])
    assert (x.data == 1).all()


def everywhere():
    """float32 numbers spread evenly over all there are, where the forms bend, and where another way begins."""
    spread = np.linspace(0, 2**32 - 1, 200000).astype(np.uint32).view(np.float32)
    ends = np.array([3.75, 4.9, 5.3, 5.6, 6], np.float32).view(np.int32)[:, None] + np.arange(-500, 500, dtype=np.int32)
    ends = ends.ravel().view(np.float32)
    return np.concatenate([spread[np.isfinite(spread)], ends, -ends, np.linspace(-16, 16, 200000, dtype=np.float32),
                           np.random.default_rng(0).uniform(-5, 0, 400000).astype(np.float32),
                           np.linspace(-70, -8, 50000, dtype=np.float32)])


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_float32_errs_by_2_ulp_at_most(approximate):
    x = everywhere()
    want = nf.gelu(x.astype(np.float64), approximate)
    assert oracle.ulps(nf.gelu(x, approximate), want).max() <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_results_have_the_sign_of_x_where_they_underflow_to_0_too(approximate, dtype):
    x = np.concatenate([everywhere(), [-np.inf, -1e38, -0.0, 0.0, np.inf]]).astype(dtype)
    y = nf.gelu(x, approximate)
    assert (y[x < -800] == 0).all() and (np.signbit(y) == np.signbit(x)).all()


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_float64_is_that_of_mpmath_in_the_tail_too(approximate):
    formulas = {"none": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
                "tanh": lambda x: x / (1 + mpmath.exp(-2 * mpmath.sqrt(2 / mpmath.pi) * (x + 0.044715 * x**3))),
                "quick": lambda x: x / (1 + mpmath.exp(-1.702 * x))}
    x = np.linspace(-16, 16, 401)
    want = [float(formulas[approximate](mpmath.mpf(v))) for v in x]
    np.testing.assert_allclose(nf.gelu(x, approximate), want, rtol=1e-12)


@pytest.mark.parametrize(("approximate", "ulps"), [("none", 4), ("tanh", 8), ("quick", 100)])
@pytest.mark.parametrize("dy", [1, -3e-3])
def test_slopes_are_right_in_the_tail_too_down_to_the_denormals(approximate, ulps, dy):
    """Of the quick form 1.702 x is rounded before it is an exponent."""
    x = np.concatenate([np.linspace(-70, -2, 50000), [-5.6, -6, -9, -12], [-75 / 1.702]]).astype(np.float32)
    slopes = []
    for dtype in (np.float32, np.float64):
        t = nf.Tensor(x.astype(dtype), requires_grad=True)
        nf.gelu(t, approximate).backward(np.full(x.shape, dy, dtype))
        slopes.append(t.grad)
    assert oracle.ulps(*slopes).max() <= ulps


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("n", [1, 300])
def test_nan_stays_nan_whatever_its_sign(approximate, n):
    t = nf.Tensor(np.tile(np.array([-9, np.copysign(np.nan, -1), np.nan], np.float32), n), requires_grad=True)
    y = nf.gelu(t, approximate)
    y.backward(np.ones(3 * n, np.float32))
    for got in (y.numpy(), t.grad):
        assert (np.isnan(got) == np.isnan(t.numpy())).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_the_ends_of_the_line(approximate, dtype):
    x = np.array([-np.inf, -1e30, -0.0, 0.0, 1e30, np.inf, np.nan], dtype)
    t = nf.Tensor(x, requires_grad=True)
    y = nf.gelu(t, approximate)
    y.sum().backward()
    np.testing.assert_array_equal(y.numpy(), np.maximum(np.where(np.isnan(x), np.nan, x), 0))
    np.testing.assert_allclose(t.grad, [0, 0, 0.5, 0.5, 1, 1, np.nan], rtol=1e-6, atol=1e-44)
