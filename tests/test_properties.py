"""Random shapes, strides, dtypes, numbers and mistakes at every op.

An op gives the answer of a float64 formula, or TypeError or ValueError; it changes nothing that it was given and writes
nowhere but into its result. Its gradients are those of finite differences. A new op is a line of OPS, and a formula
where tests/oracle.py has none. NUMFORMER_EXAMPLES sets the cases an op, at random (make fuzz); without it they are few
and always the same.
"""
import math
import os
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import numformer as nf
from numformer import _core, moe, quant
from numformer.ops.optimizer import adamw_step, global_norm
from tests import oracle
from tests.conftest import levels
from tests.gradients import slope

LEVELS = levels()
EXAMPLES = os.environ.get("NUMFORMER_EXAMPLES")
FORMS = "none", "tanh", "quick"


def cases(share=1):
    return settings(max_examples=max(int(EXAMPLES or 16) // share, 1), derandomize=EXAMPLES is None, database=None,
                    deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


class Case:
    """What the arguments of one call are drawn from. A `smooth` one is float64, small and without mistakes."""

    def __init__(self, draw, smooth=False):
        self.draw = draw
        self.smooth = smooth
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        self.dtype = np.dtype(np.float64 if smooth else self.pick(np.float32, np.float64))
        self.special = not smooth and self.pick(False, False, True)
        self.memory = []            # (bytes, what they were)

    def pick(self, *values):
        return self.draw(st.sampled_from(values))

    def size(self, low=0, high=40):
        return self.draw(st.integers(low, min(high, low + 3) if self.smooth else high))

    def shape(self, low=1, high=4):
        return tuple(self.size(0, 9) for _ in range(self.draw(st.integers(low, min(high, 2) if self.smooth else high))))

    def floats(self, *shape, wide=False, dtype=None, broadcast=True):
        """Normal numbers; of any magnitude where `wide`; some of them not finite where the case is special."""
        x = self.rng.standard_normal(shape)
        if wide and not self.smooth:
            x *= 10.0 ** self.rng.integers(-45, 39, shape)
        if self.special and x.size:
            x.flat[self.rng.integers(0, x.size, 2)] = self.rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], 2)
        with np.errstate(over="ignore"):
            return self.place(x.astype(dtype or self.dtype), broadcast)

    def integers(self, low, high, *shape, dtype=np.int64):
        return self.place(self.rng.integers(low, high, shape).astype(dtype))

    def place(self, values, broadcast=True):
        """`values` in memory: axes in any order, steps of either sign, broadcast axes (or none, or "rows": all but the
        last), gaps, any address, read-only."""
        if self.pick(True, True, False):
            order, steps = list(range(values.ndim)), [1] * values.ndim
        else:
            order = self.draw(st.permutations(range(values.ndim)))
            steps = [self.pick(1, 1, 2, -1, -2, 0 if broadcast else 1) for _ in order]
            if broadcast == "rows" and steps:
                steps[-1] = steps[-1] or 1
        kept = [slice(None) if step else slice(0, 1) for step in steps]
        held = values[..., *kept]
        lead = self.pick(*(0, 0, 8, 24) if self.smooth else (0, 0, 0, 8, 24, 1))
        spans = [n * max(abs(step), 1) for n, step in zip(held.shape, steps)]
        memory = self.watched(lead + math.prod(spans) * values.itemsize + 64)
        base = np.ndarray([spans[i] for i in order], values.dtype, memory, lead).transpose(np.argsort(order))
        view = base[..., *(slice(None, None, step or 1) for step in steps)]
        view[...] = held
        self.remember(memory)
        if self.pick(True, False):
            view.flags.writeable = False
        return np.broadcast_to(view, values.shape) if 0 in steps else view

    def watched(self, bytes_):
        memory = np.frombuffer(bytearray(self.rng.bytes(bytes_)), np.uint8)
        self.memory.append([memory, memory.copy()])
        return memory

    def remember(self, memory):
        for pair in self.memory:
            if pair[0] is memory:
                pair[1] = memory.copy()

    def spoil(self, arrays):
        """One array replaced by something that may not fit."""
        i = self.draw(st.integers(0, len(arrays) - 1))
        x = arrays[i]
        if x is None:
            return arrays
        change = self.pick("dtype", "order of bytes", "axis less", "axis more", "cut", "None", "list")
        if change == "dtype":
            with np.errstate(all="ignore"):
                x = np.nan_to_num(x, posinf=9, neginf=-9)
                x = x.astype(self.pick(np.float16, np.float32, np.float64, np.int32, np.uint8, np.bool_, np.complex64,
                                       object))
        elif change == "order of bytes":
            x = x.astype(x.dtype.newbyteorder())
        elif change == "axis less":
            x = x[0] if x.ndim and len(x) else x.reshape(-1)
        elif change == "axis more":
            x = x[None]
        elif change == "cut" and x.ndim:
            axis = self.draw(st.integers(0, x.ndim - 1))
            x = np.take(x, range(max(x.shape[axis] - 1, 0)), axis)
        elif change == "None":
            x = None
        elif change == "list":
            x = x.tolist()
        return [*arrays[:i], x, *arrays[i + 1:]]

    def out(self, arrays, shape):
        """Somewhere to write: memory of its own, of a kind that may be refused, or an input's."""
        kind = self.pick("own", "own", "strided", "read-only", "shape", "dtype", "an input's")
        if kind == "an input's" and type(arrays[0]) is np.ndarray and arrays[0].size:
            of = next((m for m, _ in self.memory if np.shares_memory(m, arrays[0])), None)      # None: spoiled
            start = self.pick(0, 8, 24)
            if of is not None and start + math.prod(shape) * self.dtype.itemsize <= of.nbytes:
                return np.ndarray(shape, self.dtype, of, start)
        if kind == "shape":
            shape = (*shape, 1)
        dtype = np.dtype(np.float16) if kind == "dtype" else self.dtype
        step = 2 if kind == "strided" and shape else 1
        held = (*shape[:-1], shape[-1] * step) if shape else shape
        memory = self.watched(64 + math.prod(held) * dtype.itemsize + 64)
        out = np.ndarray(held, dtype, memory, 64)
        if kind == "read-only":
            out.flags.writeable = False
        return out[..., ::step] if shape else out


