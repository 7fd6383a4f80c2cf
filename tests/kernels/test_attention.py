"""scaled_dot_product_attention forward: values, masks, masked slots, strides, errors."""
import numpy as np
import pytest

import numformer as nf
from tests import oracle

sdpa = nf.scaled_dot_product_attention


def arrays(heads, kv_heads, sq, sk, dim, value_dim=None, *, batch=1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in
                 [(batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, value_dim or dim)])


def naive(q, k, v, causal=False):
    """The formula in the dtype of its inputs."""
    k, v = (x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    s = q @ k.swapaxes(2, 3) * q.dtype.type(1 / np.sqrt(q.shape[3]))
    if causal:
        s = np.where(np.tril(np.ones(s.shape[2:], bool), s.shape[3] - s.shape[2]), s, -np.inf).astype(q.dtype)
    p = np.exp(s - s.max(axis=3, keepdims=True))
    return p @ v / p.sum(axis=3, keepdims=True)


def check(got, want, dtype):
    np.testing.assert_allclose(got, want, **({"rtol": 2e-5, "atol": 4e-6} if dtype == np.float32 else
                                             {"rtol": 1e-12, "atol": 1e-13}))


@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 3, 16, 40, 59, 80, 111])
def test_matches_the_float64_formula_at_every_head_size(dim, dtype, causal):
    q, k, v = arrays(2, 1, 17, 33, dim, dtype=dtype)
    out, lse = sdpa(q, k, v, is_causal=causal is not None, causal_align=causal or "bottom_right", return_lse=True)
    want, want_lse = oracle.attention(q, k, v, causal=causal)
    check(out, want, dtype)
    check(lse, want_lse, dtype)
    assert out.dtype == lse.dtype == dtype


@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize("sq, sk", [(1, 1), (2, 5), (5, 2), (1, 130), (15, 17), (48, 128), (49, 129), (65, 63),
                                    (97, 3)])
def test_any_lengths_and_both_alignments(sq, sk, causal):
    q, k, v = arrays(4, 2, sq, sk, 16, 24, batch=2)
    out, lse = sdpa(q, k, v, is_causal=causal is not None, causal_align=causal or "bottom_right", return_lse=True)
    want, want_lse = oracle.attention(q, k, v, causal=causal)
    check(out, want, np.float32)
    check(lse, want_lse, np.float32)


@pytest.mark.parametrize("kind", ["boolean", "added"])
@pytest.mark.parametrize("shape", [(2, 4, 19, 35), (1, 4, 19, 35), (2, 1, 19, 35), (2, 4, 1, 35), (2, 4, 19, 1),
                                   (19, 35), (35,), (19, 1), (2, 1, 1, 35), (1, 1), ()])
def test_masks_broadcast_along_every_axis(shape, kind):
    q, k, v = arrays(4, 2, 19, 35, 8, batch=2)
    rng = np.random.default_rng(1)
    mask = rng.random(shape) < 0.6 if kind == "boolean" else rng.standard_normal(shape).astype(np.float32)
    mask = np.asarray(mask)
    for causal in (None, "bottom_right"):
        out, lse = sdpa(q, k, v, mask, is_causal=causal is not None, return_lse=True)
        want, want_lse = oracle.attention(q, k, v, mask, causal)
        check(out, want, np.float32)
        check(lse, want_lse, np.float32)


def test_a_mask_may_have_any_strides():
    q, k, v = arrays(2, 2, 20, 30, 8)
    mask = np.random.default_rng(0).random((60, 20)) < 0.5
    check(sdpa(q, k, v, mask.T[::-1, ::2]), oracle.attention(q, k, v, mask.T[::-1, ::2])[0], np.float32)


def test_a_row_that_sees_nothing_is_zero_with_lse_of_minus_infinity():
    q, k, v = arrays(1, 1, 5, 2, 8)
    out, lse = sdpa(q, k, v, is_causal=True, return_lse=True)
    assert (out[0, 0, :3] == 0).all() and (lse[0, 0, :3] == -np.inf).all() and (out[0, 0, 3:] != 0).all()
    mask = np.array([True, False, True, True, False])[:, None]
    out, lse = sdpa(q, k, v, mask, return_lse=True)
    assert (out[0, 0, [1, 4]] == 0).all() and (lse[0, 0, [1, 4]] == -np.inf).all()


