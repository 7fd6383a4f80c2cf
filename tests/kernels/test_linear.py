"""Matrix products: linear, grouped_linear, and the plain product beneath their gradients."""
import itertools

import numpy as np
import pytest

import numformer as nf
from numformer import _core
from numformer.ops.linear import grouped_linear_backward, grouped_linear_forward, linear_backward, linear_forward
from tests import oracle
from tests.gradients import check_gradients, normal

# around the edges of tiles (6, 14 rows; 8, 16, 32 columns), of few rows, of blocks of rows (96, 224), of K (256, 384)
SIZES = [(1, 1, 1), (1, 7, 3), (2, 16, 8), (3, 17, 9), (5, 33, 31), (6, 15, 64), (7, 31, 16), (8, 65, 40), (14, 64, 97),
         (15, 97, 385), (29, 40, 383), (1, 63, 384), (4, 80, 769), (97, 111, 59), (3, 600, 20), (64, 530, 33),
         (10, 20, 255), (98, 35, 257), (230, 70, 513)]
ACTIVATIONS = [None, "relu", "silu", "gelu", "gelu_tanh", "gelu_quick"]


def act(name, z):
    if name is None:
        return z
    if name == "relu":
        return np.maximum(z, 0)
    if name == "silu":
        return z / (1 + np.exp(-z))
    return oracle.gelu(z, {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}[name])


def bound(k, dtype):
    return (min(k, 384) + 4) * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m, n, k", SIZES)
def test_linear_is_the_product_within_its_error_bound(m, n, k, dtype, threads):
    x, w = normal(m, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype)
    want = x.astype(np.longdouble) @ w.astype(np.longdouble).T
    limit = bound(k, dtype) * (np.abs(x.astype(float)) @ np.abs(w.astype(float)).T)
    for count in (1, 2):
        threads(count)
        y = nf.linear(x, w)
        assert y.dtype == dtype and y.shape == (m, n)
        assert (np.abs(y - want) <= limit).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 19, 8), (40, 70, 390)])
def test_the_epilogue_is_bias_then_activation_then_residual(m, n, k, activation):
    x, w, bias, residual = normal(m, k), normal(n, k, seed=1) / np.sqrt(k), normal(n, seed=2), normal(m, n, seed=3)
    for b in (None, bias):
        for r in (None, residual):
            y = nf.linear(x, w, b, activation=activation, residual=r)
            want = act(activation, x @ w.T + (0 if b is None else b)) + (0 if r is None else r)
            np.testing.assert_allclose(y, want, rtol=1e-11, atol=1e-12)
            z = nf.linear(x, w, b)
            assert (y == nf.linear(x, w, b, activation=activation, residual=r, out=np.full_like(z, np.nan))).all()


def test_the_fused_activation_has_the_bits_of_the_activation_alone():
    x, w, bias = (normal(*shape, seed=i, dtype=np.float32) for i, shape in enumerate([(50, 70), (90, 70), (90,)]))
    z = nf.linear(x, w, bias)
    assert (nf.linear(x, w, bias, activation="gelu") == nf.gelu(z)).all()
    assert (nf.linear(x, w, bias, activation="gelu_tanh") == nf.gelu(z, "tanh")).all()
    assert (nf.linear(x, w, bias, activation="silu") == nf.silu(z)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 9, 256, 257, 385, pytest.param(1200, marks=pytest.mark.native)])
def test_a_row_has_the_same_bits_alone_in_a_batch_on_any_threads_and_by_any_strides(k, dtype, threads):
    x, w = normal(100, k, dtype=dtype), normal(75, k, seed=1, dtype=dtype)
    whole = nf.linear(x, w)
    wide = np.zeros((200, 2 * k), dtype)
    wide[::2, :k] = x
    for count in (1, 2, 3):
        threads(count)
        assert (nf.linear(x, w) == whole).all()
        for rows in (1, 2, 3, 4, 5, 6, 7, 13, 15):
            assert (nf.linear(x[11:11 + rows], w) == whole[11:11 + rows]).all()
            assert (nf.linear(x[11:11 + rows], w[20:53]) == whole[11:11 + rows, 20:53]).all()
            assert (nf.linear(np.asfortranarray(x[:rows]), np.asfortranarray(w)) == whole[:rows]).all()
        assert (nf.linear(wide[::2, :k], w) == whole).all()
        assert (nf.linear(x[::-1], w[::-1]) == whole[::-1, ::-1]).all()
        assert (nf.linear(np.asfortranarray(x), np.asfortranarray(w)) == whole).all()
        assert (nf.linear(x[:, ::-1], w[:, ::-1]) == nf.linear(x[:, ::-1].copy(), w[:, ::-1].copy())).all()
        assert (nf.linear(x.reshape(5, 20, k), w) == whole.reshape(5, 20, 75)).all()
        assert (nf.linear(x.reshape(5, 20, k).swapaxes(0, 1), w) == whole.reshape(5, 20, 75).swapaxes(0, 1)).all()
        assert (nf.linear(x[3], w) == whole[3]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [17, 256, 600])