# ---- formulas that tests/oracle.py has not ----


def wide(x):
    return np.asarray(x, np.float64)


def silu(x):
    return oracle.gated(x, wide(x))


ACTIVATIONS = {None: lambda x: x, "relu": lambda x: np.maximum(x, 0), "silu": silu, "gelu": oracle.gelu,
               "gelu_tanh": lambda x: oracle.gelu(x, "tanh"), "gelu_quick": lambda x: oracle.gelu(x, "quick")}


def softmax(x, axis=-1):
    x = np.moveaxis(wide(x), axis, -1)
    nothing = np.isneginf(x).all(-1, keepdims=True)
    return np.moveaxis(np.where(nothing, 0, oracle.softmax(x)), -1, axis) if x.size else np.moveaxis(x, -1, axis)


def log_softmax(x, axis=-1):
    x = np.moveaxis(wide(x), axis, -1)
    nothing = np.isneginf(x).all(-1, keepdims=True)
    return np.moveaxis(np.where(nothing, -np.inf, oracle.log_softmax(x)) if x.size else x, -1, axis)


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    losses = np.zeros(targets.shape)
    for i in np.ndindex(targets.shape):
        if targets[i] == -100:
            continue
        x, t, e = wide(logits[i]), targets[i], label_smoothing
        lse = x.max() + np.log(np.exp(x - x.max()).sum()) if x.max() != -np.inf else -np.inf
        losses[i] = lse - (1 - e) * x[t] - (e * x.mean() if e else 0) + (z_loss * lse**2 if z_loss else 0)
    if reduction == "none":
        return losses
    return losses.sum() / (max((targets != -100).sum(), 1) if reduction == "mean" else 1)