def test_added_masks_of_the_least_float_are_uniform_and_not_empty():
    q, k, v = arrays(1, 1, 3, 7, 8)
    least = np.full((3, 7), np.finfo(np.float32).min, np.float32)
    check(sdpa(q, k, v, least), np.broadcast_to(v.mean(axis=2, keepdims=True), (1, 1, 3, 8)), np.float32)


def test_no_keys_give_zeros_and_no_queries_nothing():
    q, k, v = arrays(2, 2, 3, 0, 8)
    out, lse = sdpa(q, k, v, return_lse=True)
    assert out.shape == (1, 2, 3, 8) and (out == 0).all() and (lse == -np.inf).all()
    assert sdpa(k, q, q).shape == (1, 2, 0, 8)
    assert sdpa(q[:0], k[:0], v[:0]).shape == (0, 2, 3, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_slots_may_hold_anything(value):
    q, k, v = arrays(2, 1, 60, 200, 40)
    rng = np.random.default_rng(3)
    mask = rng.random((60, 200)) < 0.8
    mask[:, [7, 130]] = False          # seen by nobody
    mask[20] = False                   # sees nobody
    for array, index in ((k, np.s_[:, :, [7, 130]]), (v, np.s_[:, :, [7, 130]]), (q, np.s_[:, :, 20])):
        clean = sdpa(q, k, v, mask)
        before = array[index].copy()
        array[index] = value
        assert (sdpa(q, k, v, mask) == clean).all()
        array[index] = before
    mask[:30, 50] = False              # seen by some rows and not by others
    clean = sdpa(q, k, v, mask)
    k[0, 0, 50] = v[0, 0, 50] = value
    assert (sdpa(q, k, v, mask)[:, :, :30] == clean[:, :, :30]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("at", [0, 3, 16, 47, 128, 150])
def test_what_stands_after_a_query_may_hold_anything(value, at):
    q, k, v = arrays(1, 1, 160, 160, 24)
    clean = sdpa(q, k, v, is_causal=True)
    k[:, :, at:] = v[:, :, at:] = value
    assert (sdpa(q, k, v, is_causal=True)[:, :, :at] == clean[:, :, :at]).all()


def test_nan_that_is_seen_is_not_hidden():
    q, k, v = arrays(1, 1, 4, 20, 8)
    v[0, 0, 3, 2] = np.nan
    assert np.isnan(sdpa(q, k, v)[..., 2]).all() and np.isfinite(sdpa(q, k, v)[..., 3]).all()
    k[0, 0, 3, 2] = np.nan
    assert np.isnan(sdpa(q, k, v)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(sign):
    q, k, v = arrays(1, 1, 20, 150, 16)
    q, k = np.abs(q) * 100, np.abs(k) * 100 * np.float32(sign)
    assert np.abs(q @ k.swapaxes(2, 3) / 4).max() > 1e4
    check(sdpa(q, k, v), oracle.attention(q, k, v)[0], np.float32)
    assert np.isfinite(sdpa(q, k, v)).all()


@pytest.mark.parametrize("shape", [(1, 1, 3, 5, 16), (2, 1, 60, 60, 40), (1, 1, 40, 300, 64), (1, 1, 64, 64, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_at_most_twice_that_of_the_naive_formula(shape, causal):
    worst = naive_worst = 0.0
    for seed in range(8):
        q, k, v = arrays(*shape, seed=seed)
        want = oracle.attention(q, k, v, causal="bottom_right" if causal else None)[0]
        worst = max(worst, np.sqrt(np.mean((sdpa(q, k, v, is_causal=causal) - want) ** 2)))
        naive_worst = max(naive_worst, np.sqrt(np.mean((naive(q, k, v, causal) - want) ** 2)))
    assert worst <= 2 * naive_worst


def test_scale_is_one_over_the_root_of_the_head_size_or_what_is_given():
    q, k, v = arrays(1, 1, 5, 9, 16)
    check(sdpa(q, k, v, scale=0.7), oracle.attention(q, k, v, scale=0.7)[0], np.float32)
    assert (sdpa(q, k, v, scale=0.25) == sdpa(q, k, v)).all()


def test_joined_projections_are_read_and_answered_in_their_layout():
    qkv = np.random.default_rng(0).standard_normal((2, 50, 3, 4, 40)).astype(np.float32)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    out = sdpa(q, k, v, is_causal=True)
    want = sdpa(*(np.ascontiguousarray(x) for x in (q, k, v)), is_causal=True)
    assert (out == want).all()
    assert out.transpose(0, 2, 1, 3).flags.c_contiguous and want.flags.c_contiguous


def test_other_strides_are_copied_and_read_only_arrays_are_read():
    q, k, v = arrays(2, 2, 9, 20, 16)
    want = sdpa(q, k, v)
    wide = np.zeros((1, 2, 20, 32), np.float32)
    wide[..., ::2] = k
    for x in (q, k, v):
        x.flags.writeable = False
    assert (sdpa(q, wide[..., ::2], np.asfortranarray(v)) == want).all()
    assert (sdpa(q[:, ::-1, ::-1], k[:, ::-1], v[:, ::-1]) == want[:, ::-1, ::-1]).all()


def test_out_receives_the_result():
    q, k, v = arrays(2, 2, 9, 20, 16)
    out = np.empty_like(q)
    assert sdpa(q, k, v, out=out) is out and (out == sdpa(q, k, v)).all()
    turned = np.empty_like(out.swapaxes(1, 2), order="C").swapaxes(1, 2)
    assert sdpa(q, k, v, out=turned) is turned and (turned == out).all()
    with pytest.raises(ValueError, match="memory"):
        sdpa(q, k, v, out=q)
    for of in (out, turned):
        memory = of[0, 0]
        for side in ({"attn_mask": memory[:, :1]}, {"attn_mask": memory.view(bool)[:, :20]}, {"sinks": memory[0, :2]},
                     {"alibi_slopes": memory[0, :2]}, {"alibi_slopes": memory[0, 4:6].reshape(1, 2)}):
            with pytest.raises(ValueError, match="out must not share memory with an input"):
                sdpa(q, k, v, out=of, **side)
    with pytest.raises(ValueError, match="shape"):
        sdpa(q, k, v, out=out[:, :1])
    with pytest.raises(TypeError, match="float32"):
        sdpa(q, k, v, out=out.astype(np.float64))


def test_wrong_arrays_are_named_in_the_error():
    q, k, v = arrays(4, 2, 3, 5, 8)
    with pytest.raises(ValueError, match="query must have 4 dimensions"):
        sdpa(q[0], k, v)
    with pytest.raises(ValueError, match=r"key must have shape \(1, Hkv, Sk, 8\)"):
        sdpa(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"value must have shape \(1, 2, 5, Dv\)"):
        sdpa(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="multiple"):
        sdpa(q[:, :3], k, v)
    with pytest.raises(TypeError, match="key must be float32"):
        sdpa(q, k.astype(np.float64), v)
    with pytest.raises(TypeError, match=r"query must be float32, float16, bfloat16 .* or float64, got int32"):
        sdpa(q.astype(np.int32), k, v)
    with pytest.raises(TypeError, match="query must be an array, got list"):
        sdpa([[1.0], [2.0, 3.0]], k, v)
    with pytest.raises(TypeError, match="scaled_dot_product_attention: scale must be a real number, got 'half'"):
        sdpa(q, k, v, scale="half")
    with pytest.raises(ValueError, match="causal_align"):
        sdpa(q, k, v, is_causal=True, causal_align="top")


def test_wrong_masks_are_named_in_the_error():
    q, k, v = arrays(4, 2, 3, 5, 8)
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to .*\(1, 4, 3, 5\), got \(3, 4\)"):
        sdpa(q, k, v, np.ones((3, 4), bool))
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        sdpa(q, k, v, np.ones((1, 1, 1, 3, 5), bool))
    for wrong in (np.ones((3, 5), np.int32), np.ones((3, 5))):
        with pytest.raises(TypeError, match="attn_mask must be boolean"):
            sdpa(q, k, v, wrong)
