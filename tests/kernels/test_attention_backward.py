"""The gradients of scaled_dot_product_attention."""
import numpy as np
import pytest

import numformer as nf
from numformer.nn.attention import split_heads
from numformer.ops.attention import packed_attention
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward
from tests import oracle
from tests.kernels.test_attention import arrays, sdpa


def gradients(q, k, v, dout, mask=None, causal=0, dlse=None):
    _y, saved = attention_forward(q, k, v, mask, is_causal=causal > 0, return_lse=dlse is not None,
                                  causal_align="top_left" if causal == 2 else "bottom_right")
    return attention_backward(dout if dlse is None else (dout, dlse), saved)[:3]


def reference(q, k, v, dout, mask=None, causal=None):
    """(dq, dk, dv) row by row, in float64."""
    g = oracle.attention_gradients(q, k, v, dout, mask=mask, causal=causal)
    return g["q"], g["k"], g["v"]


def upstream(q, v, seed=9):
    return np.random.default_rng(seed).standard_normal((*q.shape[:3], v.shape[3])).astype(q.dtype)


def check(got, want, dtype=np.float32):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else
                                            {"rtol": 1e-11, "atol": 1e-12}))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim, value_dim", [(1, 1), (3, 16), (16, 3), (40, 40), (59, 80), (64, 64), (111, 7)])
def test_matches_the_float64_formula_at_every_head_size(dim, value_dim, dtype):
    q, k, v = arrays(2, 1, 50, 49, dim, value_dim, dtype=dtype)
    dout = upstream(q, v)
    check(gradients(q, k, v, dout), reference(q, k, v, dout), dtype)
    check(gradients(q, k, v, dout, causal=1), reference(q, k, v, dout, causal="bottom_right"), dtype)


@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize("sq, sk", [(1, 1), (2, 5), (5, 2), (17, 97), (96, 48), (49, 193), (100, 3)])
def test_any_lengths_and_both_alignments(sq, sk, causal):
    q, k, v = arrays(4, 2, sq, sk, 16, batch=2)
    dout = upstream(q, v)
    got = gradients(q, k, v, dout, causal={None: 0, "bottom_right": 1, "top_left": 2}[causal])
    check(got, reference(q, k, v, dout, causal=causal))


@pytest.mark.parametrize("kind", ["boolean", "added"])
@pytest.mark.parametrize("shape", [(2, 4, 53, 35), (53, 35), (2, 1, 1, 35), (1, 4, 53, 1)])
def test_masks(shape, kind):
    q, k, v = arrays(4, 2, 53, 35, 8, batch=2)
    rng, dout = np.random.default_rng(1), upstream(q, v)
    mask = rng.random(shape) < 0.6 if kind == "boolean" else rng.standard_normal(shape).astype(np.float32)
    check(gradients(q, k, v, dout, mask), reference(q, k, v, dout, mask))
    check(gradients(q, k, v, dout, mask, 1), reference(q, k, v, dout, mask, "bottom_right"))


def test_matches_finite_differences():
    q, k, v = arrays(2, 1, 5, 7, 3, dtype=np.float64)
    rng = np.random.default_rng(2)
    mask, dlse = rng.standard_normal((5, 7)), rng.standard_normal((1, 2, 5))
    dout = upstream(q, v)

    def loss():
        out, lse = oracle.attention(q, k, v, mask, "bottom_right")
        return (out * dout).sum() + (lse * dlse).sum()

    for x, got in zip((q, k, v), gradients(q, k, v, dout, mask, 1, dlse), strict=True):
        for index in np.ndindex(x.shape):
            at, step = x[index], 1e-6
            x[index] = at + step
            above = loss()
            x[index] = at - step
            below = loss()
            x[index] = at
            assert abs(got[index] - (above - below) / (2 * step)) < 1e-7


