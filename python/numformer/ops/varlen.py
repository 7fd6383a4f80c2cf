"""Attention of sequences of different lengths without padding: packed one behind the other, or cached in blocks."""

import numpy as np

from numformer import _core
from numformer.ops import attention
from numformer.ops.arguments import as_array, as_arrays, as_number
from numformer.tensor import Tensor, apply

__all__ = ["attention_varlen", "attention_varlen_backward", "attention_varlen_forward", "paged_attention"]


def _heads(x, op, name):
    """(T, H, D) as (1, H, T, D), a view."""
    x = as_array(x, op, name)
    if x.ndim != 3:
        raise ValueError(f"{op}: {name} must be an array (tokens, heads, head_dim), got {x.shape}")
    return x.transpose(1, 0, 2)[None]


def _place(out, op, query, value_dim):
    """`out` (T, H, D), which is to be written, as the kernel takes it; `query` is so already."""
    if out is None:
        return None
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{op}: out must be an array, got {type(out).__name__}")
    shape = query.shape[2], query.shape[1], value_dim
    if out.shape != shape:
        raise ValueError(f"{op}: out must have shape {shape}, got {out.shape}")
    return _heads(out, op, "out")


def _tokens(x):
    """The way back, of (1, H, T, D) or (1, H, T)."""
    return x[0].swapaxes(0, 1)


def attention_varlen_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes=None, sinks=None, *,
                             return_lse=False, out=None, **keywords):
    """Return ``(out, saved)``, or ``((out, lse), saved)``; `saved` is what :func:`attention_varlen_backward` needs."""
    query, key, value = (_heads(x, "attention_varlen", name) for x, name in
                         ((query, "query"), (key, "key"), (value, "value")))
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"attention_varlen: key must have shape (Tk, Hkv, {query.shape[3]}) as query says, got "
                         f"{_tokens(key).shape}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"attention_varlen: value must have shape ({key.shape[2]}, {key.shape[1]}, Dv) as key says, "
                         f"got {_tokens(value).shape}")
    cu_seqlens_q, cu_seqlens_k = (as_array(x, "attention_varlen", name) for x, name in
                                  ((cu_seqlens_q, "cu_seqlens_q"), (cu_seqlens_k, "cu_seqlens_k")))
    (heads, lse), saved = attention.scaled_dot_product_attention_forward(
        query, key, value, alibi_slopes=alibi_slopes, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        return_lse=True, out=_place(out, "attention_varlen", query, value.shape[3]), **keywords)
    out = _tokens(heads) if out is None else out
    return ((out, _tokens(lse)) if return_lse else out), (saved, return_lse)


def attention_varlen_backward(dy, saved):
    """Return the gradients with respect to query, key, value, None twice, and those of alibi_slopes and sinks."""
    saved, return_lse = saved
    dout, dlse = dy if return_lse else (dy, None)
    dout = None if dout is None else _heads(dout, "attention_varlen", "the gradient of out")
    dlse = None if dlse is None else dlse.T[None]
    dq, dk, dv, _, dslopes, dsinks = attention.scaled_dot_product_attention_backward((dout, dlse), saved)
    return _tokens(dq), _tokens(dk), _tokens(dv), None, None, dslopes, dsinks


def attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, *, dropout_p=0.0, is_causal=False, scale=None,
                     enable_gqa=False, causal_align="bottom_right", window_size=(-1, -1), softcap=0.0,
                     alibi_slopes=None, sinks=None, kv_lengths=None, rng=None, return_lse=False, out=None):
    """Compute :func:`scaled_dot_product_attention` for sequences that lie one behind the other.

    A sequence sees itself alone, and has the bits that it would have in a call of its own, where dropout is off.

    Parameters
    ----------
    query : array_like or Tensor, (Tq, H, D), float32, float64, float16 or bfloat16 (of ml_dtypes)
    key : (Tk, Hkv, D)
    value : (Tk, Hkv, Dv)
    cu_seqlens_q : int array, (B + 1,)
        Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``; the first is 0, the last Tq.
    cu_seqlens_k : int array, (B + 1,)
        The same of keys and values.
    dropout_p, is_causal, scale, enable_gqa, causal_align, window_size, softcap, alibi_slopes, sinks, kv_lengths, rng
        As there; positions count in each sequence, `alibi_slopes` is (H,) or (B, H). `kv_lengths`, (B,), is for
        sequences whose last keys are padding.
    return_lse : bool
        Return ``(out, lse)``, lse (Tq, H).
    out : ndarray, (Tq, H, Dv), C-contiguous, optional
        Where to write the result; shares no memory with the others.

    Returns
    -------
    ndarray, or Tensor where one of the inputs is one, (Tq, H, Dv)

    Raises
    ------
    TypeError
        If an array is of another dtype, dtypes differ, or cu_seqlens are not integers.
    ValueError
        If shapes do not fit together, or cu_seqlens do not rise from 0 to the number of tokens.

    Notes
    -----
    Time and memory are those of the sequences alone: nothing is padded or copied.
    """
    if scale is not None and type(scale) is not float:
        scale = as_number(scale, "attention_varlen", "scale")
    sides = {"slopes": alibi_slopes, "sinks": sinks}
    wanted = tuple(name for name, x in sides.items() if type(x) is Tensor and x.requires_grad)
    return apply(attention_varlen_forward, attention_varlen_backward, query, key, value, cu_seqlens_q, cu_seqlens_k,
                 alibi_slopes, sinks, dropout_p=dropout_p, is_causal=is_causal, scale=scale, causal_align=causal_align,
                 window_size=window_size, softcap=softcap, kv_lengths=kv_lengths, rng=rng, return_lse=return_lse,
                 out=out, gradients=wanted)


