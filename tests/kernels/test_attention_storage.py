"""float16, bfloat16 and int8 are storage: what is computed is what float32 computes from the same numbers."""
import subprocess
import sys

import numpy as np
import pytest

import numformer as nf
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward
from numformer.ops.varlen import attention_varlen_backward, attention_varlen_forward
from tests import oracle
from tests.conftest import COMBINATIONS, levels
from tests.kernels.test_attention import arrays, sdpa
from tests.kernels.test_attention_backward import upstream
from tests.kernels.test_attention_features import random_case, run, summed
from tests.kernels.test_attention_varlen import paged, starts, tokens

ml_dtypes = pytest.importorskip("ml_dtypes")
BFLOAT16 = ml_dtypes.bfloat16
SHORT = [np.float16, BFLOAT16]
DIGITS = {np.float16: (10, -14), BFLOAT16: (7, -126)}       # of the fraction, and the least exponent


def unit(x, dtype):
    """Half a unit of the last place that `dtype` has at x."""
    digits, least = DIGITS[dtype]
    exponent = np.frexp(np.where(x == 0, 1, x))[1] - 1
    return np.ldexp(0.5, np.where(x == 0, least, np.maximum(exponent, least)) - digits)


def wide(*x):
    return tuple(a.astype(np.float32) for a in x)


def same(a, b):
    return a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def nothing(x):
    """Where a result may be 0 in place of x: below the least normal float32."""
    return np.abs(x.astype(np.float32)) < np.finfo(np.float32).tiny


@pytest.mark.parametrize("dtype", SHORT)
def test_every_number_comes_back_as_it_was_or_as_0_below_the_normal_ones(dtype):
    v = np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 1, 1, 256)
    q = np.zeros((256, 1, 60, 8), dtype)
    with np.errstate(invalid="ignore"):
        for queries in (1, 60):
            out = sdpa(q[:, :, :queries], q[:, :, :1], v)
            assert same(np.where(nothing(v) & (out == 0), v, out), np.broadcast_to(v, out.shape))


