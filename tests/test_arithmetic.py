"""The operators of a Tensor against float64 finite differences, and their dtypes."""
import numpy as np
import pytest

from numformer.ops import arithmetic as ar
from numformer.ops.linear import linear
from numformer.tensor import Tensor

rng = np.random.default_rng(7)


def check(f, *shapes, positive=False, step=1e-6):
    """The gradients of sum(weights * f(*arrays)) against central differences, in float64; and float32 stays float32."""
    arrays = [np.asarray(rng.standard_normal(s)) for s in shapes]
    if positive:
        arrays = [np.asarray(np.abs(a) + 0.5) for a in arrays]
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    y = f(*tensors)
    weights = rng.standard_normal(y.shape)
    y.backward(weights)
    for a, t in zip(arrays, tensors):
        numeric = np.zeros_like(a)
        for i in np.ndindex(a.shape):
            before = a[i]
            a[i] = before + step
            up = (weights * f(*[Tensor(b) for b in arrays]).data).sum()
            a[i] = before - step
            numeric[i] = ((up - (weights * f(*[Tensor(b) for b in arrays]).data).sum()) / (2 * step))
            a[i] = before
        np.testing.assert_allclose(t.grad, numeric, rtol=1e-6, atol=1e-7)
    single = [Tensor(a.astype(np.float32), requires_grad=True) for a in arrays]
    y = f(*single)
    assert y.dtype == np.float32
    y.backward(np.ones(y.shape))
    assert all(t.grad.dtype == np.float32 for t in single)


BROADCASTS = [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((2, 3, 4), (3, 1)), ((), (3,)), ((1,), (2, 3))]


def test_the_gradient_of_what_was_broadcast_over_many_rows_keeps_its_digits():
    x = Tensor(np.random.default_rng(0).standard_normal((100000, 6)).astype(np.float32) + 1)
    scale = Tensor(np.ones(6, np.float32), requires_grad=True)
    (x * scale).sum().backward()
    np.testing.assert_allclose(scale.grad, x.data.astype(float).sum(0), rtol=4e-7)      # by NumPy's own sum 5e-6


@pytest.mark.parametrize("shapes", BROADCASTS)
@pytest.mark.parametrize("op", [ar.add, ar.subtract, ar.multiply, ar.maximum, ar.minimum], ids=lambda f: f.__name__)
def test_two_operands_broadcast(op, shapes):
    check(op, *shapes)


@pytest.mark.parametrize("shapes", BROADCASTS)
def test_divide_broadcasts(shapes):
    check(ar.divide, *shapes, positive=True)


@pytest.mark.parametrize("shapes", BROADCASTS)
def test_where_broadcasts(shapes):
    mask = rng.random(np.broadcast_shapes(*shapes)) < 0.5
    check(lambda a, b: ar.where(mask, a, b), *shapes)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5)),
                                    ((2, 3, 4), (4,)), ((4,), (2, 4, 5)), ((3, 4), (2, 4, 5)), ((2, 3, 4), (2, 4, 5)),
                                    ((2, 1, 3, 4), (3, 4, 2)), ((1, 3, 4), (2, 4, 1)), ((3, 0), (0, 2)),
                                    ((0, 4), (4, 2)), ((0, 2, 3), (3, 2)), ((0, 2, 3), (0, 3, 2))])
def test_matrices_are_multiplied_as_by_numpy(shapes):
    check(ar.matmul, *shapes)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    want = a.astype(float) @ b
    for y in (Tensor(a) @ Tensor(b), Tensor(a) @ b, a @ Tensor(b)):
        assert type(y) is Tensor and y.dtype == np.float32 and y.shape == want.shape
        np.testing.assert_allclose(y.data, want, rtol=1e-6, atol=1e-6)


