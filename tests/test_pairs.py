"""Every op as a pure pair: its forward half takes the op's own arguments."""
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import numformer as nf
import numformer.ops
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
