"""Packed sequences and caches in blocks: the bits of each sequence in a call of its own."""
import numpy as np
import pytest

import numformer as nf
from numformer.ops.varlen import attention_varlen_backward, attention_varlen_forward
from tests.kernels.test_attention import arrays, sdpa
from tests.kernels.test_attention_features import run

FEATURES = [{}, {"is_causal": True}, {"window_size": (20, 4)},
            {"is_causal": True, "causal_align": "top_left", "softcap": 2.0, "window_size": (60, 0)}]


def starts(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def tokens(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def heads(x):
    return x.transpose(1, 0, 2)[None]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("q_lengths, k_lengths", [([5, 0, 100, 1, 30], [5, 3, 130, 200, 0]), ([60], [97]),
                                                  ([3, 4], [7, 300]), ([0, 50], [4, 50]), ([0, 3], [200, 50])])
def test_each_sequence_has_the_bits_of_a_call_of_its_own(q_lengths, k_lengths, features):
    cu_q, cu_k = starts(q_lengths), starts(k_lengths)
    q, k, v = tokens(cu_q[-1], 4, 16), tokens(cu_k[-1], 2, 16), tokens(cu_k[-1], 2, 24, seed=1)
    slopes, sinks = nf.alibi_slopes(4), tokens(4)
    dout, dlse = tokens(cu_q[-1], 4, 24, seed=2), tokens(cu_q[-1], 4, seed=3)
    (out, lse), saved = attention_varlen_forward(q, k, v, cu_q, cu_k, slopes, sinks, return_lse=True, **features)
    dq, dk, dv, _, _, dslopes, dsinks = attention_varlen_backward((dout, dlse), saved)
    assert out.shape == (cu_q[-1], 4, 24) and out.flags.c_contiguous and lse.shape == (cu_q[-1], 4)
    sums = np.zeros(4), np.zeros(4)
    for b in range(len(q_lengths)):
        i, j = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one, one_lse, g = run(heads(q[i]), heads(k[j]), heads(v[j]), heads(dout[i]), dlse[i].T[None], slopes=slopes,
                              sinks=sinks, **features)
        assert (heads(out[i]) == one).all() and (lse[i].T == one_lse[0]).all()
        for whole, part, name in ((dq, i, "q"), (dk, j, "k"), (dv, j, "v")):
            assert (heads(whole[part]) == g[name]).all()
        sums[0][...] += g["slopes"]
        sums[1][...] += g["sinks"]
    np.testing.assert_allclose(dslopes, sums[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dsinks, sums[1], rtol=1e-4, atol=1e-4)


def test_slopes_of_each_sequence_and_float64():
    cu = starts([30, 100])
    q, k, v = (tokens(130, 2, 8, dtype=np.float64, seed=s) for s in range(3))
    slopes = np.random.default_rng(0).uniform(0, 1, (2, 2))
    (out, _lse), saved = attention_varlen_forward(q, k, v, cu, cu, slopes, return_lse=True)
    dslopes = attention_varlen_backward((tokens(130, 2, 8, seed=4).astype(float), None), saved)[5]
    dout = tokens(130, 2, 8, seed=4).astype(float)
    for b in range(2):
        i = slice(cu[b], cu[b + 1])
        one, _, g = run(*(heads(x[i]) for x in (q, k, v, dout)), np.zeros((1, 2, cu[b + 1] - cu[b])), slopes=slopes[b])
        assert (heads(out[i]) == one).all()
        np.testing.assert_allclose(dslopes[b], g["slopes"], rtol=1e-10)


def test_the_tape_and_threads(threads):
    cu_q, cu_k = starts([70, 3, 200]), starts([150, 90, 200])
    data = tokens(273, 2, 8), tokens(440, 1, 8), tokens(440, 1, 8, seed=1)
    results = []
    for n in (1, 2, 3):
        threads(n)
        leaves = [nf.Tensor(x, requires_grad=True) for x in data]
        slopes = nf.Tensor(nf.alibi_slopes(2), requires_grad=True)
        out = nf.attention_varlen(*leaves, cu_q, cu_k, is_causal=True, enable_gqa=True, alibi_slopes=slopes,
                                  dropout_p=0.2, rng=np.random.default_rng(0))
        out.sum().backward()
        results.append([out.data, *(x.grad for x in leaves), slopes.grad])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a == b).all()


def paged(k, v, lengths, size, seed=0):
    """(key_cache, value_cache, block_table): k and v (B, Hkv, S, D) in blocks in random order, the rest NaN."""
    batch, kv_heads, longest, _ = k.shape
    width = -(-longest // size)
    rng = np.random.default_rng(seed)
    order = rng.permutation(batch * width + 3)
    caches = [np.full((len(order), size, kv_heads, x.shape[3]), np.nan, x.dtype) for x in (k, v)]
    table = np.full((batch, width), -7)
    for b in range(batch):
        for i in range(-(-lengths[b] // size)):
            table[b, i] = order[b * width + i]
            for cache, x in zip(caches, (k, v)):
                part = x[b, :, i * size:min((i + 1) * size, lengths[b])]
                cache[table[b, i], :part.shape[1]] = part.transpose(1, 0, 2)
    return *caches, table


@pytest.mark.parametrize("size", [1, 16, 24, 128, 256])
@pytest.mark.parametrize("queries", [1, 5, 60])
def test_a_cache_in_blocks_gives_the_bits_of_one_piece(queries, size):
    q, k, v = arrays(4, 2, queries, 290, 16, 8, batch=3)
    lengths = np.array([290, 100, 129])
    key_cache, value_cache, table = paged(k, v, lengths, size)
    for features in ({"is_causal": True}, {"window_size": (50, 0), "softcap": 3.0, "alibi_slopes": nf.alibi_slopes(4)},
                     {"sinks": tokens(4), "enable_gqa": True}):
        out, lse = nf.paged_attention(q, key_cache, value_cache, table, lengths, return_lse=True, **features)
        want = sdpa(q, k, v, kv_lengths=lengths, return_lse=True, **features)
        assert (out == want[0]).all() and (lse == want[1]).all()


@pytest.mark.parametrize("dim", [16, 7])
def test_steps_and_pieces_of_prompts_mix_in_one_call(dim):
    lengths, counts = np.array([200, 31, 0, 90]), [1, 31, 0, 40]
    _, k, v = arrays(4, 2, 1, 200, dim, batch=4)
    cu = starts(counts)
    q = tokens(cu[-1], 4, dim)
    key_cache, value_cache, table = paged(k, v, lengths, 16)
    out, lse = nf.paged_attention(q, key_cache, value_cache, table, lengths, cu_seqlens_q=cu, is_causal=True,
                                  return_lse=True)
    for b, n in enumerate(lengths):
        i = slice(cu[b], cu[b + 1])
        one, one_lse = sdpa(heads(q[i]), k[b:b + 1, :, :n], v[b:b + 1, :, :n], is_causal=True, return_lse=True)
        assert (heads(out[i]) == one).all() and (lse[i].T == one_lse[0]).all()


@pytest.mark.parametrize("features", FEATURES)
def test_the_last_keys_of_packed_sequences_may_be_padding(features):
    cu_q, cu_k, lengths = starts([5, 70, 1, 3]), starts([30, 400, 290, 8]), np.array([21, 290, 17, 0])
    q, k, v, dout = tokens(cu_q[-1], 4, 16), tokens(cu_k[-1], 2, 16), tokens(cu_k[-1], 2, 8), tokens(cu_q[-1], 4, 8)
    real = np.concatenate([np.arange(a, a + n) for a, n in zip(cu_k, lengths)])
    padding = np.ones(cu_k[-1], bool)
    padding[real] = False
    features = {**features, "return_lse": True}
    (out, lse), saved = attention_varlen_forward(q, k[real], v[real], cu_q, starts(lengths), **features)
    want = attention_varlen_backward((dout, None), saved)
    k[padding] = v[padding] = np.nan
    (got, got_lse), saved = attention_varlen_forward(q, k, v, cu_q, cu_k, kv_lengths=lengths, **features)
    assert (got == out).all() and (got_lse == lse).all()
    dq, dk, dv = attention_varlen_backward((dout, None), saved)[:3]
    assert (dq == want[0]).all() and (dk[real] == want[1]).all() and (dv[real] == want[2]).all()
    assert not dk[padding].any() and not dv[padding].any()


@pytest.mark.parametrize("queries", [1, 60])
def test_a_cache_in_blocks_takes_the_other_keywords_too(queries):
    q, k, v = arrays(4, 2, queries, 290, 16, 8, batch=3)
    lengths = np.array([290, 100, 129])
    key_cache, value_cache, table = paged(k, v, lengths, 16)
    fewer = np.array([170, 100, 0])
    same = {"dropout_p": 0.4, "is_causal": True}
    got = nf.paged_attention(q, key_cache, value_cache, table, lengths, kv_lengths=fewer,
                             rng=np.random.default_rng(3), **same)
    assert (got == sdpa(q, k, v, kv_lengths=fewer, rng=np.random.default_rng(3), **same)).all()
    for wrong in ([170, 101, 0], [170, 100], [170, -1, 0]):
        with pytest.raises(ValueError, match="paged_attention: kv_lengths must be between 0 and cache_seqlens"):
            nf.paged_attention(q, key_cache, value_cache, table, lengths, kv_lengths=wrong)
    with pytest.raises(TypeError, match="paged_attention: kv_lengths must be integers"):
        nf.paged_attention(q, key_cache, value_cache, table, lengths, kv_lengths=[1.5, 2.0, 3.0])
    with pytest.raises(TypeError, match="paged_attention: rng must be a"):
        nf.paged_attention(q, key_cache, value_cache, table, lengths, dropout_p=0.4)


def test_wrong_packing_is_named_in_the_error():
    q, k = tokens(5, 4, 8), tokens(6, 2, 8)
    with pytest.raises(ValueError, match="query must be an array"):
        nf.attention_varlen(q[0], k, k, [0, 5], [0, 6])
    for wrong in ([0, 4], [1, 5], [0, 3, 2, 5], []):
        with pytest.raises((ValueError, TypeError), match="attention_varlen: cu_seqlens_q must"):
            nf.attention_varlen(q, k, k, wrong, [0, 6])
    with pytest.raises(ValueError, match="one length"):
        nf.attention_varlen(q, k, k, [0, 2, 5], [0, 6])
    for wrong, cu_k in (([7], [0, 6]), ([2, 5], [0, 2, 6])):
        with pytest.raises(ValueError, match="attention_varlen: kv_lengths must lie between 0 and Sk"):
            nf.attention_varlen(q, k, k, [0, *cu_k[1:-1], 5], cu_k, kv_lengths=wrong)
    with pytest.raises(TypeError, match="cu_seqlens_k must be integers"):
        nf.attention_varlen(q, k, k, [0, 5], [0.0, 6.0])
    for wrong in ((None, [0, 6]), ([0, 5], None)):
        with pytest.raises(TypeError, match=r"attention_varlen: cu_seqlens_. must be an array of numbers, got None"):
            nf.attention_varlen(q, k, k, *wrong)
    for wrong, message in (((k[..., :7], k), r"key must have shape \(Tk, Hkv, 8\) .* got \(6, 2, 7\)"),
                           ((k, k[:5]), r"value must have shape \(6, 2, Dv\) .* got \(5, 2, 8\)"),
                           ((k[:, :0], k[:, :0]), "the heads of query must be a multiple")):
        with pytest.raises(ValueError, match=f"attention_varlen: {message}"):
            nf.attention_varlen(q, *wrong, [0, 5], [0, 6])
    with pytest.raises(ValueError, match=r"attention_varlen: out must have shape \(5, 4, 8\), got \(5, 8, 4\)"):
        nf.attention_varlen(q, k, k, [0, 5], [0, 6], out=np.empty((5, 8, 4), np.float32))
    for keywords, message in (({"causal_align": "x"}, "causal_align"), ({"sinks": np.ones(3, np.float32)}, "sinks"),
                              ({"window_size": (-2, 0)}, "window_size")):
        with pytest.raises(ValueError, match=f"attention_varlen: {message} must"):
            nf.attention_varlen(q, k, k, [0, 5], [0, 6], **keywords)
        with pytest.raises(ValueError, match=f"paged_attention: {message} must"):
            nf.paged_attention(tokens(1, 4, 1, 8), k[None], k[None], [[0]], [6], **keywords)
    for name, wrong in (("window_size", (None, 0)), ("softcap", "x"), ("scale", "x")):
        with pytest.raises(TypeError, match=f"attention_varlen: .*{name} must be"):
            nf.attention_varlen(q, k, k, [0, 5], [0, 6], **{name: wrong})
        with pytest.raises(TypeError, match=f"paged_attention: .*{name} must be"):
            nf.paged_attention(tokens(1, 4, 1, 8), k[None], k[None], [[0]], [6], **{name: wrong})
    cache = np.zeros((4, 16, 2, 8), np.float32)
    step = tokens(2, 4, 1, 8)
    with pytest.raises(ValueError, match="paged_attention: block_table must name blocks below 4, got 4"):
        nf.paged_attention(step, cache, cache, [[0, 1], [2, 4]], [20, 20])
    with pytest.raises(ValueError, match="paged_attention: cache_seqlens must lie between 0 and"):
        nf.paged_attention(step, cache, cache, [[0, 1], [2, 3]], [20, 33])
    with pytest.raises(ValueError, match="block_table must have a row for each of 2"):
        nf.paged_attention(step, cache, cache, [[0, 1]], [20, 20])
    with pytest.raises(TypeError, match="paged_attention: block_table must be an array of numbers, got NoneType"):
        nf.paged_attention(step, cache, cache, None, [20, 20])
    with pytest.raises(ValueError, match=r"paged_attention: query and key_cache .* \(2, 4, 1, 8\) and \(4, 16, 2, 7\)"):
        nf.paged_attention(step, cache[..., :7], cache, [[0, 1], [2, 3]], [20, 20])
    with pytest.raises(ValueError, match=r"paged_attention: value_cache must have shape \(4, 16, 2, Dv\)"):
        nf.paged_attention(step, cache, cache[:, :, :1], [[0, 1], [2, 3]], [20, 20])
    with pytest.raises(ValueError, match="key_cache must be"):
        nf.paged_attention(step, cache[0], cache, [[0, 1]], [20, 20])


def test_a_given_output_is_written_to_and_returned():
    cu_q, cu_k = starts([5, 1, 9]), starts([5, 30, 9])
    q, k, v = tokens(15, 4, 16), tokens(44, 2, 16), tokens(44, 2, 24)
    want, out = nf.attention_varlen(q, k, v, cu_q, cu_k), np.empty((15, 4, 24), np.float32)
    assert nf.attention_varlen(q, k, v, cu_q, cu_k, out=out) is out and (out == want).all()
    caches, table = (tokens(6, 8, 2, 16), tokens(6, 8, 2, 24)), [[3, 1], [5, 0], [2, 4]]
    for query, more in ((q, {"cu_seqlens_q": cu_q}), (tokens(3, 4, 2, 16), {})):
        want = nf.paged_attention(query, *caches, table, [16, 9, 12], **more)
        out = np.empty(want.shape, np.float32)
        assert nf.paged_attention(query, *caches, table, [16, 9, 12], out=out, **more) is out and (out == want).all()
    apart = np.empty((15, 4, 48), np.float32)[..., ::2]
    for wrong, error, message in ((q[:, :, :1], ValueError, r"out must have shape \(15, 4, 24\)"),
                                  (apart, ValueError, "out must be writeable and C-contiguous"),
                                  ([1.0], TypeError, "out must be an array")):
        with pytest.raises(error, match=message):
            nf.attention_varlen(q, k, v, cu_q, cu_k, out=wrong)
    with pytest.raises(ValueError, match="share memory"):
        nf.attention_varlen(q, k[:, :, :16], tokens(44, 2, 16), cu_q, cu_k, out=q)
    want = nf.attention_varlen(q, k, v, cu_q, cu_k)
    with pytest.raises(ValueError, match="share memory"):
        nf.attention_varlen(q, k, v, cu_q, cu_k, sinks=want[0, 0, :4], out=want)
    scales = np.ones((6, 8), np.float32)
    cache, out = np.ones((6, 8, 2, 16), np.int8), scales.reshape(-1)[:24].reshape(3, 2, 1, 4)
    with pytest.raises(ValueError, match="paged_attention: out must not share memory"):
        nf.paged_attention(tokens(3, 2, 1, 16), cache, cache[..., :4], table, [16, 9, 12], key_scale=scales,
                           value_scale=scales.copy(), out=out)


def test_one_long_sequence_among_many_takes_no_memory_for_the_others():
    lengths_q, lengths_k = np.ones(2000, int), np.full(2000, 3)
    lengths_q[7], lengths_k[7] = 60, 20000
    cu_q, cu_k = starts(lengths_q), starts(lengths_k)
    q, k, v = tokens(cu_q[-1], 4, 32), tokens(cu_k[-1], 4, 32), tokens(cu_k[-1], 4, 32, seed=1)
    before = nf.memory_stats()["in_use_peak"]
    nf.attention_varlen(q, k, v, cu_q, cu_k, is_causal=True)
    assert nf.memory_stats()["in_use_peak"] < before + 10e6      # 20 groups of keys for each would take 1.3e9