def test_a_product_of_matrices_has_the_bits_of_linear_in_any_layout():
    a, b = rng.standard_normal((2, 40, 70)).astype(np.float32), rng.standard_normal((70, 33)).astype(np.float32)
    want = linear(a, b.T)
    for x, y in ((a, b), (np.asfortranarray(a), np.asfortranarray(b)), (a[::-1][::-1], np.repeat(b, 2, 1)[:, ::2])):
        np.testing.assert_array_equal((Tensor(x) @ y).data, want)
    np.testing.assert_array_equal((Tensor(a[0, 3]) @ b).data, want[0, 3])
    np.testing.assert_array_equal((Tensor(a) @ b[None].repeat(2, 0)).data, want)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((4,), (3,)), ((2, 3, 4), (3, 4, 5)), ((), (3,)), ((3, 4), ())])
def test_matrices_that_do_not_fit_are_refused(shapes):
    a, b = (np.ones(s, np.float32) for s in shapes)
    with pytest.raises(ValueError, match=r"matmul: .*got shapes \(") as error:
        Tensor(a) @ b
    assert f"{a.shape} and {b.shape}" in str(error.value)
    with pytest.raises(TypeError, match="matmul: operands must have the same dtype"):
        Tensor(np.ones((2, 2), np.float32)) @ np.ones((2, 2))
    with pytest.raises(TypeError, match="matmul: operands must be float32 or float64, got float16"):
        Tensor(np.ones((2, 2), np.float16)) @ np.ones((2, 2), np.float16)


@pytest.mark.parametrize("op", [ar.negative, ar.absolute, ar.exp, ar.tanh, ar.sigmoid, ar.log_sigmoid,
                                lambda x: ar.clip(x, -0.5, 0.5), lambda x: ar.clip(x, None, 0.25),
                                lambda x: x**2, lambda x: x**3, lambda x: 1 - 2 * x, lambda x: x + 1,
                                lambda x: x * np.float64(2)])
def test_one_operand(op):
    check(op, (3, 5))
    check(op, ())


@pytest.mark.parametrize("op", [ar.log, ar.sqrt, lambda x: x**-0.5, lambda x: x**1.5, lambda x: 2 / x, lambda x: x / 3])
def test_one_positive_operand(op):
    check(op, (3, 5), positive=True)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("op", [ar.sum, ar.mean, ar.amax], ids=lambda f: f.__name__)
def test_reductions(op, axis, keepdims):
    check(lambda x: op(x, axis=axis, keepdims=keepdims), (2, 3, 4))


INDEXES = [0, -1, slice(1, 3), (slice(None), 2), (Ellipsis, slice(None, None, 2)), (0, slice(None), 1), None,
           np.array([0, 2, 0, 0]), (np.array([0, 1, 1]), np.array([2, 2, 2])),
           (slice(None), np.array([[0, 1], [1, 1]])),
           np.array([True, False, True, False])]


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_indexing(index):
    check(lambda x: x[index], (4, 3, 5))


@pytest.mark.parametrize("f", [
    lambda x: x.reshape(6, 4), lambda x: x.reshape((3, -1)), lambda x: x.transpose(), lambda x: x.transpose(2, 0, 1),
    lambda x: x.transpose((0, -1, 1)), lambda x: x.T, lambda x: x.swapaxes(0, 1), lambda x: x.unsqueeze(1).squeeze(1),
    lambda x: x[:, :1].squeeze(), lambda x: x.take_along_axis(np.array([[[0, 3, 3]], [[1, 1, 1]]]), 2),
    lambda x: x.take_along_axis(np.array([[[2], [0], [1]]] * 2), -1)])
def test_shape_and_selection(f):
    check(f, (2, 3, 4))


def test_joining():
    check(lambda a, b: ar.concatenate([a, b], axis=1), (2, 3), (2, 1))
    check(lambda a, b: ar.concatenate([a, b], axis=-1), (2, 3), (2, 1))
    check(lambda a, b: ar.stack([a, b], axis=1), (2, 3), (2, 3))
    check(lambda a, b: ar.stack([a, b, a], axis=-1), (2, 3), (2, 3))


