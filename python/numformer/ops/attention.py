"""Scaled-dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), in memory O(S D) both ways.

No S x S matrix is ever held: the softmax runs online over chunks of keys (Milakov & Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), and the backward pass builds it again from two numbers a row.
"""
import numpy as np

from numformer import _core
from numformer.tensor import Tensor, apply

__all__ = ["attention_backward", "attention_forward", "packed_attention", "packed_attention_backward",
           "packed_attention_forward", "scaled_dot_product_attention"]

_OP = "scaled_dot_product_attention"
_ALIGN = {"bottom_right": 1, "top_left": 2}


def _causal(is_causal, causal_align):
    """Which keys a query sees, in the binding's terms: 0 all, 1 and 2 as `causal_align` says."""
    align = _ALIGN.get(causal_align)
    if align is None:
        raise ValueError(f'{_OP}: causal_align must be "bottom_right" or "top_left", got {causal_align!r}')
    return align if is_causal else 0


def _refuse(dropout_p, window_size, softcap, alibi_slopes, sinks, kv_lengths, rng):
    """NotImplementedError for the keywords that have a name already and no kernel yet."""
    given = {"dropout_p": dropout_p != 0.0, "window_size": tuple(window_size) != (-1, -1), "softcap": softcap != 0.0,
             "alibi_slopes": alibi_slopes is not None, "sinks": sinks is not None,
             "kv_lengths": kv_lengths is not None, "rng": rng is not None}
    for name, is_given in given.items():
        if is_given:
            raise NotImplementedError(f"{_OP}: {name} is not supported yet; leave it out")


def attention_forward(query, key, value, attn_mask=None, causal=0, scale=None, return_lse=False, out=None):
    """Return ``(out, saved)``, or ``((out, lse), saved)``; `saved` is what :func:`attention_backward` needs."""
    out, lse, stats = _core.attention_forward(query, key, value, attn_mask, scale, causal, out, 2)
    saved = query, key, value, attn_mask, causal, scale, return_lse, out, stats
    return ((out, lse) if return_lse else out), saved


def attention_backward(dy, saved):
    """Return the gradients with respect to query, key and value, and None for the mask.

    A gradient has its heads inside its rows in memory, as (B, S, H, D), where the array it belongs to has.
    """
    query, key, value, attn_mask, causal, scale, return_lse, out, stats = saved
    dout, dlse = dy if return_lse else (dy, None)
    return (*_core.attention_backward(query, key, value, attn_mask, scale, causal, out, stats, dout, dlse, False), None)


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False, *, causal_align="bottom_right", window_size=(-1, -1), softcap=0.0,
                                 alibi_slopes=None, sinks=None, kv_lengths=None, rng=None, return_lse=False, out=None):
    """Compute ``softmax(scale * query @ key^T + attn_mask) @ value``.

    Any strides whose last axis is contiguous are read as they are, such as views of one joined product of query,
    key and value or of a cache with room to grow; others are copied. A row's bits depend on nothing but its own
    query and the keys that it sees: not on threads, batch, or whether it is one cached step or part of a sequence.

    Parameters
    ----------
    query : ndarray or Tensor, (B, H, Sq, D), float32 or float64
    key : (B, Hkv, Sk, D), of the same dtype
        `H` must be a multiple of `Hkv`; query head `h` reads head ``h // (H // Hkv)`` (Ainslie et al. 2023,
        arXiv:2305.13245).
    value : (B, Hkv, Sk, Dv)
    attn_mask : ndarray that broadcasts to (B, H, Sq, Sk), optional
        Boolean: True where a query attends. Floating, of query's dtype: added to the scaled scores.
    dropout_p : float
        Only 0.0 for now.
    is_causal : bool
        A query sees no key that stands after it; together with `attn_mask`, both hold.
    scale : float, optional
        ``1/sqrt(D)`` by default.
    enable_gqa : bool
        Accepted for PyTorch's sake; the shapes say it.
    causal_align : {"bottom_right", "top_left"}
        Where the diagonal lies if Sq != Sk. "bottom_right" is FlashAttention's and ONNX's meaning, the last query
        sees every key; "top_left" is PyTorch's, the first query sees the first key alone::

            Sq 2, Sk 5                                Sq 5, Sk 2
            bottom_right    top_left                  bottom_right    top_left
            1 1 1 1 0       1 0 0 0 0                 0 0             1 0
            1 1 1 1 1       1 1 0 0 0                 0 0             1 1
                                                      0 0             1 1
                                                      1 0             1 1
                                                      1 1             1 1

    window_size, softcap, alibi_slopes, sinks, kv_lengths, rng
        Only their defaults for now.
    return_lse : bool
        Return ``(out, lse)``, lse (B, H, Sq) the natural logarithm of each row's sum of exponentials.
    out : ndarray, (B, H, Sq, Dv), C-contiguous, optional
        Where to write the result; shares no memory with an input.

    Returns
    -------
    ndarray, or Tensor where one of the inputs is one, (B, H, Sq, Dv)
        In memory (B, Sq, H, Dv) where query is a view of that order, so that joining the heads copies nothing.
        A row that sees no key is 0, its lse is -inf and its gradients are 0, whatever the masked slots hold.

    Raises
    ------
    TypeError
        If an array is not float32 or float64, or dtypes differ.
    ValueError
        If shapes do not fit together.
    NotImplementedError
        For a keyword without support, and for an `attn_mask` that requires a gradient.

    Notes
    -----
    Sq Sk (D + Dv) multiply-adds a head, half of it causal; the backward pass takes 2.5 times as many. Both need
    memory O(S D).
    """
    causal = 0
    if is_causal or causal_align != "bottom_right":
        causal = _causal(is_causal, causal_align)
    if (dropout_p != 0.0 or window_size != (-1, -1) or softcap != 0.0 or alibi_slopes is not None
            or sinks is not None or kv_lengths is not None or rng is not None):
        _refuse(dropout_p, window_size, softcap, alibi_slopes, sinks, kv_lengths, rng)
    if type(query) is np.ndarray and type(key) is np.ndarray and type(value) is np.ndarray and \
            type(attn_mask) is not Tensor:
        return _core.attention_forward(query, key, value, attn_mask, scale, causal, out, 1 if return_lse else 0)
    if type(attn_mask) is Tensor:
        if attn_mask.requires_grad:
            raise NotImplementedError(f"{_OP}: the gradient of attn_mask is not supported yet; give an array")
        attn_mask = attn_mask.data
    return apply(attention_forward, attention_backward, query, key, value, attn_mask=attn_mask, causal=causal,
                 scale=scale, return_lse=return_lse, out=out)