def entropy(logits, temperature=1.0):
    p, logp = softmax(wide(logits) / temperature), log_softmax(wide(logits) / temperature)
    return -np.where(p == 0, 0, p * logp).sum(-1)


def layer_norm(x, weight, bias, eps):
    return oracle.layer_norm(x, weight, 0 if bias is None else bias, eps)


def rotary(x, cos, sin, interleaved=False, rotary_dim=None):
    n = x.shape[-1] if rotary_dim is None else rotary_dim
    return np.concatenate([oracle.rotary(x[..., :n], cos, sin, interleaved), x[..., n:]], -1)


def dropout(x, p, seed):
    kept = nf.dropout(np.ones(np.shape(x)), p, np.random.default_rng(seed)) != 0
    return np.where(kept, wide(x) / (1 - p) if p < 1 else 0, 0)


def linear(x, weight, bias=None, residual=None, activation=None):
    y = ACTIVATIONS[activation](wide(x) @ wide(weight).T + (0 if bias is None else bias))
    return y if residual is None else y + residual


def routed(logits, **options):
    return oracle.moe_route(logits, **options)[0], softmax(logits)


def experts(x, logits, gate_up, down, top_k):
    weight, index, _ = oracle.moe_route(logits, top_k)
    return oracle.moe_mlp(wide(x), weight, index, gate_up, down)


def moved(x, logits, top_k):
    return (wide(x)[:, None] * oracle.moe_route(logits, top_k)[0][:, :, None]).sum(1)


def quantized(x, bias, weight, spec):
    return wide(x) @ quant.quantize(weight, spec).dequantize().astype(float).T + (0 if bias is None else bias)


# ---- the table ----


class Op:
    """`arguments(case)` gives a list of arrays and a dict of options for `call` and for `formula`. The first `slopes`
    arrays have gradients. `rtol`: of float32. `out`: the op takes one, of the shape of its result."""

    def __init__(self, arguments, call, formula, slopes=0, rtol=1e-4, out=False):
        self.arguments, self.call, self.formula = arguments, call, formula
        self.slopes, self.rtol, self.out = slopes, rtol, out


def _same(count, any_magnitude=True, **options):
    def arguments(c):
        shape = c.shape(0)
        return [c.floats(*shape, wide=any_magnitude) for _ in range(count)], {k: c.pick(*v) for k, v in options.items()}
    return arguments


def _norm(vectors, rows=1):
    def arguments(c):
        shape = (*c.shape(0, 3), c.size(1, 70))
        # A row of one number throughout is mean exactly or to a rounding: times inf, NaN or inf.
        return ([c.floats(*shape, broadcast="rows") for _ in range(rows)]
                + [c.floats(shape[-1]) for _ in range(vectors)],
                {"eps": c.pick(1e-5, 1e-2)})
    return arguments


def _bias_gelu(c):
    shape = (*c.shape(0, 3), c.size())
    return [c.floats(*shape), c.floats(shape[-1])], {"approximate": c.pick(*FORMS)}


def _softmax(c):
    shape = (*c.shape(0, 2), c.size(1))
    return [c.floats(*shape)], {"axis": c.draw(st.integers(-len(shape), len(shape) - 1))}


def _targets(c, shape, classes):
    t = c.rng.integers(0, classes, shape)
    return c.place(np.where(c.rng.random(shape) < 0.2, -100, t))


def _loss(c):
    shape, classes = c.shape(0, 2), c.size(1)
    return ([c.floats(*shape, classes), _targets(c, shape, classes)],
            {"label_smoothing": c.pick(0.0, 0.1), "z_loss": c.pick(0.0, 0.01),
             "reduction": c.pick("mean", "sum", "none")})


def _log_probs(c):
    shape, classes = c.shape(0, 2), c.size(1)
    return [c.floats(*shape, classes), _targets(c, shape, classes)], {"temperature": c.pick(1.0, 0.7)}