def test_gradients_agree_with_torch():
    torch = pytest.importorskip("torch")
    a, b = rng.standard_normal((2, 3, 4)), rng.standard_normal((3, 1))
    x, y = (Tensor(v, requires_grad=True) for v in (a, b))
    u, v = (torch.tensor(w, requires_grad=True) for w in (a, b))
    mask = a > 0.3
    ours = ar.where(mask, (x * y).tanh() / (1 + x.abs()), ar.maximum(x, y) - y**2).mean(axis=-1).sum()
    theirs = torch.where(torch.tensor(mask), (u * v).tanh() / (1 + u.abs()), torch.maximum(u, v) - v**2).mean(-1).sum()
    ours.backward()
    theirs.backward()
    np.testing.assert_allclose(ours.item(), theirs.item(), rtol=1e-12)
    np.testing.assert_allclose(x.grad, u.grad, rtol=1e-10)
    np.testing.assert_allclose(y.grad, v.grad, rtol=1e-10)


def test_nan_in_a_slot_that_is_not_selected_goes_nowhere():
    x = Tensor(np.array([1.0, np.nan, 2.0]), requires_grad=True)
    keep = np.array([True, False, True])
    ar.where(keep, x * x, 0.0).sum().backward()
    assert np.isnan(x.grad[1])          # 0 * nan: the product itself is not masked ...
    x.grad = None
    y = ar.where(keep, x, 0.0)
    (y * y).sum().backward()            # ... so the mask goes in front
    np.testing.assert_array_equal(x.grad, [2.0, 0.0, 4.0])
    x.grad = None
    (x[keep] ** 2).sum().backward()
    np.testing.assert_array_equal(x.grad, [2.0, 0.0, 4.0])


def test_extremes_of_the_sigmoids():
    x = Tensor(np.array([-1e4, 0.0, 1e4], np.float32), requires_grad=True)
    np.testing.assert_array_equal(x.sigmoid().data, np.float32([0, 0.5, 1]))
    y = x.log_sigmoid()
    np.testing.assert_allclose(y.data, [-1e4, -np.log(2), 0], rtol=1e-6)
    y.backward(np.ones(3))
    np.testing.assert_array_equal(x.grad, np.float32([1, 0.5, 0]))


def test_numbers_and_integer_arrays_take_the_dtype_of_the_tensor():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    for y in (x * 2, 2.5 - x, x / np.float64(3), np.arange(3) * x, x + np.array([True, False, True]), 1 / x, x**2,
              x ** np.float64(0.5), ar.where(x > 0, x, 0.0), ar.clip(x, -1.0, np.float64(1)), ar.maximum(x, 0)):
        assert y.dtype == np.float32


def test_integers_take_the_dtype_of_a_float_beside_them():
    for x in (np.arange(4), Tensor(np.arange(4))):
        np.testing.assert_array_equal(Tensor(ar.clip(x, 0.5, 2.5)).data, [0.5, 1, 2, 2.5])
        np.testing.assert_array_equal(Tensor(ar.clip(x, 1, 2)).data, [1, 1, 2, 2])
        assert Tensor(ar.clip(x, 1, 2)).dtype.kind == "i"
    for half in (0.5, np.float64(0.5), np.full(4, 0.5)):
        np.testing.assert_array_equal((Tensor(np.array([0, 1, 4, 9])) ** half).data, [0, 1, 2, 3])


