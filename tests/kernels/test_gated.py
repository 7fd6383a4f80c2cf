"""GeLU after a bias, SiLU, SwiGLU, GEGLU: values, gradients, strides, errors."""
import tracemalloc

import numpy as np
import pytest

import numformer as nf
from numformer.ops import gated, gelu
from tests import oracle

FORMS = ["none", "tanh", "quick"]
SIZES = [(0,), (1,), (3, 5), (2, 0), (0, 4), (2, 3, 17), (33, 31), (65, 97), (3, 16385)]


def silu(x):
    return x / (1 + np.exp(-x))


def forms():
    """name, op(gate, up), float64 reference."""
    yield "swiglu", nf.swiglu, lambda g, u: silu(g) * u
    for form in FORMS:
        yield f"geglu {form}", lambda g, u, f=form: nf.geglu(g, u, f), lambda g, u, f=form: oracle.gelu(g, f) * u


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def slopes(function, x, dy):
    """dy . d function / dx by central differences, in float64; `function` maps elements."""
    h = 1e-5
    return dy * (function(x + h) - function(x - h)) / (2 * h)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SIZES)
def test_gated_units_match_the_float64_formula(shape, dtype):
    gate, up = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    tolerance = 2e-6 if dtype == np.float32 else 1e-13
    for name, op, reference in forms():
        y = op(gate, up)
        assert y.shape == shape and y.dtype == dtype
        np.testing.assert_allclose(y, reference(gate.astype(float), up.astype(float)), rtol=tolerance, err_msg=name)
    for form in FORMS if gate.size else ():
        bias = up[(0,) * (len(shape) - 1)]
        want = oracle.gelu(gate.astype(float) + bias.astype(float), form)
        np.testing.assert_allclose(nf.bias_gelu(gate, bias, form), want, rtol=2 * tolerance, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3e-3, -1e10, 3e38])
def test_what_a_gate_near_underflow_lets_through_is_as_precise_as_the_rest(size):
    gate = np.concatenate([np.linspace(-104, -2, 50000), [-3.75, -4.9, -5.3, -9, -12, -75]]).astype(np.float32)
    up = np.full_like(gate, size)
    for name, op, _ in forms():
        found = []
        for dtype in (np.float32, np.float64):
            g, u = nf.Tensor(gate.astype(dtype)), nf.Tensor(up.astype(dtype), requires_grad=True)
            y = op(g, u)
            y.backward(up.astype(dtype))
            found.append((y.numpy(), u.grad))
        gates = op(gate.astype(np.float64), np.ones(gate.shape))
        there = np.abs(gates) >= np.finfo(np.float32).smallest_subnormal
        for got, want in zip(*found):
            assert oracle.ulps(got, want)[there].max() <= 3, name


def test_halves_of_one_array_give_the_bits_of_whole_ones(threads):
    h = normal(70, 2 * 97)
    dy = normal(70, 97, seed=3)
    for n in (1, 2):
        threads(n)
        for form in range(4):
            whole = [np.ascontiguousarray(h[:, :97]), np.ascontiguousarray(h[:, 97:])]
            forward, backward = nf._core.gated, nf._core.gated_backward
            assert (forward(form, h[:, :97], h[:, 97:]) == forward(form, *whole)).all()
            for a, b in zip(backward(form, h[:, :97], h[:, 97:], dy), backward(form, *whole, dy)):
                assert (a == b).all()
            assert (forward(form, h[3:4, :97], h[3:4, 97:]) == forward(form, *whole)[3]).all()
            assert (forward(form, h[::-2, 96::-1], h[::-2, :96:-1])
                    == forward(form, *(x[::-2, ::-1].copy() for x in whole))).all()
    big = normal(40, 2 * 1500)
    assert (nf.swiglu(big[:, :1500], big[:, 1500:]) == nf.swiglu(big[:, :1500].copy(), big[:, 1500:].copy())).all()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 17), (65, 33)])
def test_gradients_are_those_of_finite_differences(shape):
    gate, up, dy = (normal(*shape, seed=i, dtype=np.float64) for i in range(3))
    for name, op, reference in forms():
        g, u = nf.Tensor(gate, requires_grad=True), nf.Tensor(up, requires_grad=True)
        op(g, u).backward(dy)
        np.testing.assert_allclose(g.grad, slopes(lambda x, f=reference: f(x, up), gate, dy), rtol=1e-6, atol=1e-8,
                                   err_msg=name)
        np.testing.assert_allclose(u.grad, slopes(lambda x, f=reference: f(gate, x), up, dy), rtol=1e-6, atol=1e-8,
                                   err_msg=name)
    for form in FORMS:
        bias = up[(0,) * (len(shape) - 1)]
        x, b = nf.Tensor(gate, requires_grad=True), nf.Tensor(bias, requires_grad=True)
        nf.bias_gelu(x, b, form).backward(dy)
        want = slopes(lambda v, f=form: oracle.gelu(v, f), gate + bias, dy)
        np.testing.assert_allclose(x.grad, want, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(b.grad, want.reshape(-1, shape[-1]).sum(0), rtol=1e-6, atol=1e-7)
        x = nf.Tensor(gate, requires_grad=True)
        nf.gelu(x, form).backward(dy)
        np.testing.assert_allclose(x.grad, slopes(lambda v, f=form: oracle.gelu(v, f), gate, dy), rtol=1e-6, atol=1e-8)
    x = nf.Tensor(gate, requires_grad=True)
    nf.silu(x).backward(dy)
    np.testing.assert_allclose(x.grad, slopes(silu, gate, dy), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 4097])