def _embedding(c):
    rows = c.size(1)
    ids = c.integers(0, rows, *c.shape(0, 2), dtype=c.pick(np.int64, np.int32, np.uint8))
    return [c.floats(rows, c.size()), ids], {}


def _rotary(c):
    half, shape = c.size(0, 9), (c.size(0, 3), c.size(0, 3), c.size(0, 9))[c.size(0, 1):]
    dim = 2 * half + c.pick(0, 0, 3)
    return ([c.floats(*shape, dim), c.floats(shape[-1], half), c.floats(shape[-1], half)],
            {"interleaved": c.pick(False, True), "rotary_dim": 2 * half})


def _attention(c):
    batch, group, kv, queries, keys = c.size(0, 2), c.size(1, 2), c.size(1, 2), c.size(0, 20), c.size(0, 20)
    dim, value_dim = c.size(1, 33), c.size(1, 33)
    mask = c.pick(None, None, "boolean", "added")
    if mask is not None:
        mask = c.rng.random((c.pick(batch, 1), c.pick(group * kv, 1), c.pick(queries, 1), keys)) < 0.7 \
            if mask == "boolean" else c.rng.standard_normal((queries, keys)).astype(c.dtype)
        if c.special and mask.dtype != bool and mask.size:
            mask.flat[c.rng.integers(0, mask.size, 3)] = c.rng.choice([np.nan, np.inf, -np.inf], 3)
    return ([c.floats(batch, group * kv, queries, dim), c.floats(batch, kv, keys, dim),
             c.floats(batch, kv, keys, value_dim), mask if mask is None else c.place(mask)],
            {"causal": c.pick(None, "bottom_right", "top_left"), "scale": c.pick(None, 0.3)})


def _attend(q, k, v, mask, causal, scale, out=None):
    return nf.scaled_dot_product_attention(q, k, v, mask, is_causal=causal is not None, scale=scale, out=out,
                                           causal_align=causal or "bottom_right")


def _attended(q, k, v, mask, causal, scale):
    if mask is not None:
        mask = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    return oracle.attention(q, k, v, mask, causal, scale)[0]


def _linear(c):
    shape, depth, width = c.shape(0, 2), c.size(0, 40), c.size(0, 40)
    return ([c.floats(*shape, depth), c.floats(width, depth), c.pick(None, c.floats(width)),
             c.pick(None, c.floats(*shape, width))], {"activation": c.pick(*ACTIVATIONS)})


def _grouped(c):
    groups, depth, width = c.size(0, 4), c.size(0, 20), c.size(0, 20)
    offsets = np.cumsum([0] + [c.size(0, 6) for _ in range(groups)])
    return ([c.floats(offsets[-1], depth), c.floats(groups, width, depth), c.pick(None, c.floats(groups, width)),
             c.place(offsets, broadcast=False)], {})


def grouped(x, weight, bias, offsets):
    assert offsets[0] == 0 and offsets[-1] == len(x) and len(offsets) == len(weight) + 1
    rows = [linear(x[i:j], w, None if bias is None else bias[e])
            for e, (w, i, j) in enumerate(zip(weight, offsets, offsets[1:]))]
    return np.concatenate([np.zeros((0, weight.shape[1])), *rows])


def _linear_loss(c):
    arrays, options = _loss(c)
    depth, classes, targets = c.size(1, 20), arrays[0].shape[-1], arrays[1]
    return [c.floats(*targets.shape, depth), c.floats(classes, depth), targets], options


def _route(c):
    tokens, number = c.size(0, 20), c.size(1, 9)
    x = c.rng.permuted(np.tile(np.arange(number) * 0.3, (tokens, 1)), axis=1) + 0.1 * c.rng.random((tokens, 1))
    if c.special and x.size:
        x.flat[c.rng.integers(0, x.size, 2)] = c.rng.choice([np.nan, np.inf, -np.inf], 2)
    return [c.place(x.astype(c.dtype), broadcast=False)], {"top_k": c.size(1, number), "normalize": c.pick(True, False)}