def test_bfloat16_stays_so():
    x = Tensor(np.array([0.25, 1, 4], pytest.importorskip("ml_dtypes").bfloat16), requires_grad=True)
    for y, slope in ((x**0.5, [1, 0.5, 0.25]), (x**2, [0.5, 2, 8]), (ar.clip(x, 0.5, 2), [0, 1, 0])):
        x.grad = None
        y.sum().backward()
        assert y.dtype == x.dtype == x.grad.dtype and x.grad.tolist() == slope


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_sixteen_bits_are_added_up_in_float32(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    many, one = Tensor(np.ones((4096, 2), dtype)), Tensor(np.ones(2, dtype), requires_grad=True)
    assert many.sum(0).data.tolist() == [4096, 4096] and many.mean().data == 1 and many.sum().dtype == dtype
    taken = np.zeros((4096, 2), int)
    for y in (many * one, one.reshape(1, 2)[taken[:, 0]], one.reshape(1, 2).take_along_axis(taken, 0)):
        one.grad = None
        y.sum().backward()
        assert one.grad.dtype == dtype and one.grad.tolist() == [4096, 4096]
    flat = Tensor(np.ones(4096, dtype), requires_grad=True)
    flat.max().backward()
    assert (flat.grad == 1 / 4096).all()


@pytest.mark.parametrize("other", [None, 1j, "2", np.array([None, 1.0, 2.0]), np.array("now", "datetime64[s]")])
def test_what_is_no_real_number_is_an_error(other):
    x = Tensor(np.ones(3, np.float32))
    for op in (ar.add, ar.multiply, ar.maximum, lambda a, b: ar.where(x.data > 0, a, b)):
        for a, b in ((x, other), (other, x)):
            with pytest.raises(TypeError, match=r"operands must be real numbers .*, got "):
                op(a, b)


@pytest.mark.parametrize("exponent", [0, 1, 2, np.float32(0), np.array([0.0, 1.0, 2.0])])
def test_powers_of_zero_have_the_gradient_of_a_polynomial(exponent):
    x = Tensor(np.zeros(3), requires_grad=True)
    (x**exponent).sum().backward()
    np.testing.assert_array_equal(x.grad, np.broadcast_to(np.asarray(exponent) == 1, 3))


def test_bounds_with_a_gradient_are_refused():
    x, bound = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    with pytest.raises(TypeError, match=r"clip: the bounds must be .*; use minimum and maximum"):
        ar.clip(x, None, bound)
    assert ar.clip(x, bound.detach(), None).requires_grad


def test_two_float_dtypes_are_an_error():
    with pytest.raises(TypeError, match=r"float32 and float64.*astype"):
        Tensor(np.ones(3, np.float32)) * np.ones(3)
    with pytest.raises(TypeError, match="same dtype"):
        ar.concatenate([Tensor(np.ones(3, np.float32)), np.ones(3)])


def test_an_array_beside_a_tensor_gives_a_tensor():
    x, a = Tensor(np.ones(3), requires_grad=True), np.arange(3.0)
    for y in (a + x, a * x, a - x, a / x):
        assert type(y) is Tensor and y.requires_grad
    np.testing.assert_array_equal((a - x).data, a - 1)


def test_comparisons_give_arrays_and_tensors_are_keys():
    x = Tensor(np.array([1.0, 2.0]))
    for y in (x < 1.5, x <= x, x > 1, 1 < x, x >= 0, x == x, x != 1):
        assert type(y) is np.ndarray and y.dtype == bool
    assert {x: 1}[x] == 1


def test_arrays_in_arrays_out():
    assert type(ar.where(np.array([True]), np.ones(1), 0.0)) is np.ndarray
    assert type(ar.exp(np.ones(2))) is np.ndarray


def test_size_zero():
    x = Tensor(np.ones((0, 3)), requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.shape == (0, 3)


def test_an_exponent_with_a_gradient_is_refused():
    with pytest.raises(TypeError, match="exponent"):
        Tensor(np.ones(2)) ** Tensor(np.ones(2), requires_grad=True)


def test_take_along_no_axis_and_clip_take_what_numpys_take():
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    y = x.take_along_axis(np.array([4, 4, 1]), None)
    y.backward(np.array([1.0, 2.0, 3.0]))
    assert y.data.tolist() == [4, 4, 1] and x.grad.tolist() == [[0, 3, 0], [0, 3, 0]]
    assert ar.take_along_axis([[3, 1]], [[1]]).tolist() == [[1]] and ar.clip([0.5, 9.0], high=1).tolist() == [0.5, 1]