def test_blocks_of_rows_whose_weight_is_packed_once_have_the_bits_of_each_row_alone(k, dtype, threads):
    x, w, bias = normal(470, k, dtype=dtype), normal(150, k, seed=1, dtype=dtype), normal(150, seed=2, dtype=dtype)
    for count in (1, 2):
        threads(count)
        whole = nf.linear(x, w, bias, activation="relu")
        for i in (0, 95, 96, 223, 224, 469):
            assert (nf.linear(x[i], w, bias, activation="relu") == whole[i]).all()
        assert (nf.linear(np.asfortranarray(x), np.asfortranarray(w), bias, activation="relu") == whole).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows, k", [(150, 800), pytest.param(300, 800, marks=pytest.mark.native)])
def test_rows_that_are_packed_once_for_all_columns_have_the_bits_of_each_row_alone(rows, k, dtype, threads):
    n = 2 * rows + 37
    x, w, bias = normal(rows, k, dtype=dtype), normal(n, k, seed=1, dtype=dtype), normal(n, seed=2, dtype=dtype)
    for count in (1, 2):
        threads(count)
        whole = nf.linear(x, w, bias, activation="relu")
        for i in (0, 13, 14, rows - 1):
            assert (nf.linear(x[i], w, bias, activation="relu") == whole[i]).all()
        assert (nf.linear(np.asfortranarray(x), np.asfortranarray(w), bias, activation="relu") == whole).all()


@pytest.mark.parametrize("dtype, n", [(np.float32, 1024), (np.float64, 512)])
@pytest.mark.parametrize("m", [15, pytest.param(470, marks=pytest.mark.native)])
def test_a_result_whose_rows_lie_4_kb_apart_has_the_bits_of_its_columns(m, dtype, n, threads):
    x, w, bias = normal(m, 800, dtype=dtype), normal(n, 800, seed=1, dtype=dtype), normal(n, seed=2, dtype=dtype)
    for count in (1, 2):
        threads(count)
        whole = nf.linear(x, w, bias, activation="relu")
        for begin, end in ((0, 40), (300, 333), (n - 17, n)):
            assert (nf.linear(x, w[begin:end], bias[begin:end], activation="relu") == whole[:, begin:end]).all()
        added = np.ones((m, n), dtype)
        _core.product(x, w.T, added, True)
        beside = np.ones((m, n - 3), dtype)
        _core.product(x, w[:-3].T, beside, True)
        assert (beside == added[:, :-3]).all()


@pytest.mark.native
def test_a_product_too_large_to_be_packed_at_once_has_the_bits_of_its_columns():
    x, w = normal(226, 38_200), normal(440, 38_200, seed=1)     # packed: 67.2 MB
    whole = nf.linear(x, w)
    for begin in (0, 200, 377):
        assert (nf.linear(x[100:103], w[begin:begin + 63]) == whole[100:103, begin:begin + 63]).all()
    assert (nf.linear(x[0], w) == whole[0]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m, n, k", SIZES)
def test_products_of_every_layout_have_one_value(m, n, k, dtype):
    a, b = normal(m, k, dtype=dtype), normal(k, n, seed=1, dtype=dtype)
    want = _core.product(a, b, None, False)
    np.testing.assert_allclose(want, a.astype(float) @ b.astype(float), rtol=1e-4, atol=1e-4)
    for x in (a, np.asfortranarray(a)):
        for y in (b, np.asfortranarray(b)):
            assert (_core.product(x, y, None, False) == want).all()
    total = normal(m, n, seed=2, dtype=dtype)
    before = total.copy()
    assert _core.product(a, b, total, True) is total
    np.testing.assert_allclose(total, before + want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m, n, k", [(0, 3, 4), (3, 0, 4), (0, 0, 0), (9, 0, 0)])
def test_empty_axes_give_empty_results(m, n, k):
    assert nf.linear(np.zeros((m, k)), np.zeros((n, k))).shape == (m, n)


def test_a_sum_over_nothing_is_zero_and_the_epilogue_still_runs():
    bias = normal(5)
    assert (nf.linear(np.zeros((9, 0)), np.zeros((5, 0)), bias) == bias).all()
    assert (nf.linear(np.zeros((2, 0)), np.zeros((5, 0)), bias, activation="relu") == np.maximum(bias, 0)).all()


def test_nothing_is_written_beside_the_result():
    for m, n, k in SIZES:
        x, w = normal(m, k, dtype=np.float32), normal(n, k, seed=1, dtype=np.float32)
        guarded = np.full((m + 2, n), np.float32(7))
        nf.linear(x, w, activation="silu", out=guarded[1:-1])
        assert (guarded[[0, -1]] == 7).all() and (guarded[1:-1] == nf.linear(x, w, activation="silu")).all()


def test_nan_and_inf_stay_in_their_row_and_column():
    x, w = normal(20, 40), normal(30, 40, seed=1)
    clean = nf.linear(x, w)
    x[3, 5], w[7, 2] = np.nan, np.inf
    y = nf.linear(x, w)
    assert np.isnan(y[3]).all() and not np.isfinite(y[:, 7]).any()
    others = np.delete(np.delete(y, 3, 0), 7, 1)
    assert (others == np.delete(np.delete(clean, 3, 0), 7, 1)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,)])
