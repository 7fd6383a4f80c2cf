"""Sizes that no memory holds, integers out of range and options that are none: an error that says so, and never a
crash or a wrapped product.

Arrays of any size are broadcast from one number, so they take no memory.
"""
import numpy as np
import pytest

import numformer as nf
from numformer import moe, quant

ROUTING = moe.route(np.zeros((4, 2), np.float32), 1)
WEIGHT = quant.quantize(np.ones((32, 64), np.float32))


def floats(*shape):
    return np.broadcast_to(np.float32(1), shape)


def ids(*shape):
    return np.broadcast_to(np.int64(0), shape)


def signed_bytes(*shape):
    return np.broadcast_to(np.int8(1), shape)


HUGE = {
    "gelu": lambda: nf.gelu(floats(2**40, 2**20)),
    "swiglu": lambda: nf.swiglu(floats(2**40, 2**20), floats(2**40, 2**20)),
    "bias_gelu": lambda: nf.bias_gelu(floats(2**40, 2**20), floats(2**20)),
    "layer_norm": lambda: nf.layer_norm(floats(2**40, 2**20), floats(2**20), floats(2**20)),
    "layer_norm, bytes": lambda: nf.layer_norm(floats(2**31, 2**31), floats(2**31), floats(2**31)),
    "layer_norm, statistics": lambda: nf.layer_norm(floats(2**58, 0), floats(0), floats(0)),
    "rms_norm": lambda: nf.rms_norm(floats(2**59, 1), floats(1)),
    "softmax": lambda: nf.softmax(floats(2**40, 2**20)),
    "softmax, axis": lambda: nf.softmax(floats(2**40, 2**20), axis=0),
    "cross_entropy": lambda: nf.cross_entropy(floats(2**40, 2**20), ids(2**40)),
    "token_log_probs": lambda: nf.token_log_probs(floats(2**59, 1), ids(2**59)),
    "softmax_entropy": lambda: nf.softmax_entropy(floats(2**59, 1)),
    "linear_cross_entropy": lambda: nf.linear_cross_entropy(floats(4, 8), floats(2**56, 8), ids(4)),
    "embedding": lambda: nf.embedding(ids(2**40, 2**17), floats(2**40, 2**20)),
    "embedding, bytes": lambda: nf.embedding(ids(8), floats(1, 2**59)),
    "rotary": lambda: nf.rotary_embedding(floats(2**20, 2**20, 2**18), floats(2**20, 2**17), floats(2**20, 2**17)),
    "dropout": lambda: nf.dropout(floats(2**40, 2**20), 0.5, np.random.default_rng(0)),
    "attention, batch": lambda: nf.scaled_dot_product_attention(*[floats(2**30, 2**20, 4, 4)] * 3),
    "attention, heads": lambda: nf.scaled_dot_product_attention(floats(1, 2**58, 1, 1), *[floats(1, 1, 1, 1)] * 2),
    "attention, depth": lambda: nf.scaled_dot_product_attention(*[floats(1, 1, 4, 2**57)] * 3),
    "attention, keys": lambda: nf.scaled_dot_product_attention(floats(1, 1, 4, 8), *[floats(1, 1, 2**50, 8)] * 2),
    "attention, lse": lambda: nf.scaled_dot_product_attention(floats(1, 2**57, 8, 1), floats(1, 1, 1, 1),
                                                              floats(1, 1, 1, 0), return_lse=True),
    "route": lambda: moe.route(floats(2**40, 2**19), 1),
    "route, all": lambda: moe.route(floats(0, 2**59), 2**59),
    "route, tokens": lambda: moe.route(floats(2**59, 1), 1),
    "dispatch": lambda: moe.dispatch(floats(4, 2**58), ROUTING),
    "combine": lambda: moe.combine(floats(4, 2**58), ROUTING),
    "router_z_loss": lambda: moe.router_z_loss(floats(2**50, 2**9)),
    "quant.linear": lambda: quant.linear(floats(2**53, 64), WEIGHT),
    "quant.linear, floats": lambda: quant.linear(floats(2**53, 64), WEIGHT, compute="float32"),
    "quantize": lambda: quant.quantize(floats(2**50, 2**9)),
    "int8_matmul": lambda: quant.int8_matmul(signed_bytes(2**59, 1), signed_bytes(1, 1)),
    "int8_matmul, depth": lambda: quant.int8_matmul(signed_bytes(1, 2**40), signed_bytes(1, 2**40)),
    "int8_matmul, empty": lambda: quant.int8_matmul(signed_bytes(2**31, 0), signed_bytes(2**31, 0)),
}

# Nothing is there to compute: the shape is all that comes back.
EMPTY = {
    "softmax": (lambda: nf.softmax(floats(2**40, 0)), (2**40, 0)),
    "softmax, no rows": (lambda: nf.softmax(floats(0, 2**59)), (0, 2**59)),
    "bias_gelu": (lambda: nf.bias_gelu(floats(2**50, 0), floats(0)), (2**50, 0)),
    "cross_entropy": (lambda: nf.cross_entropy(floats(0, 2**59), ids(0)), ()),
    "attention, no values": (lambda: nf.scaled_dot_product_attention(
        floats(2**20, 2**20, 2**20, 0), *[floats(2**20, 2**20, 1, 0)] * 2), (2**20, 2**20, 2**20, 0)),
    "attention, no queries": (lambda: nf.scaled_dot_product_attention(
        floats(2**58, 1, 0, 1), *[floats(2**58, 1, 1, 1)] * 2), (2**58, 1, 0, 1)),
    "dispatch": (lambda: moe.dispatch(floats(4, 0), ROUTING), (4, 0)),
    "quant.linear": (lambda: quant.linear(floats(2**40, 2**12, 0, 64), WEIGHT), (2**40, 2**12, 0, 32)),
}