def test_the_gradient_of_the_bias_is_the_sum_over_rows_on_any_number_of_threads(rows, threads):
    x, bias, dy = normal(rows, 19), normal(19, seed=1), normal(rows, 19, seed=2)
    dx, dbias = gelu.bias_gelu_backward(dy, gelu.bias_gelu_forward(x, bias)[1])
    np.testing.assert_allclose(dbias, dx.astype(float).sum(0), rtol=1e-5, atol=1e-5)
    threads(1)
    assert (gelu.bias_gelu_backward(dy, gelu.bias_gelu_forward(x, bias)[1])[1] == dbias).all()


@pytest.mark.native
def test_broadcast_rows_are_read_in_place():
    row, whole = normal(1024), normal(2048, 1024, seed=1)
    broadcast = np.broadcast_to(row, whole.shape)
    for _, op, _ in forms():
        for pair in ((broadcast, whole), (whole, broadcast)):
            tracemalloc.start()
            y = op(*pair)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert whole.nbytes <= peak < 1.2 * whole.nbytes        # the result and no copy
            assert (y == op(*(np.array(x) for x in pair))).all()


def test_broadcast_gradients_and_read_only_inputs():
    gate, up = normal(6, 8), normal(6, 8, seed=1)
    for x in (gate, up):
        x.flags.writeable = False
    row = np.broadcast_to(normal(8, seed=2), (6, 8))
    one = np.broadcast_to(np.float32(1), (6, 8))
    for dy in (row, one, normal(8, 6).T):
        for got, want in zip(gated.swiglu_backward(dy, (gate, up)),
                             gated.swiglu_backward(np.ascontiguousarray(dy), (gate, up))):
            assert (got == want).all()
        for got, want in zip(gelu.bias_gelu_backward(dy, (0, gate, up[0])),
                             gelu.bias_gelu_backward(np.ascontiguousarray(dy), (0, gate, up[0]))):
            assert (got == want).all()


def test_bad_arguments_are_named():
    x = normal(3, 4)
    with pytest.raises(ValueError, match=r"swiglu: gate and up must have one shape, got \(3, 4\) and \(4,\)"):
        nf.swiglu(x, x[0])
    with pytest.raises(TypeError, match="geglu: gate and up must have one dtype"):
        nf.geglu(x, x.astype(float))
    with pytest.raises(TypeError, match="swiglu: gate must be float32 or float64"):
        nf.swiglu(x.astype(int), x)
    with pytest.raises(ValueError, match="geglu: approximate"):
        nf.geglu(x, x, "fast")
    with pytest.raises(ValueError, match=r"bias_gelu: bias must have shape \(4,\), got \(3,\)"):
        nf.bias_gelu(x, x[0, :3])
    with pytest.raises(TypeError, match="bias_gelu: bias must be float32"):
        nf.bias_gelu(x, x[0].astype(float))
    with pytest.raises(ValueError, match="bias_gelu: approximate"):
        nf.bias_gelu(x, x[0], "fast")
    with pytest.raises(TypeError, match="silu: x must be float32 or float64"):
        nf.silu(np.arange(3))


@pytest.mark.parametrize("form", FORMS)
def test_torch_agrees(form):
    torch = pytest.importorskip("torch")
    x, dy = normal(33, 65), normal(33, 65, seed=1)
    t = torch.tensor(x, requires_grad=True)
    y = t * torch.sigmoid(1.702 * t) if form == "quick" else torch.nn.functional.gelu(t, approximate=form)
    y.backward(torch.tensor(dy))
    mine = nf.Tensor(x, requires_grad=True)
    out = nf.gelu(mine, form)
    out.backward(dy)
    np.testing.assert_allclose(out.data, y.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.grad, t.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_swiglu_halves_has_the_bits_of_swiglu():
    h, dy = normal(6, 5, 2 * 19), normal(6, 5, 19, seed=1)
    for whole in (h, h[::-1], h.transpose(1, 0, 2), h[:, :1]):
        d = dy[: whole.shape[0], : whole.shape[1]] if whole.shape[:2] != (5, 6) else dy.transpose(1, 0, 2)
        gate, up = whole[..., :19], whole[..., 19:]
        y, saved = gated.swiglu_halves_forward(whole)
        assert (y == nf.swiglu(gate, up)).all()
        (dh,) = gated.swiglu_halves_backward(d, saved)
        want = gated.swiglu_backward(d, (gate, up))
        assert (dh[..., :19] == want[0]).all() and (dh[..., 19:] == want[1]).all()
    for wrong in (normal(3, 5), normal()):
        with pytest.raises(ValueError, match="last axis of h must be even"):
            gated.swiglu_halves(wrong)
    with pytest.raises(ValueError, match=r"dy must have shape \(2, 3\), got \(2, 6\)"):
        gated.swiglu_halves_backward(normal(2, 6), normal(2, 6))