def test_gradients_match_finite_differences(activation, shape):
    residual = normal(*shape[:-1], 6, seed=4)
    check_gradients(lambda x, w, b, r: nf.linear(x, w, b, activation=activation, residual=r), normal(*shape),
                    normal(6, 5, seed=1), normal(6, seed=2), residual, atol=1e-6)
    check_gradients(lambda x, w: nf.linear(x, w), normal(*shape), normal(6, 5, seed=1), atol=1e-7)


def test_gradients_that_are_not_wanted_are_not_made():
    x, w = normal(4, 5), normal(6, 5, seed=1)
    _, saved = linear_forward(x, w, wanted=(False, True))
    dx, dw, *_ = linear_backward(normal(4, 6), saved)
    assert dx is None and dw.shape == w.shape
    weight = nf.Tensor(w, requires_grad=True)
    nf.linear(x, weight).sum().backward()
    np.testing.assert_allclose(weight.grad, np.broadcast_to(x.sum(0), (6, 5)))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-4), (np.float64, 1e-11)])
def test_torch_agrees(dtype, tolerance):
    torch = pytest.importorskip("torch")
    arrays = [normal(2, 70, 65, dtype=dtype), normal(90, 65, seed=1, dtype=dtype), normal(90, seed=2, dtype=dtype)]
    dy = normal(2, 70, 90, seed=3, dtype=dtype)
    ours = [nf.Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    nf.linear(*ours, activation="gelu").backward(dy)
    torch.nn.functional.gelu(torch.nn.functional.linear(*theirs)).backward(torch.tensor(dy))
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=tolerance, atol=tolerance * 10)


def test_gradients_do_not_depend_on_threads(threads):
    x, w, dy = (normal(*shape, dtype=np.float32) for shape in [(300, 65), (90, 65), (300, 90)])
    _, saved = linear_forward(x, w, normal(90, dtype=np.float32), activation="gelu")
    threads(2)
    want = linear_backward(dy, saved)
    threads(1)
    for a, b in zip(linear_backward(dy, saved)[:3], want):
        assert (a == b).all()


# ---- by group ----

OFFSETS = [[0, 5], [0, 0, 7, 7, 30, 31], [0, 1, 2, 3, 4], [0, 0], [0, 64, 200]]


@pytest.mark.parametrize("offsets", OFFSETS)
def test_each_group_has_the_bits_of_linear_with_its_weight(offsets, threads):
    offsets = np.array(offsets)
    experts, rows = len(offsets) - 1, offsets[-1]
    x, w, bias = normal(rows, 33), normal(experts, 20, 33, seed=1), normal(experts, 20, seed=2)
    for count in (1, 2):
        threads(count)
        y = nf.grouped_linear(x, w, offsets, bias)
        for e, (i, j) in enumerate(itertools.pairwise(offsets)):
            assert (y[i:j] == nf.linear(x[i:j], w[e], bias[e])).all()


@pytest.mark.parametrize("offsets", OFFSETS[:4])
def test_gradients_by_group_match_finite_differences_and_are_0_for_empty_groups(offsets):
    offsets = np.array(offsets)
    experts, rows = len(offsets) - 1, offsets[-1]
    x, w, bias = normal(rows, 4), normal(experts, 3, 4, seed=1), normal(experts, 3, seed=2)
    if rows:
        check_gradients(lambda x, w, b: nf.grouped_linear(x, w, offsets, b), x, w, bias, atol=1e-7)
    _, saved = grouped_linear_forward(x, w, offsets, bias)
    dx, dw, _, db = grouped_linear_backward(normal(rows, 3), saved)
    empty = offsets[:-1] == offsets[1:]
    assert dx.shape == x.shape and not dw[empty].any() and not db[empty].any()


# ---- errors ----

