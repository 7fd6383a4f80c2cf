"""What every feature of attention promises: bits that depend on the input alone, masked slots that may hold anything,
no overflow, an error like the naive formula's, memory O(S D)."""
import os
import subprocess
import sys

import numpy as np
import pytest

import numformer as nf
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward
from tests import oracle
from tests.conftest import COMBINATIONS, levels
from tests.kernels.test_attention import arrays, sdpa
from tests.kernels.test_attention_backward import upstream
from tests.kernels.test_attention_features import random_case, run, summed


def keywords(heads, keys, seed=0):
    """All features at once but key lengths, for float32 and any number of queries; masks are made by the tests."""
    rng = np.random.default_rng(seed)
    return {"is_causal": True, "window_size": (150, 0), "softcap": 2.0, "slopes": nf.alibi_slopes(heads),
            "sinks": rng.standard_normal(heads, np.float32)}


def public(features):
    """The same for the public function."""
    return {{"slopes": "alibi_slopes", "mask": "attn_mask"}.get(name, name): x for name, x in features.items()}


def with_dropout(features):
    return {**features, "dropout_p": 0.2, "rng": np.random.default_rng(4)}


def flat(results):
    out, lse, gradients = results
    return [out, lse, *(x for x in gradients.values() if x is not None)]


def identical(a, b):
    return len(a) == len(b) and all((x == y).all() for x, y in zip(a, b))


@pytest.mark.parametrize("shape", [(4, 2, 300, 300), (1, 1, 300, 300), (300, 1), (1, 4, 1, 300), (2, 1, 1, 300),
                                   (2, 1, 300, 1)])
def test_any_number_of_threads_gives_the_same_bits(threads, shape):
    q, k, v = arrays(4, 2, 300, 300, 16, batch=2)
    dout, dlse = upstream(q, v), np.random.default_rng(1).standard_normal((2, 4, 300), np.float32)
    if shape[0] == 4:
        shape = (2, 4, 300, 300)
    mask = np.random.default_rng(2).standard_normal(shape, np.float32)
    results = []
    for n in (1, 2, 3):
        threads(n)
        features = with_dropout(keywords(4, 300))
        results.append(flat(run(q, k, v, dout, dlse, mask, kv_lengths=[300, 170], **features)))
    assert identical(results[0], results[1]) and identical(results[0], results[2])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_cached_step_has_the_bits_of_the_full_forward(dtype):
    q, k, v = arrays(4, 2, 290, 290, 32, dtype=dtype)
    mask = np.random.default_rng(0).standard_normal((290, 290)).astype(dtype)
    features = {name: x.astype(dtype) if hasattr(x, "astype") else x for name, x in keywords(4, 290).items()}
    for drop in ({}, {"dropout_p": 0.3}):
        def call(rows, n, drop=drop):
            rng = {"rng": np.random.default_rng(6)} if drop else {}
            return sdpa(q[:, :, rows], k[:, :, :n], v[:, :, :n], mask[rows, :n], return_lse=True, **public(features),
                        **drop, **rng)
        full, full_lse = call(slice(0, 290), 290)
        for n in (1, 16, 129, 200, 290):
            for step in (1, 3, 70):
                if step <= n:
                    rows = slice(n - step, n)
                    out, lse = call(rows, n)
                    assert (out == full[:, :, rows]).all() and (lse == full_lse[:, :, rows]).all(), (n, step)


def test_alone_or_in_a_batch_the_bits_are_the_same():
    q, k, v = arrays(4, 2, 60, 130, 16, batch=3)
    dout, dlse = upstream(q, v), np.random.default_rng(1).standard_normal((3, 4, 60), np.float32)
    mask = np.random.default_rng(2).standard_normal((3, 1, 60, 130), np.float32)
    out, lse, whole = run(q, k, v, dout, dlse, mask, **keywords(4, 130))
    for b in range(3):
        one = slice(b, b + 1)
        alone = run(q[one], k[one], v[one], dout[one], dlse[one], mask[one], **keywords(4, 130))
        assert (alone[0] == out[one]).all() and (alone[1] == lse[one]).all()
        for name in ("q", "k", "v", "mask"):
            assert (alone[2][name] == whole[name][one]).all()


