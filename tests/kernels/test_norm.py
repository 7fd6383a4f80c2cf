import numpy as np
import pytest

import numformer as nf
from numformer.ops.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from tests import oracle
from tests.gradients import check_gradients, normal

SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 97, 129, 384]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, rtol", [(np.float32, 3e-6), (np.float64, 1e-13)])
def test_matches_the_float64_formula(n, dtype, rtol):
    x, w, b = normal(5, n, dtype=dtype), normal(n, dtype=dtype, seed=1), normal(n, dtype=dtype, seed=2)
    scale = np.abs(w).max() + 1
    np.testing.assert_allclose(nf.layer_norm(x, w, b), oracle.layer_norm(x, w, b), atol=rtol * scale * 4, rtol=rtol)
    np.testing.assert_allclose(nf.layer_norm(x, w), oracle.layer_norm(x, w, 0), atol=rtol * scale * 4, rtol=rtol)
    np.testing.assert_allclose(nf.rms_norm(x, w), oracle.rms_norm(x, w), rtol=rtol)
    assert nf.layer_norm(x, w, b).dtype == nf.rms_norm(x, w).dtype == dtype


def test_a_large_mean_costs_no_digits_of_the_variance():
    x = (normal(3, 256) + 1e4).astype(np.float32)
    w = np.ones(256, np.float32)
    np.testing.assert_allclose(nf.layer_norm(x, w), oracle.layer_norm(x, w, 0), atol=2e-3)


@pytest.mark.parametrize("rows, n", [(1, 1), (3, 5), (37, 3), (2, 17), (65, 2)])
def test_gradients_match_finite_differences(rows, n):
    x, w, b = normal(rows, n), normal(n, seed=1), normal(n, seed=2)
    check_gradients(lambda x, w, b: nf.layer_norm(x, w, b, eps=0.1), x, w, b, atol=1e-7)
    check_gradients(lambda x, w: nf.layer_norm(x, w, eps=0.1), x, w, atol=1e-7)
    check_gradients(lambda x, w: nf.rms_norm(x, w, eps=0.1), x, w, atol=1e-7)


@pytest.mark.parametrize("rows, n", [(5, 97), (70, 33)])
def test_gradients_of_the_fused_sum_match_finite_differences(rows, n):
    x, r, w, b = normal(2, 5), normal(2, 5, seed=3), normal(5, seed=1), normal(5, seed=2)

    def layer(x, r, w, b):
        y, total = nf.add_layer_norm(x, r, w, b)
        return y * 2 + total

    def rms(x, r, w):
        y, total = nf.add_rms_norm(x, r, w)
        return y * 2 + total

    check_gradients(layer, x, r, w, b, atol=1e-7)
    check_gradients(rms, x, r, w, atol=1e-7)
    x, r, w, b = normal(rows, n), normal(rows, n, seed=3), normal(n, seed=1), normal(n, seed=2)
    y, total = nf.add_layer_norm(x, r, w, b)
    assert (total == x + r).all() and (y == nf.layer_norm(x + r, w, b)).all()
    y, total = nf.add_rms_norm(x, r, w)
    assert (total == x + r).all() and (y == nf.rms_norm(x + r, w)).all()


def test_either_result_of_the_fused_sum_may_go_unused():
    for used in (0, 1):
        x, w = nf.Tensor(normal(2, 5), requires_grad=True), nf.Tensor(normal(5), requires_grad=True)
        nf.add_rms_norm(x, normal(2, 5), w)[used].sum().backward()
        assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("n", [3, 33, 64, 384])