def test_bad_arguments_are_named():
    x, w = normal(3, 4), normal(5, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \(N, 4\) as x has 4 features, got \(4, 5\)"):
        nf.linear(x, w.T)
    with pytest.raises(ValueError, match=r"linear: weight must have 2 dimensions"):
        nf.linear(x, w[0])
    with pytest.raises(ValueError, match=r"linear: x must have at least one dimension"):
        nf.linear(np.float64(3), w)
    with pytest.raises(ValueError, match=r"linear: bias must have shape \(5,\), got \(4,\)"):
        nf.linear(x, w, x[0])
    with pytest.raises(ValueError, match=r"linear: residual must have shape \(3, 5\), got \(3, 4\)"):
        nf.linear(x, w, residual=x)
    with pytest.raises(TypeError, match=r"linear: weight must be float64, got float32; convert"):
        nf.linear(x, w.astype(np.float32))
    with pytest.raises(TypeError, match="linear: x must be float32 or float64, got int64"):
        nf.linear(x.astype(int), w)
    with pytest.raises(TypeError, match="linear: bias must be an array, got list"):
        nf.linear(x, w, [[1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match=r"linear: activation must be None, .* got 'tanh'"):
        nf.linear(x, w, activation="tanh")
    with pytest.raises(ValueError, match="out must not share memory"):
        square = normal(4, 4)
        nf.linear(square, square, out=square)
    with pytest.raises(ValueError, match=r"out must have shape \(3, 5\)"):
        nf.linear(x, w, out=np.empty((5, 3)))
    with pytest.raises(ValueError, match="out must be writeable and C-contiguous"):
        nf.linear(x, w, out=np.empty((5, 3)).T)


def test_offsets_may_be_integers_of_any_kind():
    x, w = normal(6, 4), normal(2, 5, 4)
    want = nf.grouped_linear(x, w, np.array([0, 2, 6]))
    for dtype in (np.int32, np.uint16, ">i8"):
        assert (nf.grouped_linear(x, w, np.array([0, 2, 6], dtype)) == want).all()


def test_bad_groups_are_named():
    x, w = normal(6, 4), normal(2, 5, 4)
    for offsets in ([0, 3, 5], [1, 3, 6], [0, 7, 6], [0, -1, 6]):
        with pytest.raises(ValueError, match="offsets must be contiguous and ascend from 0 to the number of rows, 6"):
            nf.grouped_linear(x, w, np.array(offsets))
    with pytest.raises(ValueError, match=r"offsets must have shape \(3,\), got \(2,\)"):
        nf.grouped_linear(x, w, np.array([0, 6]))
    with pytest.raises(TypeError, match="offsets must be int64, got float64"):
        nf.grouped_linear(x, w, np.array([0, 3, 6.0]))
    with pytest.raises(ValueError, match=r"weight must have shape \(E, N, 4\) as x has 4 features, got \(2, 4, 5\)"):
        nf.grouped_linear(x, w.swapaxes(1, 2), np.array([0, 3, 6]))


def test_sizes_beyond_counting_are_refused_before_anything_is_read():
    def zeros(*shape):      # without memory: strides of 0
        return np.broadcast_to(np.float32(0), shape)

    def columns(rows, count):       # read as it is, not copied
        return np.broadcast_to(np.zeros((rows, 1), np.float32), (rows, count))

    huge = 1 << 34
    for rows in (1, 5, 300):
        with pytest.raises(ValueError, match=rf"linear: a product may have at most 2\^33 .* {rows}, 3 and {huge};"):
            nf.linear(columns(rows, huge), columns(3, huge))
    for accumulate in (False, True):
        with pytest.raises(ValueError, match=r"product: a product may have at most 2\^33 rows, columns and terms"):
            _core.product(zeros(huge, 1), zeros(1, 3), None, accumulate)
        with pytest.raises(ValueError, match=r"product: a product may have at most 2\^33 rows, columns and terms"):
            _core.product(columns(5, huge), columns(3, huge).T, None, accumulate)
        with pytest.raises(ValueError, match="too big"):
            _core.product(zeros(1 << 32, 1), zeros(1, 1 << 32), None, accumulate)
    with pytest.raises(ValueError, match="too big"):
        nf.linear(zeros(1 << 32, 1), zeros(1 << 32, 1))
    with pytest.raises(MemoryError):
        nf.linear(zeros(1 << 30, 1), zeros(1 << 30, 1))
    with pytest.raises(ValueError, match=r"grouped_linear: a product may have at most 2\^33"):
        nf.grouped_linear(zeros(huge, 1), np.zeros((1, 3, 1), np.float32), np.array([0, huge]))
    with pytest.raises(ValueError, match=r"grouped_outer: a product may have at most 2\^33"):
        _core.grouped_outer(zeros(huge, 1), zeros(huge, 1), np.array([0, huge]))
