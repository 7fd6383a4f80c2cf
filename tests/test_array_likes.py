"""What has ``__array__`` or DLPack is taken for an array, an integer of NumPy for one, wherever one may be given."""
import numpy as np
import pytest

import numformer as nf


class WithArray:
    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


class WithDLPack:
    """What has nothing but DLPack."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **keywords):
        return self.x.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def floats(*shape):
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def integers(*values):
    return np.array(values)


MASK = np.array([[True, True, False], [True, False, False]])
ROUTING = nf.moe.route(floats(6, 4), 2)
SPEC = nf.quant.QuantSpec(4, 16)
# An op of arrays alone, and the arrays.
CALLS = {
    "attention": (lambda q, k, v, mask, slopes, sinks, lengths: nf.scaled_dot_product_attention(
        q, k, v, mask, alibi_slopes=slopes, sinks=sinks, kv_lengths=lengths),
        [floats(1, 2, 4, 8)] * 3 + [floats(4, 4), floats(2), floats(2), integers(3)]),
    "plain attention": (nf.scaled_dot_product_attention, [floats(1, 2, 4, 8)] * 3),
    "attention_varlen": (nf.attention_varlen, [floats(5, 2, 8)] * 3 + [integers(0, 2, 5)] * 2),
    "paged_attention": (nf.paged_attention,
                        [floats(1, 2, 1, 8), floats(3, 4, 2, 8), floats(3, 4, 2, 8), integers([0, 1]), integers(5)]),
    "merge_attention": (nf.merge_attention, [floats(2, 3, 4), floats(2, 3)] * 2),
    "rotary_embedding": (nf.rotary_embedding, [floats(1, 2, 4, 8), floats(4, 4), floats(4, 4)]),
    "gelu": (nf.gelu, [floats(3, 4)]), "bias_gelu": (nf.bias_gelu, [floats(3, 4), floats(4)]),
    "swiglu": (nf.swiglu, [floats(3, 4)] * 2), "geglu": (nf.geglu, [floats(3, 4)] * 2),
    "linear": (lambda x, w, bias, residual: nf.linear(x, w, bias, residual=residual),
               [floats(3, 4), floats(5, 4), floats(5), floats(3, 5)]),
    "grouped_linear": (nf.grouped_linear, [floats(5, 4), floats(2, 3, 4), integers(0, 2, 5), floats(2, 3)]),
    "layer_norm": (nf.layer_norm, [floats(3, 4), floats(4), floats(4)]),
    "rms_norm": (nf.rms_norm, [floats(3, 4), floats(4)]),
    "softmax": (nf.softmax, [floats(3, 4)]), "log_softmax": (nf.log_softmax, [floats(3, 4)]),
    "embedding": (nf.embedding, [integers(1, 2), floats(4, 4)]),
    "cross_entropy": (nf.cross_entropy, [floats(3, 4), integers(0, 1, 2)]),
    "linear_cross_entropy": (nf.linear_cross_entropy, [floats(3, 4), floats(5, 4), integers(0, 1, 2)]),
    "route": (lambda x: nf.moe.route(x, 2).weight, [floats(6, 4)]),
    "router_z_loss": (nf.moe.router_z_loss, [floats(6, 4)]),
    "dispatch": (lambda x: nf.moe.dispatch(x, ROUTING), [floats(6, 8)]),
    "combine": (lambda x: nf.moe.combine(x, ROUTING), [floats(12, 8)]),
    "mlp": (lambda x, up, down: nf.moe.mlp(x, ROUTING, up, down), [floats(6, 8), floats(4, 6, 8), floats(4, 8, 3)]),
    "quantize": (lambda w: nf.quant.quantize(w, SPEC).dequantize(), [floats(8, 16)]),
    "quant.linear": (lambda x: nf.quant.linear(x, nf.quant.quantize(floats(8, 16), SPEC)), [floats(2, 16)]),
    "int8_matmul": (nf.quant.int8_matmul, [np.ones((2, 3), np.int8)] * 2),
    "gptq": (lambda w, x: nf.quant.gptq(w, x, SPEC)[0].dequantize(), [floats(8, 16), floats(40, 16)]),
    "gae": (lambda *x: nf.rlhf.gae(*x)[0], [floats(2, 3), floats(2, 3), MASK]),
    "masked_mean": (nf.rlhf.masked_mean, [floats(2, 3), MASK]),
    "ppo_policy_loss": (lambda *x: nf.rlhf.ppo_policy_loss(*x)[0], [floats(2, 3)] * 3 + [MASK]),
    "Tensor": (lambda x: nf.Tensor(x).data, [floats(2, 3)]),
}


@pytest.mark.parametrize("kind", [WithArray, WithDLPack])
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_that_of_arrays(name, kind):
    op, inputs = CALLS[name]
    for recording in (True, False):
        with nf.no_grad() if not recording else pytest.MonkeyPatch.context():
            got = op(*map(kind, inputs))
        for x, y in zip(*(r if type(r) is tuple else (r,) for r in (got, op(*inputs))), strict=True):
            assert type(x) in (np.ndarray, np.float32, float) and (x == y).all()


NUMBERS = {
    "route": lambda n: nf.moe.route(np.eye(4), n(2), num_groups=n(2), top_groups=n(1), capacity=n(3)).weight,
    "route_expert_choice": lambda n: nf.moe.route_expert_choice(np.eye(4), n(2)).weight,
    "rotary_embedding": lambda n: nf.rotary_embedding(np.eye(4), np.ones((4, 1)), np.zeros((4, 1)), rotary_dim=n(2)),
    "quant.linear": lambda n: nf.quant.linear(np.ones((2, 8), np.float32),
                                              nf.quant.quantize(np.eye(8), nf.quant.QuantSpec(n(8), n(4), False))),
    "attention": lambda n: nf.scaled_dot_product_attention(*np.ones((3, 1, 2, 4, 3)), window_size=(n(1), n(0))),
}


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
@pytest.mark.parametrize("name", NUMBERS)
def test_an_integer_of_numpy_is_an_integer(name, kind):
    np.testing.assert_array_equal(NUMBERS[name](kind), NUMBERS[name](int))


NO_ARRAYS = {
    "gelu: x": nf.gelu,
    "layer_norm: weight": lambda x: nf.layer_norm(floats(2, 3), x),
    "linear: weight": lambda x: nf.linear(floats(2, 3), x),
    "grouped_linear: offsets": lambda x: nf.grouped_linear(floats(2, 3), floats(1, 4, 3), x),
    "cross_entropy: targets": lambda x: nf.cross_entropy(floats(2, 3), x),
    "route: logits": lambda x: nf.moe.route(x, 1),
    "quantize: weight": nf.quant.quantize,
    "Tensor: data": nf.Tensor,
}


@pytest.mark.parametrize("none", [None, [None, 1.0], {"weight": 1.0}])
@pytest.mark.parametrize("name", NO_ARRAYS)
def test_what_is_no_array_is_named_by_its_type(name, none):
    kind = "None" if none is None else type(none).__name__
    with pytest.raises(TypeError, match=f"^{name} must be an array.*, got {kind}"):
        NO_ARRAYS[name](none)