@pytest.mark.parametrize("dtype", SHORT)
def test_results_are_rounded_to_the_nearest_and_ties_to_even(dtype):
    top = {np.float16: 0x7BFF, BFLOAT16: 0x7EFF}[dtype]                         # their sum is a float32
    bits = np.arange(top, dtype=np.uint16)
    pair = np.stack([bits, bits + np.uint16(1)])[None, None].view(dtype)        # of neighbours
    q, want = np.zeros((1, 1, 1, 8), dtype), pair[:, :, :1].astype(float) / 2 + pair[:, :, 1:].astype(float) / 2
    out = sdpa(q, np.zeros((1, 1, 2, 8), dtype), pair)
    assert ((out == want.astype(dtype)) | nothing(want) & (out == 0)).all()
    assert (out.view(np.uint16) & 1 == 0).all()
    assert (sdpa(-q, np.zeros((1, 1, 2, 8), dtype), -pair) == -out).all()


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("dim, value_dim, queries", [(1, 5, 20), (40, 24, 60), (64, 64, 1), (80, 128, 97), (12, 3, 8)])
def test_out_and_lse_are_those_of_float32_rounded_once(dtype, dim, value_dim, queries):
    q, k, v = (x.astype(dtype) for x in arrays(4, 2, queries, 150, dim, value_dim, batch=2))
    for features in ({}, {"is_causal": True}, {"window_size": (70, 3)}):
        out, lse = sdpa(q, k, v, return_lse=True, **features)
        want, want_lse = sdpa(*wide(q, k, v), return_lse=True, **features)
        assert same(out, want.astype(dtype)) and same(lse, want_lse)
    true, _ = oracle.attention(q, k, v)
    error = np.abs(sdpa(q, k, v).astype(float) - true)
    assert (error <= 1.01 * unit(true, dtype) + 1e-6).all()


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("seed", range(min(20, COMBINATIONS // 5)))
def test_random_combinations_of_features_both_ways(dtype, seed):
    (q, k, v, dout, dlse), ours, theirs = random_case(seed, np.float32)
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    for name in ("mask", "slopes", "sinks"):            # in the short dtype, or left in float32
        x = ours.get(name)
        if seed % 2 and x is not None and x.dtype != bool:
            ours[name] = theirs[name] = x.astype(dtype)
    out, lse, got = run(q, k, v, dout, dlse, **ours)
    want, want_lse = oracle.attention(q, k, v, **theirs)
    assert out.dtype == dtype and lse.dtype == np.float32
    assert (np.abs(out.astype(float) - want) <= 1.01 * unit(want, dtype) + 3e-6).all()
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=4e-6)
    whole = oracle.attention_gradients(q, k, v, dout.astype(float), dlse.astype(float), **theirs)
    for name, x in got.items():
        given = {"q": q, "k": k, "v": v}.get(name, ours.get(name))
        if x is None:
            assert given is None or given.dtype == bool
            continue
        true = summed(whole[name], x.shape)
        assert x.dtype == given.dtype and x.shape == given.shape
        size = np.abs(true).max(initial=1)
        if x.dtype == dtype:
            assert (np.abs(x.astype(float) - true) <= 1.01 * unit(true, dtype) + 2e-5 * size).all()
        else:
            np.testing.assert_allclose(x, true, rtol=2e-5, atol=2e-5 * size)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("queries", [1, 8, 130])
@pytest.mark.parametrize("mean", [0, 5])
def test_gradients_are_those_of_float32_rounded_once(dtype, queries, mean):
    # where all keys and all values have much in common, a rounded output would cost most of the digits of dq
    q, k, v = (x.astype(dtype) for x in arrays(4, 2, queries, 130, 40, 24, batch=2))
    k, v = (x + dtype(mean) for x in (k, v))
    dout = upstream(q, v)
    want = oracle.attention_gradients(q, k, v, dout.astype(float), causal="bottom_right")
    _, saved = attention_forward(q, k, v, is_causal=True)
    _, wide_saved = attention_forward(*wide(q, k, v), is_causal=True)
    for x, y, name in zip(attention_backward(dout, saved), attention_backward(*wide(dout), wide_saved), "qkv"):
        assert same(x, y.astype(dtype))
        assert (np.abs(x.astype(float) - want[name]) <= 1.01 * unit(want[name], dtype) + 1e-5 * (1 + mean**2)).all()


@pytest.mark.parametrize("dtype", SHORT)
def test_bits_do_not_depend_on_threads_batch_or_the_cut(dtype, threads):
    q, k, v = (x.astype(dtype) for x in arrays(4, 2, 290, 290, 32, batch=2))
    dout = upstream(q, v)

    def both(rows=slice(None)):
        out, saved = attention_forward(q[rows], k[rows], v[rows], is_causal=True)
        return [out, *attention_backward(dout[rows], saved)[:3]]

    threads(1)
    first = both()
    for n in (2, 3):
        threads(n)
        assert all(same(a, b) for a, b in zip(first, both(), strict=True))
    assert all(same(a, b[1:]) for a, b in zip(both(slice(1, 2)), first, strict=True))
    for n in (1, 16, 127, 129, 290):
        for step in (1, 3, 8, 9, 50):
            if step <= n:
                out = sdpa(q[:, :, n - step:n], k[:, :, :n], v[:, :, :n], is_causal=True)
                assert same(out, first[0][:, :, n - step:n])
    padded = sdpa(q, np.concatenate([k, k], 2), np.concatenate([v, np.full_like(v, np.nan)], 2), is_causal=True,
                  kv_lengths=[290, 290])
    assert same(padded, first[0])


@pytest.mark.parametrize("dtype", SHORT)
def test_masked_slots_may_hold_anything_and_empty_rows_are_zero(dtype):
    q, k, v = (x.astype(dtype) for x in arrays(2, 1, 60, 200, 24))
    mask = np.random.default_rng(3).random((60, 200)) < 0.8
    mask[:, [7, 130]] = False
    mask[20] = False
    dout = upstream(q, v)

    def results():
        (out, lse), saved = attention_forward(q, k, v, mask, return_lse=True)
        return [out, lse, *attention_backward((dout, None), saved)[:3]]

    clean = results()
    assert (clean[0][0, :, 20] == 0).all() and (clean[1][0, :, 20] == -np.inf).all() and (clean[2][0, :, 20] == 0).all()
    for value in (np.nan, np.inf):
        k[:, :, [7, 130]] = v[:, :, [7, 130]] = q[:, :, 20] = dout[:, :, 20] = value
        assert all(same(a, b) for a, b in zip(results(), clean, strict=True))


@pytest.mark.parametrize("dtype", SHORT)
def test_packed_sequences_have_the_bits_of_calls_of_their_own(dtype):
    cu_q, cu_k = starts([5, 0, 100, 1, 60]), starts([5, 3, 130, 200, 60])
    q, k, v, dout = (tokens(n, h, 16, seed=s).astype(dtype) for s, (n, h) in
                     enumerate([(cu_q[-1], 4), (cu_k[-1], 2), (cu_k[-1], 2), (cu_q[-1], 4)]))
    (out, lse), saved = attention_varlen_forward(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True,
                                                 is_causal=True)
    gradients = attention_varlen_backward((dout, None), saved)
    for b in range(5):
        i, j = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = [x.transpose(1, 0, 2)[None] for x in (q[i], k[j], v[j])]
        (o, e), its = attention_forward(*one, is_causal=True, return_lse=True)
        g = attention_backward((dout[i].transpose(1, 0, 2)[None], None), its)
        assert same(out[i].transpose(1, 0, 2)[None], o) and same(lse[i].T[None], e)
        for whole, part, x in zip(gradients, (i, j, j), g):
            assert same(whole[part].transpose(1, 0, 2)[None], x)


@pytest.mark.parametrize("dtype", SHORT)
def test_the_tape_carries_short_gradients(dtype):
    leaves = [nf.Tensor(x.astype(dtype), requires_grad=True) for x in arrays(2, 1, 9, 20, 8)]
    out, lse = sdpa(*leaves, return_lse=True, is_causal=True)
    (out.astype(np.float32).sum() + lse.sum()).backward()
    assert out.dtype == dtype and lse.dtype == np.float32 and all(x.grad.dtype == dtype for x in leaves)
    ones = np.ones(out.shape, dtype), np.ones(lse.shape, np.float32)
    _, saved = attention_forward(*(x.data for x in leaves), is_causal=True, return_lse=True)
    assert all(same(a.grad, b) for a, b in zip(leaves, attention_backward(ones, saved)))


@pytest.mark.parametrize("dtype", SHORT)
def test_merged_parts_are_rounded_once(dtype):
    q, k, v = (x.astype(dtype) for x in arrays(4, 2, 9, 60, 16))
    parts = [sdpa(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 20), slice(20, 60))]
    out, lse = nf.merge_attention(*parts[0], *parts[1])
    want, want_lse = nf.merge_attention(parts[0][0].astype(np.float32), parts[0][1], parts[1][0].astype(np.float32),
                                        parts[1][1])
    assert same(out, want.astype(dtype)) and same(lse, want_lse)
    leaves = [nf.Tensor(x, requires_grad=True) for part in parts for x in part]
    merged = nf.merge_attention(*leaves)
    (merged[0].astype(np.float32).sum() + merged[1].sum()).backward()
    assert [x.grad.dtype for x in leaves] == [dtype, np.float32] * 2


def quantized(x):
    """int8 and the scale of each row."""
    scale = (np.abs(x).max(axis=-1) / 127).astype(np.float32)
    return np.rint(x / scale[..., None]).astype(np.int8), scale


@pytest.mark.parametrize("cached", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("size", [1, 16, 24, 256])
@pytest.mark.parametrize("queries", [1, 5, 60])
def test_a_short_cache_gives_the_bits_of_its_numbers_in_one_piece(queries, size, cached):
    q, k, v = arrays(4, 2, queries, 290, 16, 8, batch=3)
    k, v = k.astype(cached), v.astype(cached)
    lengths = np.array([290, 100, 129])
    key_cache, value_cache, table = paged(k, v, lengths, size)
    for dtype in (np.float32, *SHORT):
        for features in ({"is_causal": True}, {"window_size": (50, 0), "softcap": 3.0}):
            step = q.astype(dtype)
            out, lse = nf.paged_attention(step, key_cache, value_cache, table, lengths, return_lse=True, **features)
            want, want_lse = sdpa(*wide(step, k, v), kv_lengths=lengths, return_lse=True, **features)
            assert same(out, want.astype(dtype)) and same(lse, want_lse)


def int8_cache(lengths, size, heads, dim, value_dim, by_head=True):
    """paged_attention's arguments behind the query: random keys and values in int8 whose slots beyond `lengths` hold
    bytes of any value, and scales of NaN and inf."""
    longest = max(lengths)
    k, v = (tokens(len(lengths), heads, longest, d, seed=s) for s, d in enumerate((dim, value_dim)))
    arguments, scales = [], {}
    for name, x in (("key_scale", k), ("value_scale", v)):
        bytes_, scale = quantized(x)
        if not by_head:
            scale[:] = scale[:, :1]
        _, scale, table = paged(scale[..., None], scale[..., None], lengths, size)
        if name == "value_scale":
            scale[np.isnan(scale)] = np.inf
        cache, _, _ = paged(bytes_.astype(np.float32), bytes_.astype(np.float32), lengths, size)
        arguments.append(np.nan_to_num(cache, nan=-128).astype(np.int8))
        scales[name] = scale[..., 0] if by_head else scale[:, :, 0, 0].copy()
    return [*arguments, table, np.array(lengths)], scales


def dequantized(arguments, scales):
    scales = [s.reshape(*s.shape[:2], -1, 1) for s in scales.values()]
    with np.errstate(invalid="ignore"):
        return [*(x * s for x, s in zip(arguments, scales)), *arguments[2:]]


@pytest.mark.parametrize("cached", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("size", [8, 16, 24, 32])
@pytest.mark.parametrize("queries", [1, 60])
def test_slots_of_a_cache_that_no_query_sees_may_hold_anything(queries, size, cached):
    lengths, window = np.array([100, 300]), (33, 0)         # what is read begins at 64 and 264 where there is one query
    _, k, v = (x.astype(cached) for x in arrays(4, 2, 1, 300, 32, 32, batch=2))
    *caches, table = paged(k, v, lengths, size)
    q = tokens(2, 4, queries, 32)
    clean = nf.paged_attention(q, *caches, table, lengths, window_size=window)
    assert np.isfinite(clean).all()
    slot = lengths - queries - 34
    for value in (np.nan, np.inf):
        for cache in caches:
            cache[table[np.arange(2), slot // size], slot % size] = value
        assert same(nf.paged_attention(q, *caches, table, lengths, window_size=window), clean)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("size, dim, value_dim", [(16, 32, 48), (5, 7, 9), (128, 64, 64), (32, 16, 20)])
def test_an_int8_cache_is_its_integers_times_the_scale_of_the_token(size, dim, value_dim, by_head):
    arguments, scales = int8_cache([200, 31, 0, 90], size, 2, dim, value_dim, by_head)
    cu = starts([1, 31, 0, 40])
    q = tokens(cu[-1], 4, dim)
    floats = dequantized(arguments, scales)
    for features in ({"is_causal": True}, {"window_size": (50, 0), "softcap": 3.0, "alibi_slopes": nf.alibi_slopes(4)},
                     {"sinks": tokens(4)}):
        out, lse = nf.paged_attention(q, *arguments, cu_seqlens_q=cu, return_lse=True, **scales, **features)
        want, want_lse = nf.paged_attention(q, *floats, cu_seqlens_q=cu, return_lse=True, **features)
        # the scale times a sum and the sum of scaled numbers differ by roundings: 2^-24 of each term
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("dim", [16, 24, 64, 128])
def test_rows_of_an_int8_cache_have_the_same_bits_in_blocks_of_any_size_and_in_steps(dim, by_head):
    lengths, features = [290, 100, 129], {"window_size": (150, 0), "softcap": 3.0}
    q = tokens(3, 4, 60, dim)
    whole = None
    for size in (290, 1, 16, 24, 32, 128):
        (*caches, table, _), scales = int8_cache(lengths, size, 2, dim, dim + 8, by_head)
        for every in (1, 2):                    # head: two queries of a head of keys, or one
            for step in (60, 1, 3, 5, 9):
                seen = np.array(lengths) - (60 - step if step < 60 else 0)
                out, lse = nf.paged_attention(q[:, ::every, :step], *caches, table, seen, return_lse=True,
                                              **scales, **features)
                if whole is None:
                    whole = out, lse
                assert same(out, whole[0][:, ::every, :step]) and same(lse, whole[1][:, ::every, :step])


@pytest.mark.parametrize("queries", [1, 9, 60])
def test_rows_that_do_not_see_a_slot_do_not_depend_on_its_scale(queries):
    lengths, window = [100, 300], (33, 0)           # what is read begins at 64 and 264 where there is one query
    (*caches, table, lengths), scales = int8_cache(lengths, 16, 2, 32, 32)
    q = tokens(2, 4, queries, 32)
    clean = nf.paged_attention(q, *caches, table, lengths, window_size=window, return_lse=True, **scales)
    assert all(np.isfinite(x).all() for x in clean)
    first = lengths - queries                                       # position of the first query
    for slot in (first - 35, first - 34, lengths - 4, lengths - 1):
        block, at = table[np.arange(2), slot // 16], slot % 16
        position = first[:, None] + np.arange(queries)
        seen = (position >= slot[:, None]) & (position - slot[:, None] <= window[0])
        hidden = np.broadcast_to(~seen[:, None], (2, 4, queries))
        for value in (0, np.nan, np.inf, -np.inf, 1e30):
            changed = {name: s.copy() for name, s in scales.items()}
            for s in changed.values():
                s[block, at] = value
            out, lse = nf.paged_attention(q, *caches, table, lengths, window_size=window, return_lse=True, **changed)
            assert same(out[hidden], clean[0][hidden]) and same(lse[hidden], clean[1][hidden])
            assert (out[~hidden] != clean[0][~hidden]).all()


def test_a_scale_of_zero_and_one_that_is_not_a_number():
    (*caches, table, lengths), scales = int8_cache([70, 300], 16, 2, 32, 32)
    for queries in (1, 60):
        q = tokens(2, 4, queries, 32)
        zeros = {name: np.zeros_like(s) for name, s in scales.items()}
        out, lse = nf.paged_attention(q, *caches, table, lengths, is_causal=True, return_lse=True, **zeros)
        keys = lengths[:, None] - queries + 1 + np.arange(queries)
        assert (out == 0).all()
        np.testing.assert_allclose(lse, np.broadcast_to(np.log(keys)[:, None], lse.shape), rtol=1e-6)
        for name, s in scales.items():
            wrong = {**scales, name: np.full_like(s, np.nan)}
            assert np.isnan(nf.paged_attention(q, *caches, table, lengths, **wrong)).all()


def test_wrong_types_are_named_in_the_error():
    q, k, v = arrays(4, 2, 3, 16, 8)
    half = q.astype(np.float16)
    with pytest.raises(TypeError, match="key must be float16, got float32"):
        sdpa(half, k, v)
    with pytest.raises(TypeError, match=r"key must be bfloat16, got float32; convert it with .astype\(ml_dtypes"):
        sdpa(q.astype(BFLOAT16), k, v)
    with pytest.raises(TypeError, match="query must be float32, float16, bfloat16"):
        sdpa(q.astype(ml_dtypes.float8_e5m2), k, v)
    with pytest.raises(TypeError, match=r"attn_mask must be boolean .* the dtype of query, or float32,"):
        sdpa(half, k.astype(np.float16), v.astype(np.float16), np.zeros((3, 16)))
    with pytest.raises(TypeError, match="alibi_slopes must be float32"):
        sdpa(half, k.astype(np.float16), v.astype(np.float16), alibi_slopes=np.ones(4))
    cache = np.zeros((2, 16, 2, 8), np.int8)
    scale = np.ones((2, 16), np.float32)
    call = (q, cache, cache, [[0]], [10])
    with pytest.raises(ValueError, match="key_scale must be given where the cache is int8"):
        nf.paged_attention(*call)
    with pytest.raises(ValueError, match="value_scale must be given"):
        nf.paged_attention(*call, key_scale=scale)
    with pytest.raises(ValueError, match=r"value_scale must have shape \(2, 16, 2\), got \(2, 16, 1\)"):
        nf.paged_attention(*call, key_scale=scale, value_scale=scale[..., None])
    with pytest.raises(TypeError, match="key_scale must be float32"):
        nf.paged_attention(*call, key_scale=scale.astype(float), value_scale=scale)
    floats = cache.astype(np.float32)
    with pytest.raises(ValueError, match="key_scale must be given where the cache is int8, "
                       "and only there; it is float"):
        nf.paged_attention(q, floats, floats, [[0]], [10], key_scale=scale, value_scale=scale)
    with pytest.raises(TypeError, match=r"key_cache must be float32, float16, bfloat16 .* or int8, got float64"):
        nf.paged_attention(q, floats.astype(float), floats, [[0]], [10])
    with pytest.raises(TypeError, match="value_cache must be float32, got float16"):
        nf.paged_attention(q, floats, cache.astype(np.float16), [[0]], [10])
    for wrong in ((q, floats, cache), (q, cache, floats), (q.astype(float), cache, cache)):
        with pytest.raises(TypeError, match="int8 is for key_cache and value_cache together") as info:
            nf.paged_attention(*wrong, [[0]], [10], key_scale=scale, value_scale=scale)
        assert str(info.value).endswith("got {1.dtype}, {2.dtype} and {0.dtype}".format(*wrong))
    with pytest.raises(TypeError, match="key_cache must be float64"):
        nf.paged_attention(q.astype(float), floats, floats, [[0]], [10])


MEMORY = """
import resource, numpy as np, ml_dtypes, numformer as nf
q, k, v = (np.ones((1, 1, 65536, 64), ml_dtypes.bfloat16) for _ in range(3))
nf.scaled_dot_product_attention(*(x[:, :, :200] for x in (q, k, v)), window_size=(64, 0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nf.scaled_dot_product_attention(q, k, v, window_size=(64, 0))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.native
def test_nothing_is_widened_as_a_whole(isa):
    if isa != levels()[-1]:
        pytest.skip("the memory does not depend on the instruction set")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 12          # MB: the result is 8, one array in float32 would be 16