def _shorter(kv_lengths, cache_seqlens):
    """`kv_lengths`, where none is longer than its sequence in the cache."""
    kv_lengths, most = as_arrays("paged_attention", kv_lengths=kv_lengths, cache_seqlens=cache_seqlens)
    if kv_lengths.dtype.kind not in "iu":
        raise TypeError(f"paged_attention: kv_lengths must be integers, got {kv_lengths.dtype}")
    if kv_lengths.shape != most.shape or (kv_lengths < 0).any() or (kv_lengths > most).any():
        raise ValueError(f"paged_attention: kv_lengths must be between 0 and cache_seqlens, {most}, got {kv_lengths}")
    return kv_lengths


def paged_attention(query, key_cache, value_cache, block_table, cache_seqlens, *, cu_seqlens_q=None, dropout_p=0.0,
                    is_causal=False, scale=None, enable_gqa=False, causal_align="bottom_right", window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, sinks=None, kv_lengths=None, rng=None, key_scale=None,
                    value_scale=None, return_lse=False, out=None):
    """Attend to keys and values that are cached in blocks (Kwon et al. 2023, arXiv:2309.06180); no gradient.

    Decoding steps and pieces of prompts may be mixed in one call. The result has the bits of
    :func:`scaled_dot_product_attention` on the same keys and values in one piece.

    Parameters
    ----------
    query : array_like, (B, H, Sq, D), or (Tq, H, D) with `cu_seqlens_q`; float32, float64, float16 or bfloat16
        The last queries of each sequence; their own keys and values are in the cache already.
    key_cache : array_like, (blocks, block_size, Hkv, D)
        float32, float16, bfloat16 or int8, whichever of these query is; float64 where query is.
    value_cache : array_like, (blocks, block_size, Hkv, Dv), of the same dtype
    block_table : int array, (B, most blocks of a sequence)
        Token j of sequence b lies in block ``block_table[b, j // block_size]`` at ``j % block_size``. Entries beyond
        the length of a sequence may be anything.
    cache_seqlens : int array, (B,)
        Tokens of each sequence in the cache. What stands in its blocks behind them is never read.
    cu_seqlens_q : int array, (B + 1,), optional
        Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, the same number or different ones.
    dropout_p, is_causal, scale, enable_gqa, causal_align, window_size, softcap, alibi_slopes, sinks, kv_lengths, rng
        As in :func:`scaled_dot_product_attention`: several queries of a sequence see each other's keys unless
        `is_causal`; a single one is the last, and sees all. `kv_lengths`, (B,), is for sequences of which only the
        first tokens in the cache shall count.
    key_scale, value_scale : array_like, (blocks, block_size) or (blocks, block_size, Hkv), float32
        Of int8 caches, and of these alone: what the row of a token, or of one of its heads, is multiplied by. The
        kernel multiplies the score by the one and the weight by the other, so the result is that of the multiplied
        rows but for roundings.
    return_lse : bool
        Return ``(out, lse)``, lse (B, H, Sq) or (Tq, H).
    out : ndarray of the result's shape, C-contiguous, optional
        Where to write it; shares no memory with the others.

    Returns
    -------
    ndarray, of the shape of `query` but for its last axis, Dv

    Raises
    ------
    TypeError
        If an array is of another dtype, or the tables are not integers.
    ValueError
        If shapes do not fit together, a table names what is not there, or scales are missing or not wanted.

    Notes
    -----
    A cache is read where it lies, a tile of keys at a time; no more than that is ever widened to float32.
    """
    op = "paged_attention"
    query, key_cache, value_cache, block_table = (as_array(x, op, name) for x, name in (
        (query, "query"), (key_cache, "key_cache"), (value_cache, "value_cache"), (block_table, "block_table")))
    cu_seqlens_q, alibi_slopes, sinks, key_scale, value_scale = as_arrays(
        op, cu_seqlens_q=cu_seqlens_q, alibi_slopes=alibi_slopes, sinks=sinks, key_scale=key_scale,
        value_scale=value_scale)
    for x, name in ((key_cache, "key_cache"), (value_cache, "value_cache")):
        if x.ndim != 4 or x.shape[1] == 0:
            raise ValueError(f"{op}: {name} must be an array (blocks, block_size, heads, head_dim), got {x.shape}")
    if query.shape[-1:] != key_cache.shape[3:]:
        raise ValueError(f"{op}: query and key_cache must have one head_dim as their last axis, got {query.shape} and "
                         f"{key_cache.shape}")
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(f"{op}: value_cache must have shape ({', '.join(map(str, key_cache.shape[:3]))}, Dv) as "
                         f"key_cache says, got {value_cache.shape}")
    if scale is not None and type(scale) is not float:
        scale = as_number(scale, op, "scale")
    if kv_lengths is not None:
        cache_seqlens = _shorter(kv_lengths, cache_seqlens)
    packed = cu_seqlens_q is not None
    query = _heads(query, op, "query") if packed else query
    features = attention._features(
        window_size, softcap, alibi_slopes, sinks, cache_seqlens, dropout_p, rng, cu_seqlens_q=cu_seqlens_q,
        block_table=block_table, key_scale=key_scale, value_scale=value_scale)
    result = _core.attention_forward(
        query, key_cache.swapaxes(1, 2), value_cache.swapaxes(1, 2), None, scale,
        attention._causal(is_causal, causal_align, op), features,
        _place(out, op, query, value_cache.shape[3]) if packed else out, 1)
    heads, lse = (_tokens(x) for x in result) if packed else result
    out = heads if out is None else out
    return (out, lse) if return_lse else out