def _experts(c):
    arrays, options = _route(c)
    (tokens, number), depth, inner = arrays[0].shape, c.size(1, 9), c.size(1, 9)
    return ([c.floats(tokens, depth), arrays[0], c.floats(number, 2 * inner, depth), c.floats(number, depth, inner)],
            {"top_k": min(options["top_k"], number)})


def _weights(logits, **options):
    routing = moe.route(logits, **options)
    return routing.weight, routing.probabilities


def _there_and_back(x, logits, top_k):
    routing = moe.route(logits, top_k)
    return moe.combine(moe.dispatch(x, routing), routing)


def _moved(c):
    arrays, options = _experts(c)
    return arrays[:2], options


def _quantized(c):
    c.dtype = np.dtype(np.float32)
    depth, width = c.size(1, 70), c.size(1, 40)
    spec = quant.QuantSpec(c.pick(4, 8), c.pick(None, 32), c.pick(True, False))
    weight = c.rng.standard_normal((width, depth)).astype(np.float32)
    return ([c.floats(*c.shape(0, 2), depth), c.pick(None, c.floats(width))], {"weight": weight, "spec": spec})


def _quantized_linear(x, bias, weight, spec, out=None):
    return quant.linear(x, quant.quantize(weight, spec), bias, compute="float32", out=out)


def _bytes(c):
    depth = c.size()
    return [c.integers(-128, 128, c.size(), depth, dtype=np.int8) for _ in range(2)], {}


OPS = {
    "gelu": Op(_same(1, approximate=FORMS), nf.gelu, oracle.gelu, 1, 1e-6, out=True),
    "silu": Op(_same(1), nf.silu, silu, 1, 1e-6, out=True),
    "swiglu": Op(_same(2, False), nf.swiglu, lambda gate, up: silu(gate) * up, 2, 1e-6),
    "geglu": Op(_same(2, False, approximate=FORMS), nf.geglu,
                lambda gate, up, approximate: oracle.gelu(gate, approximate) * up, 2, 1e-6),
    "bias_gelu": Op(_bias_gelu, nf.bias_gelu, lambda x, bias, approximate: oracle.gelu(x + bias, approximate), 2, 1e-5),
    "layer_norm": Op(_norm(2), nf.layer_norm, layer_norm, 3),
    "rms_norm": Op(_norm(1), nf.rms_norm, oracle.rms_norm, 2),
    "add_layer_norm": Op(_norm(2, 2), nf.add_layer_norm,
                         lambda x, r, w, b, eps: (layer_norm(wide(x) + r, w, b, eps), wide(x) + r), 4),
    "add_rms_norm": Op(_norm(1, 2), nf.add_rms_norm,
                       lambda x, r, w, eps: (oracle.rms_norm(wide(x) + r, w, eps), wide(x) + r), 3),
    "softmax": Op(_softmax, nf.softmax, softmax, 1),
    "log_softmax": Op(_softmax, nf.log_softmax, log_softmax, 1),
    "cross_entropy": Op(_loss, nf.cross_entropy, cross_entropy, 1),
    "token_log_probs": Op(_log_probs, nf.token_log_probs,
                          lambda x, t, temperature: -cross_entropy(wide(x) / temperature, t, reduction="none"), 1),
    "softmax_entropy": Op(lambda c: ([c.floats(*c.shape(0, 2), c.size(1))], {"temperature": c.pick(1.0, 0.7)}),
                          nf.softmax_entropy, entropy, 1),
    "embedding": Op(_embedding, lambda weight, ids: nf.embedding(ids, weight),
                    lambda weight, ids: wide(weight)[ids], 1),
    "rotary": Op(_rotary, nf.rotary_embedding, rotary, 1, out=True),
    "dropout": Op(_same(1, p=(0.0, 0.3, 1.0), seed=(0, 1)),
                  lambda x, p, seed: nf.dropout(x, p, np.random.default_rng(seed)), dropout, 1, 1e-6),
    "attention": Op(_attention, _attend, _attended, 3, out=True),
    "linear": Op(_linear, lambda x, w, b, r, **options: nf.linear(x, w, b, residual=r, **options), linear, 4, out=True),
    "grouped_linear": Op(_grouped, lambda x, w, b, offsets: nf.grouped_linear(x, w, offsets, b), grouped, 3),
    "linear_cross_entropy": Op(_linear_loss, nf.linear_cross_entropy,
                               lambda x, w, t, **options: cross_entropy(wide(x) @ wide(w).T, t, **options), 2),
    "route": Op(_route, _weights, routed, 1),
    "dispatch and combine": Op(_moved, _there_and_back, moved, 2),
    "mlp": Op(_experts, lambda x, logits, gate_up, down, top_k: moe.mlp(x, moe.route(logits, top_k), gate_up, down),
              experts, 4),
    "router_z_loss": Op(lambda c: ([c.floats(c.size(), c.size(1, 9))], {}), moe.router_z_loss,
                        lambda x: np.square(np.logaddexp.reduce(wide(x), 1)).sum() / max(len(x), 1), 1),
    "quant.linear": Op(_quantized, _quantized_linear, quantized, out=True),
    "int8_matmul": Op(_bytes, quant.int8_matmul, lambda a, b: a.astype(np.int64) @ b.astype(np.int64).T),
}


