"""A mixture of experts whose experts are quantized."""
import numpy as np
import pytest

import numformer as nf
from numformer import quant
from tests.gradients import normal


def experts(spec, count=4, width=32, hidden=24):
    layer = nf.nn.MoE(width, hidden, count, rng=np.random.default_rng(0)).eval()
    for name in ("up", "down"):
        setattr(layer, name, [quant.quantize(w, spec) for w in getattr(layer, name).data])
    return layer


@pytest.mark.parametrize("spec", [quant.QuantSpec(8, None), quant.QuantSpec(4, 16)], ids=str)
def test_layer_is_the_mixture_of_the_dequantized_experts(spec):
    layer = experts(spec)
    x = normal(3, 20, 32, dtype=np.float32)
    with nf.no_grad():
        y = layer(nf.Tensor(x)).numpy()
    up, down = (np.stack([q.dequantize() for q in each]) for each in (layer.up, layer.down))
    tokens = x.reshape(-1, 32)
    exact = nf.moe.mlp(tokens, nf.moe.route(tokens @ layer.router.data.T, 2), up, down)
    assert np.linalg.norm(y.reshape(-1, 32) - exact) < 0.03 * np.linalg.norm(exact)      # activations of 8 bits
    routing = nf.moe.route(tokens @ layer.router.data.T, 2)
    np.testing.assert_allclose(quant.moe_mlp(tokens, routing, layer.up, layer.down, compute="float32"), exact,
                               rtol=1e-4, atol=1e-5)


def test_bits_of_a_token_do_not_depend_on_the_others():
    layer = experts(quant.QuantSpec(4, 16)).as_arrays()
    logits, x = normal(50, 4, dtype=np.float32), normal(50, 32, dtype=np.float32)

    def mixed(tokens):
        return quant.moe_mlp(x[tokens], nf.moe.route(logits[tokens], 2), layer.up, layer.down)
    whole = mixed(slice(0, 50))
    for tokens in (slice(7, 8), slice(3, 9), slice(20, 50)):
        assert (mixed(tokens) == whole[tokens]).all()


def test_no_tokens():
    layer = experts(quant.QuantSpec(4, 16))
    routing = nf.moe.route(np.zeros((0, 4), np.float32), 2)
    assert quant.moe_mlp(np.zeros((0, 32), np.float32), routing, layer.up, layer.down).shape == (0, 32)


def test_gradient_reaches_the_tokens_and_the_router():
    layer = experts(quant.QuantSpec(8, None))
    x = nf.Tensor(normal(10, 32, dtype=np.float32), requires_grad=True)
    layer(x).backward(np.ones((10, 32), np.float32))
    assert np.isfinite(x.grad).all() and (x.grad != 0).any() and (layer.router.grad != 0).any()


def test_bad_experts_and_routings_are_named():
    layer = experts(quant.QuantSpec(8, None))
    x, routing = normal(5, 32, dtype=np.float32), nf.moe.route(normal(5, 4, dtype=np.float32), 2)
    with pytest.raises(ValueError, match="one weight for each of 4 experts, got 3 and 4"):
        quant.moe_mlp(x, routing, layer.up[:3], layer.down)
    with pytest.raises(TypeError, match=r"quant\.moe_mlp: down must be a sequence of .* got NoneType"):
        quant.moe_mlp(x, routing, layer.up, None)
    with pytest.raises(TypeError, match=r"quant\.moe_mlp: routing must be a Routing, .* got ndarray"):
        quant.moe_mlp(x, x, layer.up, layer.down)
    with pytest.raises(TypeError, match=r"quant\.moe_mlp: qweight must be a QuantizedWeight, got ndarray"):
        quant.moe_mlp(x, routing, np.ones((4, 48, 32), np.float32), layer.down)
    with pytest.raises(ValueError, match=r'quant\.moe_mlp: compute must be "int8" or "float32"'):
        quant.moe_mlp(x[:0], nf.moe.route(np.zeros((0, 4), np.float32), 2), layer.up, layer.down, compute="int4")


@pytest.mark.parametrize(("name", "shape"), [("up", (48, 31)), ("up", (47, 32)), ("down", (32, 23)), ("down", (9, 24))])
def test_an_expert_of_another_shape_is_named_also_where_no_token_goes_to_it(name, shape):
    layer = experts(quant.QuantSpec(8, None))
    getattr(layer, name)[2] = quant.quantize(np.ones(shape, np.float32))
    routing = nf.moe.route(np.array([[2, 1, -9, 0]], np.float32), 2)
    with pytest.raises(ValueError, match=r"quant\.moe_mlp: gate_up must be of shape \(2 \* I, 32\) .* for expert 2"):
        quant.moe_mlp(np.ones((1, 32), np.float32), routing, layer.up, layer.down)