@pytest.mark.parametrize("queries", [1, 60])
@pytest.mark.parametrize("causal_align", ["bottom_right", "top_left"])
def test_padding_changes_no_bits_is_never_read_and_gets_no_gradient(causal_align, queries):
    q, k, v = arrays(4, 2, queries, 200, 16, batch=3)
    lengths = [200, 0, 70]
    dout, dlse = upstream(q, v), np.random.default_rng(1).standard_normal((3, 4, queries), np.float32)
    features = {**keywords(4, 200), "causal_align": causal_align}
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = np.nan
    out, lse, whole = run(q, k, v, dout, dlse, kv_lengths=np.array(lengths), **features)
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone = run(q[one], k[one, :, :n], v[one, :, :n], dout[one], dlse[one], **features)
        assert (alone[0] == out[one]).all() and (alone[1] == lse[one]).all()
        assert (alone[2]["q"] == whole["q"][one]).all()
        for name in "kv":
            assert (alone[2][name] == whole[name][one, :, :n]).all() and (whole[name][b, :, n:] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_slots_may_hold_anything(value):
    q, k, v = arrays(2, 1, 60, 170, 24)
    rng = np.random.default_rng(3)
    mask = rng.standard_normal((60, 170), np.float32)
    mask[:, [7, 130]] = -np.inf         # seen by nobody
    mask[20] = -np.inf                  # sees nobody
    dout, dlse = upstream(q, v), rng.standard_normal((1, 2, 60), np.float32)
    features = {**keywords(2, 170), "is_causal": False, "window_size": (30, 20)}
    nothing_before = 170 - 60 - 30      # the window of the first query begins there

    def results():
        return flat(run(q, k, v, dout, dlse, mask, **with_dropout(features)))

    clean = results()
    for array, index in ((k, [7, 130]), (v, [7, 130]), (q, [20]), (dout, [20]), (k, slice(0, nothing_before)),
                         (v, slice(0, nothing_before))):
        before = array[:, :, index].copy()
        array[:, :, index] = value
        assert identical(results(), clean)
        array[:, :, index] = before


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse", "mask", "slopes", "sinks"])
def test_nan_shows_in_all_that_depends_on_it_and_in_nothing_else(name):
    for seed in range(min(20, COMBINATIONS // 5)):
        (q, k, v, dout, dlse), ours, theirs = random_case(seed, np.float32 if seed % 2 else np.float64)
        rng = np.random.default_rng(seed)
        x = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse, **theirs}.get(name)
        if x is None or x.dtype.kind != "f":
            continue
        x.flat[rng.integers(0, x.size, 2)] = np.nan
        out, lse, gradients = run(q, k, v, dout, dlse, **ours)
        want, want_lse = oracle.attention(q, k, v, **theirs)
        g = oracle.attention_gradients(q, k, v, dout, dlse, **theirs)
        assert (np.isnan(out) == np.isnan(want)).all() and (np.isnan(lse) == np.isnan(want_lse)).all()
        for key, got in gradients.items():
            if got is not None:
                assert (np.isnan(got) == np.isnan(summed(g[key], got.shape))).all(), (key, seed)


def test_a_row_that_sees_nothing_is_zero_with_zero_gradients():
    q, k, v = arrays(2, 1, 20, 9, 8)
    dout, dlse = upstream(q, v), np.random.default_rng(0).standard_normal((1, 2, 20), np.float32)
    for features in ({"is_causal": True}, {"window_size": (2, 0)}, {"is_causal": True, "softcap": 3.0},
                     {"is_causal": True, "slopes": nf.alibi_slopes(2)}, with_dropout({"is_causal": True}),
                     {"is_causal": True, "kv_lengths": [4]}):
        out, lse, gradients = run(q, k, v, dout, dlse, np.zeros((20, 9), np.float32), **features)
        empty = np.isinf(lse)
        assert empty[:, :, :11].all() and (lse[empty] == -np.inf).all() and (out[empty] == 0).all()
        assert (gradients["q"][empty] == 0).all() and all(np.isfinite(x).all() for x in flat((out, out, gradients)))
        assert (gradients["mask"][:11] == 0).all()
    sinks = np.float32([0.5, -2])
    out, lse, gradients = run(q, k, v, dout, dlse, sinks=sinks, is_causal=True)
    assert (out[:, :, :11] == 0).all() and np.allclose(lse[0, :, :11], sinks[:, None])
    assert (gradients["q"][:, :, :11] == 0).all()


@pytest.mark.parametrize("features", [{}, {"softcap": 20000.0}, {"slopes": np.float32([100.0])},
                                      {"sinks": np.float32([2e4])}, {"sinks": np.float32([-2e4])},
                                      {"window_size": (9, 9)}])
def test_scores_of_ten_thousand_do_not_overflow(features):
    q, k, v = arrays(1, 1, 20, 150, 16)
    q, k = q * 100, k * 100
    assert np.abs(q @ k.swapaxes(2, 3) / 4).max() > 1e4
    dout, dlse = upstream(q, v), np.random.default_rng(1).standard_normal((1, 1, 20), np.float32)
    out, lse, gradients = run(q, k, v, dout, dlse, **features)
    assert all(np.isfinite(x).all() for x in flat((out, lse, gradients)))
    theirs = {{"window_size": "window"}.get(name, name): x for name, x in features.items()}
    want, want_lse = oracle.attention(q, k, v, **theirs)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    np.testing.assert_allclose(out, want, rtol=2e-2, atol=2e-2)


def naive(q, k, v, dout, softcap=0.0, slopes=None, sinks=None, window=None):
    """(out, dq, dk, dv) of the formula in float32; one head."""
    scale = np.float32(1 / np.sqrt(q.shape[3]))
    s = q @ k.swapaxes(2, 3) * scale
    t = np.tanh(s / np.float32(softcap)) if softcap else np.zeros_like(s)
    s = t * np.float32(softcap) if softcap else s
    ahead = np.arange(k.shape[2]) - (np.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2])
    if slopes is not None:
        s = s + slopes[0] * ahead.astype(np.float32)
    if window:
        s = np.where((ahead >= -window[0]) & (ahead <= window[1]), s, np.float32(-np.inf))
    top = s.max(axis=3, keepdims=True) if sinks is None else np.maximum(s.max(axis=3, keepdims=True), sinks[0])
    p = np.exp(s - top)
    p /= p.sum(axis=3, keepdims=True) + (0 if sinks is None else np.exp(sinks[0] - top))
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(axis=3, keepdims=True)) * (1 - t * t)
    return p @ v, ds @ k * scale, ds.swapaxes(2, 3) @ q * scale, p.swapaxes(2, 3) @ dout