def every(argument):
    return argument if type(argument) is tuple else (argument,)


def agree(got, want, rtol, sums=True):
    """Equal to within rtol of each number, or of the largest of the result where numbers are `sums` of many."""
    assert got.shape == want.shape
    tiny, most = 0, 0
    if got.dtype.kind == "f":
        with np.errstate(over="ignore"):
            want = want.astype(got.dtype)
        rtol = rtol if got.dtype == np.float32 else rtol * 1e-6
        finite = np.abs(want[np.isfinite(want)])
        tiny = 4 * np.finfo(got.dtype).smallest_subnormal
        most = finite.max(initial=0) + 0.01 if sums else 0
    np.testing.assert_allclose(got, want, rtol=rtol, atol=max(rtol * most, tiny))


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_the_right_answer_or_an_error_and_touches_nothing_else(name, threads):
    op = OPS[name]

    @cases()
    @given(st.data())
    def check(data):
        c = Case(data.draw)
        _core.cap_isa(c.pick(*LEVELS))
        threads(c.pick(1, 2))
        arrays, options = op.arguments(c)
        spoiled = c.pick(False, False, False, True)
        if spoiled:
            arrays = c.spoil(arrays)
        copies = [x if x is None else np.array(x) for x in arrays]
        out = None
        with np.errstate(all="ignore"):
            try:
                want = op.formula(*copies, **options)
            except Exception as error:      # what it says is of use where the op does not refuse
                want, refused = None, error
        if op.out and c.pick(False, True):
            out = c.out(arrays, np.shape(copies[0] if want is None else want))
        outside = [(memory, before, owned(memory, out)) for memory, before in c.memory]
        try:
            with np.errstate(all="ignore"):
                got = op.call(*arrays, **options, **({} if out is None else {"out": out}))
        except (TypeError, ValueError):
            got = None
            assert spoiled or out is not None or not all(x is None or x.flags.aligned for x in arrays)
        for memory, before, free in outside:
            assert (memory == before)[~free | (got is None)].all()
        if got is None:
            return
        assert want is not None, refused
        assert out is None or got is out
        for g, w in zip(every(got), every(want)):
            agree(g, np.broadcast_to(w, g.shape) if out is not None else np.asarray(w), op.rtol, op.rtol > 1e-5)

    best = _core.get_isa()
    try:
        check()
    finally:
        _core.cap_isa(best)