def _split(qkv, num_heads, num_kv_heads):
    """query, key and value as (B, heads, S, D) views of (B, S, (H + 2 Hkv) D)."""
    batch, length, _ = qkv.shape
    heads = qkv.reshape(batch, length, num_heads + 2 * num_kv_heads, -1).transpose(0, 2, 1, 3)
    return heads[:, :num_heads], heads[:, num_heads:num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads:]


def _turn(heads, rotary, inverse):
    """Turn heads (B, S, heads, D) by the angles of their positions, in place."""
    cos, sin = rotary
    _core.rotary(heads, cos[:, None], sin[:, None], 2 * cos.shape[-1], False, inverse, heads)


def packed_attention_forward(qkv, num_heads, num_kv_heads, is_causal=False, scale=None, rotary=None):
    """Return ``(out, saved)``; `saved` is what :func:`packed_attention_backward` needs."""
    if rotary is not None:
        qkv = _core.pooled(np.array, qkv, order="C")
        heads = qkv.reshape(*qkv.shape[:2], num_heads + 2 * num_kv_heads, -1)
        _turn(heads[:, :, :num_heads + num_kv_heads], rotary, False)
    query, key, value = _split(qkv, num_heads, num_kv_heads)
    out, _, stats = _core.attention_forward(query, key, value, None, scale, int(is_causal), None, 2)
    joined = out.transpose(0, 2, 1, 3).reshape(*qkv.shape[:2], -1)
    return joined, (query, key, value, int(is_causal), scale, out, stats, rotary)


def packed_attention_backward(dy, saved):
    """Return the gradient with respect to `qkv`, in a tuple."""
    query, key, value, causal, scale, out, stats, rotary = saved
    batch, heads, length, dim = out.shape
    dout = dy.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
    dqkv = _core.attention_backward(query, key, value, None, scale, causal, out, stats, dout, None, True)
    if rotary is not None:
        _turn(dqkv.reshape(batch, length, -1, dim)[:, :, :heads + key.shape[1]], rotary, True)
    return (dqkv,)


def packed_attention(qkv, num_heads, num_kv_heads=None, *, is_causal=False, scale=None, rotary=None):
    """Self-attention straight from a joined projection to joined heads, without a copy in either direction.

    With `rotary` there is one copy, of `qkv` with its queries and keys turned.

    Parameters
    ----------
    qkv : ndarray or Tensor, (B, S, (H + 2 Hkv) D), float32 or float64
        The heads of the queries, then of the keys, then of the values.
    num_heads : int
        H.
    num_kv_heads : int, optional
        Hkv, H by default; H must be a multiple of it.
    is_causal : bool
    scale : float, optional
        ``1/sqrt(D)`` by default.
    rotary : (cos, sin), optional
        Each (S, D / 2), as for :func:`numformer.rotary_embedding`: queries and keys are turned by it first.

    Returns
    -------
    ndarray, or Tensor where `qkv` is one, (B, S, H D)

    Raises
    ------
    ValueError
        If the last axis of `qkv` does not divide into the heads.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    shape = (qkv.data if type(qkv) is Tensor else qkv).shape
    if len(shape) != 3 or num_kv_heads < 1 or num_heads < 1 or shape[2] % (num_heads + 2 * num_kv_heads):
        raise ValueError(f"packed_attention: qkv must have shape (B, S, (H + 2 Hkv) D) with H = {num_heads} and "
                         f"Hkv = {num_kv_heads}, got {shape}")
    return apply(packed_attention_forward, packed_attention_backward, qkv, num_heads=num_heads,
                 num_kv_heads=num_kv_heads, is_causal=is_causal, scale=scale, rotary=rotary)