@pytest.mark.parametrize("features", [{"softcap": 2.0}, {"softcap": 50.0}, {"slopes": np.float32([0.25])},
                                      {"sinks": np.float32([1.5])}, {"window": (20, 5)}])
def test_error_is_at_most_twice_that_of_the_naive_formula(features):
    ours, plain = np.zeros(4), np.zeros(4)
    mine = {{"window": "window_size"}.get(name, name): x for name, x in features.items()}
    for seed in range(4):
        q, k, v = arrays(1, 1, 60, 90, 32, seed=seed)
        dout = upstream(q, v, seed)
        g = oracle.attention_gradients(q, k, v, dout, **features)
        want = [oracle.attention(q, k, v, **features)[0], g["q"], g["k"], g["v"]]
        out, saved = attention_forward(q, k, v, alibi_slopes=mine.get("slopes"), sinks=mine.get("sinks"),
                                       **{n: x for n, x in mine.items() if n not in ("slopes", "sinks")})
        got = [out, *attention_backward(dout, saved)[:3]]
        for i, other in enumerate(naive(q, k, v, dout, **features)):
            ours[i] = max(ours[i], np.sqrt(np.mean((got[i] - want[i]) ** 2)))
            plain[i] = max(plain[i], np.sqrt(np.mean((other - want[i]) ** 2)))
    assert (ours <= 2 * plain).all(), ours / plain


@pytest.mark.parametrize("queries", [1, 60])
def test_the_caller_has_its_denormal_numbers_as_before(queries):
    q, k, v = arrays(2, 1, queries, 60, 16)
    out, saved = attention_forward(q, k, v)
    attention_backward(np.ones_like(out), saved)
    assert (np.full(8, np.finfo(np.float32).tiny) / np.float32(2) > 0).all()


MEMORY = """
import resource, numpy as np, numformer as nf
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward
rng = np.random.default_rng(0)
q, k, v, dout = (rng.standard_normal((1, 1, 32768, 64), np.float32) for _ in range(4))
keywords = dict(window_size=(64, 0), dropout_p=0.1, rng=rng)
small = [x[:, :, :200] for x in (q, k, v)]
attention_backward(dout[:, :, :200], attention_forward(*small, alibi_slopes=nf.alibi_slopes(1), **keywords)[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, saved = attention_forward(q, k, v, alibi_slopes=nf.alibi_slopes(1), **keywords)
attention_backward(dout, saved)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.native
def test_memory_is_proportional_to_the_length(isa):
    if isa != levels()[-1]:
        pytest.skip("the memory does not depend on the instruction set")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 300       # MB; the matrix of scores would take 4096


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_key_that_the_mask_hides_from_every_query_does_not_reach_the_slopes(value):
    q, k, v = arrays(1, 1, 5, 9, 16)
    mask = np.ones((5, 9), bool)
    mask[:, 4] = False
    gradients = []
    for anything in (0, value):
        k[:, :, 4] = v[:, :, 4] = anything
        gradients.append(run(q, k, v, upstream(q, v), None, mask, slopes=np.float32([0.1]))[2]["slopes"])
    assert (gradients[0] == gradients[1]).all()


BEYOND = """
import numpy as np, numformer as nf
q = np.ones((1, 64, 300, 64), np.float32)
keywords = dict(is_causal=True, causal_align="top_left", window_size=(10, 0))
cache = np.ones((2, 4, 1, 64), np.float32)
table = np.array([[1, 0, 2**40, -2**40] + [2**40] * 100])
out = nf.paged_attention(q, cache, cache, table, [5], **keywords)
print((out[:, :, :15] == 1).all() and (out[:, :, 15:] == 0).all())
"""


@pytest.mark.native
def test_queries_whose_window_lies_behind_the_last_key_read_nothing(isa):
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"NUMFORMER_ISA": isa})
    assert done.stdout.strip() == "True", (done.returncode, done.stderr)