def owned(memory, out):
    """Which bytes of `memory` are those of `out`."""
    mine = np.zeros(memory.size, bool)
    if out is not None and np.shares_memory(memory, out):
        first = out.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
        mine = np.ndarray(mine.shape, bool, mine)
        places = np.ndarray((*out.shape, out.itemsize), bool, mine, first, (*out.strides, 1)) if out.size else mine[:0]
        places[...] = True
    return mine


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.slopes])
def test_gradients_are_those_of_finite_differences(name):
    op = OPS[name]

    @cases(2)
    @given(st.data())
    def check(data):
        c = Case(data.draw, smooth=True)
        arrays, options = op.arguments(c)
        tensors = [nf.Tensor(x, requires_grad=i < op.slopes) if x is not None and x.dtype.kind == "f" else x
                   for i, x in enumerate(arrays)]
        results = every(op.call(*tensors, **options))
        weights = [c.rng.standard_normal(y.shape) for y in results]
        loss = sum((y * w).sum() for y, w in zip(results, weights))
        if loss.requires_grad:
            loss.backward()
        copies = [None if x is None else x.copy() for x in arrays]

        def weighted():
            results = every(op.call(*copies, **options))
            return np.asarray(sum((y * w).sum() for y, w in zip(results, weights)))

        for t, x in zip(tensors[: op.slopes], copies):
            if x is not None and x.size:
                np.testing.assert_allclose(t.grad, slope(weighted, x, 1.0), rtol=1e-5, atol=1e-7)
        assert all((memory == before).all() for memory, before in c.memory)

    check()


@cases()
@given(st.data())
def test_adamw_changes_the_parameters_and_moments_alone(data):
    c = Case(data.draw)
    c.special = False
    shapes = [c.shape(0, 3) for _ in range(c.size(0, 5))]
    grads = [c.floats(*shape) for shape in shapes]
    memory = [[c.watched(64 + math.prod(shape) * c.dtype.itemsize + 64) for shape in shapes] for _ in range(3)]
    params, m, v = ([np.ndarray(shape, c.dtype, x, 64) for shape, x in zip(shapes, memory[k])] for k in range(3))
    for k, arrays in enumerate((params, m, v)):
        for x, place in zip(arrays, memory[k]):
            x[...] = np.abs(c.rng.standard_normal(x.shape))
            c.remember(place)
    step, lr, decay, scale, (b1, b2), eps = c.size(1, 5), 0.1, c.pick(0.0, 0.2), c.pick(1.0, 0.5), (0.9, 0.98), 1e-8
    want = []
    for p, g, a, b in zip(params, grads, m, v):
        g = wide(g) * scale
        a, b = b1 * wide(a) + (1 - b1) * g, b2 * wide(b) + (1 - b2) * g * g
        want += [wide(p) * (1 - lr * decay) - lr * (a / (1 - b1**step)) / (np.sqrt(b / (1 - b2**step)) + eps), a, b]
    try:
        adamw_step(params, grads, m, v, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, step=step, grad_scale=scale)
    except TypeError:
        assert not all(x.flags.aligned for x in grads)
        return
    for got, right in zip([x for three in zip(params, m, v) for x in three], want):
        agree(got, right, 1e-4)
    mine = {id(x) for part in memory for x in part}
    for place, before in c.memory:
        outside = np.r_[:64, place.size - 64:place.size] if id(place) in mine else slice(None)
        assert (place[outside] == before[outside]).all()


@cases()
@given(st.data())
def test_the_global_norm_is_that_of_all_elements(data):
    c = Case(data.draw)
    c.special = False
    arrays = [c.floats(*c.shape(0, 3)) for _ in range(c.size(0, 5))]
    try:
        got = global_norm(arrays)
    except TypeError:
        assert not all(x.flags.aligned for x in arrays)
        return
    want = math.sqrt(sum(np.square(wide(x)).sum() for x in arrays))
    assert got == pytest.approx(want, rel=1e-6, abs=sys.float_info.min)