@pytest.mark.parametrize("causal", [False, True])
def test_matches_torch(causal):
    torch = pytest.importorskip("torch")
    q, k, v = arrays(4, 4, 70, 70, 32, dtype=np.float64)
    dout = upstream(q, v)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal).backward(torch.tensor(dout))
    check(gradients(q, k, v, dout, causal=int(causal)), [x.grad.numpy() for x in leaves], np.float64)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5, 16), (2, 1, 60, 60, 40), (1, 1, 40, 300, 64)])
def test_error_is_at_most_twice_that_of_the_naive_formula(shape):
    ours, naive = np.zeros(3), np.zeros(3)
    for seed in range(8):
        q, k, v = arrays(*shape, seed=seed)
        dout = upstream(q, v, seed)
        want = reference(q, k, v, dout)
        kk, vv = (x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        scale = np.float32(1 / np.sqrt(q.shape[3]))
        s = q @ kk.swapaxes(2, 3) * scale
        p = np.exp(s - s.max(axis=3, keepdims=True))
        p /= p.sum(axis=3, keepdims=True)
        dp = dout @ vv.swapaxes(2, 3)
        ds = p * (dp - (dp * p).sum(axis=3, keepdims=True))
        grouped = (1, k.shape[1], -1, k.shape[2])
        plain = (ds @ kk * scale, (ds.swapaxes(2, 3) @ q).reshape(*grouped, q.shape[3]).sum(axis=2) * scale,
                 (p.swapaxes(2, 3) @ dout).reshape(*grouped, v.shape[3]).sum(axis=2))
        for i, (got, other) in enumerate(zip(gradients(q, k, v, dout), plain, strict=True)):
            ours[i] = max(ours[i], np.sqrt(np.mean((got - want[i]) ** 2)))
            naive[i] = max(naive[i], np.sqrt(np.mean((other - want[i]) ** 2)))
    assert (ours <= 2 * naive).all(), ours / naive


def test_fully_masked_row_has_zero_gradients_and_gives_none():
    q, k, v = arrays(2, 1, 20, 30, 16)
    mask = np.ones((20, 30), bool)
    mask[7], mask[:, 11] = False, False
    dout = upstream(q, v)
    dq, dk, dv = gradients(q, k, v, dout, mask)
    assert (dq[:, :, 7] == 0).all() and (dk[:, :, 11] == 0).all() and (dv[:, :, 11] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_masked_slots_may_hold_anything(value):
    q, k, v = arrays(2, 1, 60, 120, 24)
    mask = np.random.default_rng(3).random((60, 120)) < 0.8
    mask[:, [7, 100]], mask[20] = False, False
    dout = upstream(q, v)
    clean = gradients(q, k, v, dout, mask)
    for array, index in ((k, [7, 100]), (v, [7, 100]), (q, [20]), (dout, [20])):
        before = array[:, :, index].copy()
        array[:, :, index] = value
        for got, want in zip(gradients(q, k, v, dout, mask), clean, strict=True):
            assert (got == want).all()
        array[:, :, index] = before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_stands_after_a_query_may_hold_anything(value):
    q, k, v = arrays(1, 1, 120, 120, 24)
    dout = upstream(q, v)
    clean = gradients(q, k, v, dout, causal=1)
    for array in (k, v):
        array[:, :, 50:] = value
    assert (gradients(q, k, v, dout, causal=1)[0][:, :, :50] == clean[0][:, :, :50]).all()
    q, k, v = arrays(1, 1, 120, 120, 24)
    for array in (q, dout):
        array[:, :, :50] = value
    for got, want in zip(gradients(q, k, v, dout, causal=1)[1:], clean[1:], strict=True):
        assert (got[:, :, 50:] == want[:, :, 50:]).all()


def test_the_gradient_that_comes_in_may_have_any_strides():
    q, k, v = arrays(2, 2, 9, 20, 16)
    ones = np.ones_like(q)
    want = gradients(q, k, v, ones)
    for dout in (np.broadcast_to(np.float32(1), q.shape), np.asfortranarray(ones)):
        for a, b in zip(gradients(q, k, v, dout), want, strict=True):
            assert (a == b).all()


def test_empty_arrays_have_gradients_of_their_shapes():
    for sq, sk in ((0, 5), (5, 0), (0, 0)):
        q, k, v = arrays(2, 1, sq, sk, 8)
        for got, x in zip(gradients(q, k, v, q.copy()), (q, k, v), strict=True):
            assert got.shape == x.shape and (got == 0).all()


def test_the_tape_gives_the_same_gradients_with_and_without_lse():
    arrays_in = arrays(2, 1, 9, 20, 16)
    dout = upstream(arrays_in[0], arrays_in[2])
    want = gradients(*arrays_in, dout, causal=1)
    tensors = [nf.Tensor(x, requires_grad=True) for x in arrays_in]
    sdpa(*tensors, is_causal=True).backward(dout)
    for x, w in zip(tensors, want, strict=True):
        assert (x.grad == w).all()
    again = [nf.Tensor(x, requires_grad=True) for x in arrays_in]
    out, _lse = sdpa(*again, is_causal=True, return_lse=True)
    out.backward(dout)
    for x, w in zip(again, want, strict=True):
        assert (x.grad == w).all()


def test_gradients_follow_the_layout_of_their_arrays():
    qkv = np.random.default_rng(0).standard_normal((2, 30, 3, 4, 8)).astype(np.float32)
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    dout = upstream(q, v)
    got = gradients(q, k, v, dout)
    want = gradients(*(np.ascontiguousarray(x) for x in (q, k, v)), dout)
    for a, b in zip(got, want, strict=True):
        assert (a == b).all() and a.transpose(0, 2, 1, 3).flags.c_contiguous and b.flags.c_contiguous


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_attention_is_attention_on_its_views(kv_heads):
    heads, dim = 4, 24
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((2, 51, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    parts = np.split(qkv.reshape(2, 51, -1, dim), [heads, heads + kv_heads], axis=2)
    q, k, v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in parts)
    dout = upstream(q, v)
    x = nf.Tensor(qkv, requires_grad=True)
    y = packed_attention(x, heads, kv_heads, is_causal=True)
    y.backward(dout.transpose(0, 2, 1, 3).reshape(2, 51, -1))
    join = [g.transpose(0, 2, 1, 3) for g in gradients(q, k, v, dout, causal=1)]
    assert (y.data == sdpa(q, k, v, is_causal=True).transpose(0, 2, 1, 3).reshape(2, 51, -1)).all()
    assert (x.grad == np.concatenate(join, axis=2).reshape(qkv.shape)).all()
    with pytest.raises(ValueError, match="qkv must have shape"):
        packed_attention(qkv[..., :-1], heads, kv_heads)
    with pytest.raises(ValueError, match="packed_attention: qkv must have shape"):
        packed_attention([[1.0]], heads, kv_heads)


def test_packed_attention_turns_queries_and_keys_as_rotary_embedding_does():
    rng = np.random.default_rng(0)
    heads, kv_heads, length, dim = 4, 2, 21, 12
    qkv = rng.standard_normal((3, length, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    dy = rng.standard_normal((3, length, heads * dim)).astype(np.float32)
    angle = np.outer(np.arange(length), 0.5 ** np.arange(dim // 2)).astype(np.float32)
    rotary = np.cos(angle), np.sin(angle)
    ours, parts = nf.Tensor(qkv, requires_grad=True), nf.Tensor(qkv, requires_grad=True)
    before = qkv.copy()
    y = packed_attention(ours, heads, kv_heads, is_causal=True, rotary=rotary)
    q, k, v = split_heads(parts, heads, kv_heads)
    q, k = nf.rotary_embedding(q, *rotary), nf.rotary_embedding(k, *rotary)
    want = sdpa(q, k, v, is_causal=True).swapaxes(1, 2).reshape(3, length, heads * dim)
    assert (y.data == want.data).all() and (qkv == before).all()
    y.backward(dy)
    want.backward(dy)
    assert (ours.grad == parts.grad).all()
    with pytest.raises(ValueError, match="cos must have shape"):
        packed_attention(ours, heads, kv_heads, rotary=[table[:, ::2] for table in rotary])