def test_float32_gradients_match_those_of_float64(n):
    x, w, b, dy = (normal(*s, seed=i) for i, s in enumerate([(150, n), (n,), (n,), (150, n)]))
    for forward, backward, operands in [(layer_norm_forward, layer_norm_backward, (x, w, b)),
                                        (rms_norm_forward, rms_norm_backward, (x, w))]:
        exact = backward(dy, forward(*operands)[1])
        single = backward(dy.astype("f"), forward(*[v.astype("f") for v in operands])[1])
        for got, want in zip(single, exact):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_bits_do_not_depend_on_threads_strides_or_company(op, threads):
    function = getattr(nf, op)
    x, w, dy = normal(300, 193, dtype=np.float32), normal(193, dtype=np.float32), normal(300, 193, dtype=np.float32)

    def grads():
        t, v = nf.Tensor(x, requires_grad=True), nf.Tensor(w, requires_grad=True)
        function(t, v).backward(dy)
        return t.grad, v.grad

    whole, slopes = function(x, w), grads()
    threads(1)
    assert all((a == b).all() for a, b in zip(slopes, grads()))
    assert (function(x[7], w) == whole[7]).all()
    assert (function(x[5:200:3], w) == whole[5:200:3]).all()
    assert (function(x[::-1], w) == whole[::-1]).all()
    wide = np.zeros((300, 400), np.float32)
    wide[:, 100:293] = x
    assert (function(wide[:, 100:293], w) == whole).all()
    assert (function(np.asfortranarray(x), w) == whole).all()
    assert (function(x.reshape(20, 15, 193).transpose(1, 0, 2), w) == whole.reshape(20, 15, 193).swapaxes(0, 1)).all()


def test_dy_may_be_broadcast_or_strided():
    x, w = normal(6, 17), normal(17)
    _, saved = layer_norm_forward(x, w, w)
    for dy in (np.broadcast_to(1.0, x.shape), np.broadcast_to(normal(17), x.shape), normal(17, 6).T):
        for got, want in zip(layer_norm_backward(dy, saved), layer_norm_backward(dy.copy(), saved)):
            assert (got == want).all()


def test_empty_arrays_give_empty_results():
    assert nf.layer_norm(np.zeros((0, 4)), np.ones(4)).shape == (0, 4)
    assert nf.rms_norm(np.zeros((3, 0)), np.ones(0)).shape == (3, 0)
    x, w = nf.Tensor(np.zeros((0, 4)), requires_grad=True), nf.Tensor(np.ones(4), requires_grad=True)
    nf.layer_norm(x, w).sum().backward()
    assert (w.grad == 0).all()


def test_gradients_agree_with_torch():
    torch = pytest.importorskip("torch")
    x, w, b, dy = (normal(*s, seed=i) for i, s in enumerate([(2, 9, 40), (40,), (40,), (2, 9, 40)]))
    ours = [nf.Tensor(v, requires_grad=True) for v in (x, w, b)]
    theirs = [torch.tensor(v, requires_grad=True) for v in (x, w, b)]
    y, z = nf.layer_norm(*ours), torch.nn.functional.layer_norm(theirs[0], (40,), *theirs[1:])
    y.backward(dy)
    z.backward(torch.tensor(dy))
    np.testing.assert_allclose(y.numpy(), z.detach().numpy(), rtol=1e-12, atol=1e-12)
    for a, t in zip(ours, theirs):
        np.testing.assert_allclose(a.grad, t.grad.numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op, add", [(nf.layer_norm, nf.add_layer_norm), (nf.rms_norm, nf.add_rms_norm)])
def test_bad_inputs_are_named(op, add):
    x, w = np.zeros((2, 4)), np.ones(4)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        op(x, np.ones(3))
    with pytest.raises(TypeError, match="weight must be float64, got float32"):
        op(x, w.astype(np.float32))
    with pytest.raises(TypeError, match="x must be float32 or float64, got int64"):
        op(np.zeros((2, 4), int), w)
    with pytest.raises(ValueError, match="at least one dimension"):
        op(np.zeros(()), w)
    with pytest.raises(TypeError, match="weight must be an array of numbers, got NoneType"):
        op(x, None)
    for call in (op, lambda x, w, eps: add(x, x, w, eps=eps)):
        for eps in ("small", None, np.ones(4)):
            with pytest.raises(TypeError, match=f"{op.__name__}: eps must be a real number, got "):
                call(x, w, eps=eps)


def test_a_bad_bias_or_residual_is_named():
    x, w = np.zeros((2, 4)), np.ones(4)
    with pytest.raises(ValueError, match="bias must have shape"):
        nf.layer_norm(x, w, np.ones((1, 4)))
    with pytest.raises(ValueError, match="residual must have shape"):
        nf.add_layer_norm(x, x[:1], w)
    with pytest.raises(TypeError, match="residual must be float64"):
        nf.add_rms_norm(x, x.astype(np.float32), w)
