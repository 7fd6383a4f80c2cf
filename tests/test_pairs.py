"""Every op as a pure pair: its forward half takes the op's own arguments."""
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import numformer as nf
import numformer.ops
from numformer.ops import cross_entropy, gated, gelu, linear, linear_cross_entropy, moe, quant, rotary
from numformer.ops.attention import scaled_dot_product_attention_forward

MODULES = [importlib.import_module(f"numformer.ops.{m.name}") for m in pkgutil.iter_modules(numformer.ops.__path__)]
PAIRS = [(module, name.removesuffix("_forward")) for module in MODULES for name in vars(module)
         if name.endswith("_forward") and not name.startswith("_") and vars(module)[name].__module__ == module.__name__]
POSITIONAL, NAMED, REST = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY,
                           inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize("module, op", PAIRS, ids=[f"{module.__name__.rsplit('.', 1)[1]}.{op}" for module, op in PAIRS])
def test_the_forward_half_takes_what_the_op_takes(module, op):
    assert callable(getattr(module, f"{op}_backward"))
    whole = inspect.signature(getattr(module, op)).parameters.values()
    half = inspect.signature(getattr(module, f"{op}_forward")).parameters
    places = [p.name for p in half.values() if p.kind is POSITIONAL]
    anything = any(p.kind is REST for p in half.values())
    ours = [p.name for p in whole if p.kind is POSITIONAL]
    assert places[:len(ours)] == ours
    for p in whole:
        assert p.name in half or anything, f"{op}_forward lacks {p.name}"
        assert p.name not in half or half[p.name].default == p.default
    more = set(half) - {p.name for p in whole}
    assert all(half[name].default is not inspect.Parameter.empty for name in more if half[name].kind is not REST)


def test_attention_s_forward_half_takes_options_by_place():
    q, k, v = (np.random.default_rng(i).standard_normal((1, 4 // h, 9, 8), np.float32) for i, h in enumerate((1, 2, 2)))
    got, _ = scaled_dot_product_attention_forward(q, k, v, None, 0.5, True, 0.3, True, rng=np.random.default_rng(1))
    want = nf.scaled_dot_product_attention(q, k, v, None, 0.5, True, 0.3, True, rng=np.random.default_rng(1))
    assert (got == want).all()


def halves(reduction="mean"):
    """(backward, saved, y, name) of pairs whose backward half is more than a call of a kernel."""
    x, w, wide = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in [(5, 4), (3, 4), (3, 32)])
    ids, q, angles = np.arange(5) % 3, nf.quant.quantize(wide), np.ones((5, 2), np.float32)
    routing = nf.moe.route(x, 1)
    experts = np.ones((4, 6, 4), np.float32), np.ones((4, 4, 3), np.float32)
    for module, op, inputs, options in [
            (gelu, "gelu", [x], {}), (gated, "silu", [x], {}), (linear, "linear", [x, w], {}),
            (linear, "linear", [x, w], {"activation": "gelu"}),
            (linear, "grouped_linear", [x, w[None], [0, 5]], {}), (moe, "mlp", [x, routing, *experts], {}),
            (quant, "linear", [np.ones((5, 32), np.float32), q], {}),
            (rotary, "rotary_embedding", [x, angles, angles], {}),
            (cross_entropy, "cross_entropy", [x, ids], {"reduction": reduction}),
            (linear_cross_entropy, "linear_cross_entropy", [x, w, ids], {"reduction": reduction})]:
        y, saved = getattr(module, f"{op}_forward")(*inputs, **options)
        yield getattr(module, f"{op}_backward"), saved, y, op


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_halves_name_a_gradient_of_another_dtype_or_shape(reduction):
    for backward, saved, y, op in halves(reduction):
        with pytest.raises(TypeError, match=rf"{op}_backward: dy must be float32, got float64"):
            backward(np.ones(y.shape), saved)
        for shape in [(2, *y.shape), (*y.shape, 2), y.shape[:-1] + (7,)]:
            with pytest.raises(ValueError, match=rf"{op}_backward: dy must have shape .*, got "):
                backward(np.ones(shape, np.float32), saved)


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), np.float64(1)])
def test_the_gradient_of_a_loss_may_be_a_number(one):
    for backward, saved, y, _ in halves():
        if y.ndim == 0:
            for got, want in zip(backward(one, saved), backward(np.ones((), np.float32), saved)):
                assert got is want is None or (got.dtype == np.float32 and (got == want).all())