# An integer that no array has a place for; 2**64 - 100 would wrap to the index that is ignored.
OUT_OF_RANGE = {
    "embedding": lambda i: nf.embedding(np.array([0, i]), floats(3, 2)),
    "cross_entropy": lambda i: nf.cross_entropy(floats(2, 3), np.array([0, i])),
    "token_log_probs": lambda i: nf.token_log_probs(floats(2, 3), np.array([0, i])),
    "linear_cross_entropy": lambda i: nf.linear_cross_entropy(floats(2, 4), floats(3, 4), np.array([0, i])),
    "grouped_linear": lambda i: nf.grouped_linear(floats(2, 4), floats(1, 3, 4), np.array([0, i])),
    "top_k": lambda i: moe.route(floats(2, 2), i),
    "num_groups": lambda i: moe.route(floats(2, 4), 2, num_groups=i),
    "top_groups": lambda i: moe.route(floats(2, 4), 2, num_groups=2, top_groups=i),
}

# What takes the name of a form or a way, by the op and the option that an error names.
CHOICES = {
    ("gelu", "approximate"): lambda o: nf.gelu(floats(2, 3), o),
    ("bias_gelu", "approximate"): lambda o: nf.bias_gelu(floats(2, 3), floats(3), o),
    ("geglu", "approximate"): lambda o: nf.geglu(floats(2, 3), floats(2, 3), o),
    ("linear", "activation"): lambda o: nf.linear(floats(2, 3), floats(4, 3), activation=o),
    ("quant.linear", "activation"): lambda o: quant.linear(floats(2, 64), WEIGHT, activation=o),
    ("quant.linear", "compute"): lambda o: quant.linear(floats(2, 64), WEIGHT, compute=o),
    ("cross_entropy", "reduction"): lambda o: nf.cross_entropy(floats(2, 3), ids(2), reduction=o),
    ("linear_cross_entropy", "reduction"): lambda o: nf.linear_cross_entropy(floats(2, 3), floats(4, 3), ids(2),
                                                                             reduction=o),
    ("route", "score"): lambda o: moe.route(floats(2, 3), 2, score=o),
    ("load_balancing_loss", "form"): lambda o: moe.load_balancing_loss(ROUTING, form=o),
    ("scaled_dot_product_attention", "causal_align"): lambda o: nf.scaled_dot_product_attention(
        *[floats(1, 1, 2, 4)] * 3, is_causal=True, causal_align=o),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_size_beyond_memory_is_refused(name):
    with pytest.raises((MemoryError, ValueError)) as raised:
        HUGE[name]()
    assert str(raised.value)


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_of_any_size_takes_no_time(name):
    call, shape = EMPTY[name]
    assert call().shape == shape


@pytest.mark.parametrize("integer", [-1, 3, 2**31, 2**62, -2**62, 2**63, 2**64 - 100])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_an_integer_out_of_range_is_refused(name, integer):
    with pytest.raises((ValueError, TypeError, OverflowError)) as raised:
        OUT_OF_RANGE[name](integer)
    assert str(raised.value)


@pytest.mark.parametrize("option", ["no such name", ["mean"], {}, 3])
@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_an_option_that_is_no_name_is_refused_by_name(choice, option):
    op, name = choice
    with pytest.raises(ValueError, match=rf"{op}: {name} must be .*\bor \S+, got ") as raised:
        CHOICES[choice](option)
    assert str(raised.value).endswith(f"got {option!r}")


def test_an_array_in_the_place_of_normalize_is_named():
    with pytest.raises(TypeError, match=r"route: normalize must be True or False, got ndarray of shape \(3,\)"):
        moe.route(floats(2, 3), 2, normalize=np.ones(3))


CAUSAL = {
    "scaled_dot_product_attention": lambda c: nf.scaled_dot_product_attention(*[floats(1, 2, 3, 4)] * 3, is_causal=c),
    "attention_varlen": lambda c: nf.attention_varlen(*[floats(3, 2, 4)] * 3, [0, 3], [0, 3], is_causal=c),
    "paged_attention": lambda c: nf.paged_attention(floats(1, 2, 1, 4), *[floats(1, 3, 2, 4)] * 2, [[0]], [3],
                                                    is_causal=c),
    "attention_maps": lambda c: nf.nn.attention_maps(*[floats(1, 2, 3, 4)] * 2, is_causal=c),
}


@pytest.mark.parametrize("op", CAUSAL)
def test_a_mask_in_the_place_of_is_causal_is_named(op):
    with pytest.raises(TypeError, match=rf"{op}: is_causal must be True or False, got ndarray of shape \(3, 3\)"):
        CAUSAL[op](np.tri(3, dtype=bool))
    for causal in (1, 0, None, np.True_, np.array([True])):
        np.testing.assert_array_equal(CAUSAL[op](causal), CAUSAL[op](bool(causal)))
