import numpy as np
import pytest

import numformer as nf
from numformer import _core
from tests import oracle
from tests.gradients import check_gradients, normal

SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 97, 1000]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, rtol", [(np.float32, 2e-6), (np.float64, 1e-14)])
def test_matches_the_float64_formula(n, dtype, rtol):
    x = 4 * normal(5, n, dtype=dtype)
    np.testing.assert_allclose(nf.softmax(x), oracle.softmax(x.astype(float)), rtol=2 * rtol)
    np.testing.assert_allclose(nf.log_softmax(x), oracle.log_softmax(x), rtol=rtol, atol=8 * rtol)
    assert nf.softmax(x).dtype == nf.log_softmax(x).dtype == dtype


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis(axis):
    x = normal(3, 4, 5)
    last = np.moveaxis(x, axis, -1)
    np.testing.assert_allclose(nf.softmax(x, axis), np.moveaxis(oracle.softmax(last), -1, axis), rtol=1e-14)
    np.testing.assert_allclose(nf.log_softmax(x, axis), np.moveaxis(oracle.log_softmax(last), -1, axis), rtol=1e-13)


def test_rows_far_from_zero_neither_overflow_nor_vanish():
    for x in ([1000, 1000], [-1e30, 0], [3e38, -3e38], [-1e4, -1e4]):
        x = np.array(x, np.float32)
        np.testing.assert_allclose(nf.softmax(x), oracle.softmax(x.astype(float)), rtol=1e-6)
        assert not np.isnan(nf.log_softmax(x)).any()


@pytest.mark.parametrize(("dtype", "least"), [(np.float32, -110), (np.float64, -760)])
def test_probabilities_are_right_down_to_the_denormals(dtype, least):
    x = np.linspace(least, 0, 999).astype(dtype)
    want = np.exp(x.astype(np.longdouble))
    want /= want.sum()
    tiny = 2 * float(np.finfo(dtype).smallest_subnormal)
    t = nf.Tensor(x, requires_grad=True)
    y = nf.softmax(t)
    np.testing.assert_allclose(y.numpy(), want, rtol=20 * np.finfo(dtype).eps, atol=tiny)
    dy = np.cos(np.arange(999)).astype(dtype)
    y.backward(dy)
    want = want * (dy - (want * dy).sum())
    np.testing.assert_allclose(t.grad, want, rtol=2000 * np.finfo(dtype).eps, atol=2 * tiny)


def test_minus_infinity_takes_nothing_and_a_row_of_it_gives_zero():
    x = np.array([[0, -np.inf, 0], [-np.inf] * 3], np.float32)
    np.testing.assert_array_equal(nf.softmax(x), [[0.5, 0, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(nf.log_softmax(x), [[np.log(0.5), -np.inf, np.log(0.5)], [-np.inf] * 3])
    for op in (nf.softmax, nf.log_softmax):
        t = nf.Tensor(x, requires_grad=True)
        op(t).backward(normal(2, 3, dtype=np.float32))
        assert np.isfinite(t.grad).all() and (t.grad[1] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 5, 70, 96])
def test_nan_and_infinity_spoil_their_own_row_alone(bad, at):
    x = normal(3, 97, dtype=np.float32)
    x[1, at] = bad
    for op in (nf.softmax, nf.log_softmax):
        y = op(x)
        assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("shape, axis", [((2, 1), -1), ((3, 5), -1), ((2, 17), -1), ((2, 3, 4), 1)])
def test_gradients_match_finite_differences(shape, axis):
    check_gradients(lambda x: nf.softmax(x, axis), normal(*shape))
    check_gradients(lambda x: nf.log_softmax(x, axis), normal(*shape))


@pytest.mark.parametrize("op", [nf.softmax, nf.log_softmax])
def test_bits_do_not_depend_on_threads_strides_or_company(op, threads):
    x, dy = normal(120, 323, dtype=np.float32), normal(120, 323, dtype=np.float32, seed=1)

    def grad():
        t = nf.Tensor(x, requires_grad=True)
        op(t).backward(dy)
        return t.grad

    whole, slopes = op(x), grad()
    threads(1)
    assert (grad() == slopes).all()
    assert (op(x[7]) == whole[7]).all()
    assert (op(x[5::3]) == whole[5::3]).all()
    assert (op(np.asfortranarray(x)) == whole).all()
    assert (op(x.T, axis=0) == whole.T).all()


def test_empty_arrays_give_empty_results():
    for shape in ((0, 4), (4, 0), (0,)):
        assert nf.softmax(np.zeros(shape)).shape == nf.log_softmax(np.zeros(shape)).shape == shape


@pytest.mark.parametrize("op", [nf.softmax, nf.log_softmax])
def test_bad_inputs_are_named(op):
    with pytest.raises(ValueError, match=r"axis must be within -2 .. 1"):
        op(np.zeros((2, 3)), axis=2)
    for axis in (1.0, -1.0, None, "last"):
        with pytest.raises(TypeError, match=f"{op.__name__}: axis must be an integer, got {axis!r}"):
            op(np.zeros((2, 3)), axis=axis)
    for axis in (-1, 0):
        with pytest.raises(ValueError, match=rf"{op.__name__}: x must have at least one dimension, got \(\)"):
            op(np.zeros(()), axis)
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        op(np.zeros(3, int))
    with pytest.raises(TypeError, match="float16"):
        op(np.zeros(3, np.float16))


@pytest.mark.parametrize("dtype, least", [(np.float32, -110), (np.float64, -760)])
@pytest.mark.parametrize("n", [1003, 997])
def test_the_exponential_of_rows_has_the_bits_of_exp_down_to_the_denormals(n, dtype, least):
    y, dy = np.linspace(least, 40, n).astype(dtype), np.zeros(n, dtype)
    y[0], dy[0] = -np.inf, -1           # dx = dy - exp(y) sum(dy)
    np.testing.assert_array_equal(_core.log_softmax_backward(dy, y)[1:], _core.exp(y)[1:])
    assert (_core.exp(y)[1:] < np.finfo(dtype).tiny).sum() > 10


@pytest.mark.parametrize("function", [nf.softmax, nf.log_softmax])
@pytest.mark.parametrize(("dtype", "power"), [(np.float32, -90), (np.float64, -900)])
def test_the_gradient_of_a_small_gradient_is_as_precise(function, dtype, power):
    small = dtype(2.0) ** power
    dy, dx = normal(4, 100, dtype=dtype, seed=1), []
    for scale in (1, small):
        t = nf.Tensor(3 * normal(4, 100, dtype=dtype), requires_grad=True)
        function(t).backward(dy * scale)
        dx.append(t.grad)
    np.testing.assert_allclose(dx[1] / small, dx[0], rtol=1e-5, atol=1e-6)
