"""The error of attention against float64, forward and backward, beside that of the formula written out in float32.

The written-out formula holds S x S matrices, takes NumPy's products and sums by pairs; the kernel holds none of that.
Inputs are the ones that cost digits: rows that share a large offset, keys that take all the weight, 8192 terms.
"""
import functools

import numpy as np
import pytest

from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward

RESULTS = ("out", "dq", "dk", "dv")
SHAPES = [(512, 512), (200, 8192), (8192, 200)]
pytestmark = pytest.mark.native


def formula(q, k, v, dout, dtype):
    """out, dq, dk, dv of one head, all in `dtype`."""
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    scale = dtype(1 / np.sqrt(q.shape[1]))
    s = q @ k.T * scale
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    dp = dout @ v.T
    ds = p * (dp - (dp * p).sum(axis=1, keepdims=True))
    return p @ v, ds @ k * scale, ds.T @ q * scale, p.T @ dout


def inputs(name, sq, sk, seed):
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((n, 64), np.float32) for n in (sq, sk, sk, sq))
    offset = np.float32(100 * rng.uniform(0.5, 1))
    if "scores" in name:            # up to several hundred, all alike but for a few
        q, k = q + offset / 10, k + offset / 10
    if "keys" in name:
        k = k + offset / 10
    if "values" in name:
        v = v + offset
    if "gradient" in name:
        dout = dout + offset
    if "equal" in name:
        q = q * np.float32(1e-3)
    if "dominating" in name:        # every query gives it all the weight
        q, k[sk // 3] = np.abs(q), 8
    if "leading" in name:           # or nearly all
        q, k[sk // 3] = np.abs(q), 3
    return q, k, v, dout


@functools.lru_cache
def references(name, sq, sk, seed):
    """What is right, and the errors of the formula in float32."""
    x = inputs(name, sq, sk, seed)
    right = formula(*x, np.float64)
    return right, [y - want for y, want in zip(formula(*x, np.float32), right)]


def rms(errors):
    return np.sqrt(np.mean([np.mean(np.square(e)) for e in errors]))


def largest(errors):
    return max(np.abs(e).max() for e in errors)


# Root mean square errors of out, dq, dk, dv as a share of the formula's, at most. Where out holds the bound of 1 and dq
# or dk does not, it is delta = rowsum(dO * out): it has the rounding of out in it, where the formula sums the rounded
# products that delta is subtracted from, so that what all of them share cancels. One leading key: what is far below the
# last place of its value is added chunk by chunk.
LIMITS = {
    "normal": (1, 1, 1, 1),
    "equal scores": (1, 2, 1, 1),
    "large offset of the gradient": (1, 1, 1.2, 1.3),
    "large offset of values": (1, 2.5, 1.6, 1),
    "large offset of values and the gradient": (1, 1.7, 1.1, 1.3),
    "large offset of keys and values": (1, 4, 1.6, 1.3),
    "large offset of scores": (1.2, 1.2, 1.8, 1.4),
    "large offset of scores, values and the gradient": (1.1, 2, 30, 1.4),   # dk of 1 beside sums of 10^5
    "one dominating key": (1.01, 1.01, 1.01, 1),
    "one dominating key, large offset of values and the gradient": (1.01, 1.01, 1.01, 1.3),
    "one leading key": (1.7, 3, 5, 1.2),
    "one leading key, large offset of values": (1.2, 5.5, 6, 1.3),
}


@pytest.mark.parametrize(("sq", "sk"), SHAPES)
@pytest.mark.parametrize("name", LIMITS)
def test_error_is_that_of_the_formula_in_float32(name, sq, sk):
    ours, theirs = [[] for _ in RESULTS], [[] for _ in RESULTS]
    for seed in range(4 if sq == sk else 2):
        x = [a[None, None] for a in inputs(name, sq, sk, seed)]
        right, errors = references(name, sq, sk, seed)
        out, saved = attention_forward(*x[:3])
        for i, got in enumerate((out, *attention_backward(x[3], saved)[:3])):
            ours[i].append(got[0, 0] - right[i])
            theirs[i].append(errors[i])
    for result, mine, its, limit in zip(RESULTS, ours, theirs, LIMITS[name]):
        assert rms(mine) <= limit * rms(its), f"{result}: {rms(mine) / rms(its):.2f}"
        assert largest(mine) <= 2.5 * limit * largest(its), f"{result}: {largest(mine) / largest(its):.2f}"
