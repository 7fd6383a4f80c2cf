"""Scaled-dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), in memory O(S D) both ways.

No S x S matrix is ever held: the softmax runs online over chunks of keys (Milakov & Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), and the backward pass builds it again from two numbers a row.
"""
import numpy as np

from numformer import _core
from numformer.ops.arguments import PLAIN, as_array, as_arrays, as_bool, as_integer, as_number, choose
from numformer.tensor import Tensor, apply, draw_key, is_float

__all__ = ["alibi_slopes", "merge_attention", "merge_attention_backward", "merge_attention_forward", "packed_attention",
           "packed_attention_backward", "packed_attention_forward", "scaled_dot_product_attention",
           "scaled_dot_product_attention_backward", "scaled_dot_product_attention_forward"]

_OP = "scaled_dot_product_attention"
_ALIGN = {"bottom_right": 0, "top_left": 2}
_CAUSAL, _PACKED, _WANT_MASK, _WANT_SLOPES, _WANT_SINKS = 1, 1, 2, 4, 8     # as in csrc/bind/attention.c


def _causal(is_causal, causal_align, op=_OP):
    """Which keys a query sees, in the binding's terms."""
    if type(is_causal) is not bool:
        is_causal = as_bool(is_causal, op, "is_causal")
    return choose(_ALIGN, causal_align, op, "causal_align") | (_CAUSAL if is_causal else 0)


def as_window(window_size, op):
    """(left, right) as ints."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"{op}: window_size must be two numbers of keys, (left, right), got "
                         f"{window_size!r}") from None
    if type(left) is int and type(right) is int:
        return left, right
    return tuple(as_integer(side, op, "each side of window_size") for side in (left, right))


def _features(window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None, kv_lengths=None, dropout_p=0.0,
              rng=None, cu_seqlens_q=None, cu_seqlens_k=None, block_table=None, key_scale=None, value_scale=None):
    """The binding's tuple of what most calls leave out, or None; draws the key of the dropout."""
    op = "paged_attention" if block_table is not None else "attention_varlen" if cu_seqlens_q is not None else _OP
    if type(softcap) is not float:
        softcap = 0.0 if softcap is None else as_number(softcap, op, "softcap")
    if kv_lengths is not None:
        kv_lengths = as_array(kv_lengths, op, "kv_lengths")
    if type(dropout_p) is not float:
        dropout_p = as_number(dropout_p, op, "dropout_p")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    key = 0 if dropout_p == 0 else draw_key(op, "dropout_p", rng)
    left, right = as_window(window_size, op)
    if left == right == -1 and softcap == 0 and dropout_p == 0 and (
            alibi_slopes is sinks is kv_lengths is cu_seqlens_q is block_table is None):
        return None
    return (left, right, softcap, alibi_slopes, sinks, kv_lengths, dropout_p, key, cu_seqlens_q, cu_seqlens_k,
            block_table, key_scale, value_scale)


def scaled_dot_product_attention_forward(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                         enable_gqa=False, *, causal_align="bottom_right", alibi_slopes=None,
                                         sinks=None, return_lse=False, out=None,
                                         gradients=("mask", "slopes", "sinks"), **features):
    """Return ``(out, saved)``, or ``((out, lse), saved)``; :func:`scaled_dot_product_attention_backward` needs `saved`.

    `features` are window_size, softcap, kv_lengths and rng; and cu_seqlens_q and cu_seqlens_k, where the
    batch axes have length 1 and the sequences lie one behind the other. `gradients` names those of attn_mask, ALiBi
    slopes and sinks that the backward pass shall compute.
    """
    op = _OP if features.get("cu_seqlens_q") is None else "attention_varlen"
    query, key, value, attn_mask, alibi_slopes, sinks = as_arrays(
        op, query=query, key=key, value=value, attn_mask=attn_mask, alibi_slopes=alibi_slopes, sinks=sinks)
    if scale is not None and type(scale) is not float:
        scale = as_number(scale, op, "scale")
    causal = _causal(is_causal, causal_align, op)
    features = _features(alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, **features)
    out, lse, stats, exact = _core.attention_forward(query, key, value, attn_mask, scale, causal, features, out, 2)
    saved = query, key, value, attn_mask, causal, scale, features, gradients, return_lse, exact, stats
    return ((out, lse) if return_lse else out), saved


def _scaled_dot_product_attention_forward(query, key, value, attn_mask, alibi_slopes, sinks, **keywords):
    """As the tape has it: what has a gradient comes first."""
    return scaled_dot_product_attention_forward(query, key, value, attn_mask, alibi_slopes=alibi_slopes, sinks=sinks,
                                                **keywords)


def _mask_gradient(gradient, mask):
    """What the kernel left, summed to the shape of the mask."""
    if gradient is None or gradient.shape == mask.shape:
        return None if gradient is None else gradient.astype(mask.dtype, copy=False)
    shape = (1,) * (4 - mask.ndim) + mask.shape
    gradient = gradient[..., None] if shape[3] == 1 else gradient[:, :, None]
    axes = tuple(i for i in range(4) if shape[i] == 1)
    return gradient.sum(axis=axes, keepdims=True, dtype=np.float64).astype(mask.dtype).reshape(mask.shape)


def scaled_dot_product_attention_backward(dy, saved):
    """Return the gradients with respect to query, key, value, attn_mask, alibi_slopes and sinks; None where not wanted.

    A gradient has its heads inside its rows in memory, as (B, S, H, D), where the array it belongs to has.
    """
    query, key, value, attn_mask, causal, scale, features, gradients, return_lse, exact, stats = saved
    dout, dlse = dy if return_lse else (dy, None)
    wants = (_WANT_MASK * ("mask" in gradients) + _WANT_SLOPES * ("slopes" in gradients)
             + _WANT_SINKS * ("sinks" in gradients))
    dq, dk, dv, dmask, dslopes, dsinks = _core.attention_backward(
        query, key, value, attn_mask, scale, causal, features, exact, stats, dout, dlse, wants)
    if dslopes is not None:
        slopes = features[3]
        dslopes = dslopes.sum(axis=2 if slopes.ndim == 2 else (0, 2), dtype=np.float64).astype(slopes.dtype)
    if dsinks is not None:
        dsinks = dsinks.sum(axis=(0, 2), dtype=np.float64).astype(features[4].dtype)
    return dq, dk, dv, _mask_gradient(dmask, attn_mask), dslopes, dsinks


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False, *, causal_align="bottom_right", window_size=(-1, -1), softcap=0.0,
                                 alibi_slopes=None, sinks=None, kv_lengths=None, rng=None, return_lse=False, out=None):
    """Compute ``softmax(scale * query @ key^T + attn_mask) @ value``.

    Any strides whose last axis is contiguous are read as they are, such as views of one joined product of query,
    key and value or of a cache with room to grow; others are copied. A row's bits depend on nothing but its own
    query and the keys that it sees: not on threads, batch, or whether it is one cached step or part of a sequence.

    Parameters
    ----------
    query : array_like or Tensor, (B, H, Sq, D), float32, float64, float16 or bfloat16 (of ml_dtypes)
        float16 and bfloat16 are storage: all is computed in float32, and results and gradients are rounded to the
        dtype once, to nearest. For the gradients the result is kept as it was before, in float32.
    key : (B, Hkv, Sk, D), of the same dtype
        `H` must be a multiple of `Hkv`; query head `h` reads head ``h // (H // Hkv)`` (Ainslie et al. 2023,
        arXiv:2305.13245).
    value : (B, Hkv, Sk, Dv)
    attn_mask : array_like or Tensor that broadcasts to (B, H, Sq, Sk), optional
        Boolean: True where a query attends. Floating, of query's dtype (or float32, where that is float16 or
        bfloat16): added to the scaled scores; its gradient is summed over the axes that it is broadcast along.
    dropout_p : float
        Probability, below 1, that a weight is set to 0 after the softmax; the others are divided by
        ``1 - dropout_p``. lse is that without dropout.
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

        The positions of the queries that it gives are those of `window_size` and `alibi_slopes` too.
    window_size : (left, right)
        A query at position p sees the keys ``p - left`` to ``p + right`` alone; -1 is no bound. The time is
        proportional to the window.
    softcap : float
        Scaled scores s become ``softcap * tanh(s / softcap)`` (Gemma 2, arXiv:2408.00118), before anything is added;
        0.0 is none.
    alibi_slopes : array_like or Tensor, (H,) or (B, H), of a dtype as `attn_mask`, optional
        ``-slope * (p - j)`` is added to the score of key j for a query at position p (Press et al. 2022,
        arXiv:2108.12409); :func:`alibi_slopes` gives the paper's slopes.
    sinks : array_like or Tensor, (H,), of a dtype as `attn_mask`, optional
        One more logit in the softmax of every row of a head, without a value (gpt-oss; Xiao et al. 2024,
        arXiv:2309.17453). It counts in lse, so the lse of a row that sees no key is the sink.
    kv_lengths : int array, (B,), optional
        Keys and values from there on are padding, which is never read; "bottom_right" then aligns to that length.
        A sequence has the bits that it would have without padding, where dropout is off.
    rng : numpy.random.Generator
        Advanced by one number where `dropout_p` is not 0. Which weights are dropped is a function of that number and
        of (batch, head, position of the query, key) alone, so it does not depend on threads, dtype or the cut of the
        work, and the backward pass makes the mask again.
    return_lse : bool
        Return ``(out, lse)``, lse (B, H, Sq) the natural logarithm of each row's sum of exponentials, float64 where
        query is, else float32.
    out : ndarray, (B, H, Sq, Dv), optional
        Where to write the result: contiguous as (B, H, Sq, Dv) or as (B, Sq, H, Dv), sharing no memory with the
        others.

    Returns
    -------
    ndarray, or Tensor where one of the inputs is one, (B, H, Sq, Dv)
        In memory (B, Sq, H, Dv) where query is a view of that order, so that joining the heads copies nothing.
        A row that sees no key is 0, its lse is -inf and its gradients are 0, whatever the masked slots hold.
        NaN and infinities give what the formula gives, with one exception: a score of -inf masks, however it came
        about, and a weight of 0 adds nothing, whatever its value holds (0 times inf is 0 here).

    Raises
    ------
    TypeError
        If an array is of another dtype, or dtypes differ, or there is no `rng` for the dropout.
    ValueError
        If shapes do not fit together, or a number is out of its range.

    Notes
    -----
    The order is scale, softcap, ALiBi and added mask, boolean mask, causality and window, softmax, dropout.

    Sq Sk (D + Dv) multiply-adds a head, half of it causal; the backward pass takes 2.5 times as many. Both need
    memory O(S D).

    On x86 a product, sum or result below the least normal number (2**-126; float64: 2**-1022) is 0, in the gradients
    too: processors are up to a hundred times as slow on such numbers, which the weights of far keys would make.
    """
    if scale is not None and type(scale) is not float:
        scale = as_number(scale, _OP, "scale")
    arrays = type(query) is type(key) is type(value) is np.ndarray
    extras = (type(window_size) is not tuple or window_size != (-1, -1) or type(softcap) is not float or softcap
              or alibi_slopes is not None or sinks is not None or kv_lengths is not None
              or type(dropout_p) is not float or dropout_p != 0.0)
    if arrays and type(attn_mask) in PLAIN and not extras:
        plain = is_causal is False and causal_align == "bottom_right"
        causal = 0 if plain else _causal(is_causal, causal_align)
        return _core.attention_forward(query, key, value, attn_mask, scale, causal, None, out, 1 if return_lse else 0)
    features = {"window_size": window_size, "softcap": softcap, "kv_lengths": kv_lengths, "dropout_p": dropout_p,
                "rng": rng}
    sides = {"mask": attn_mask, "slopes": alibi_slopes, "sinks": sinks}
    if arrays and all(type(x) in PLAIN for x in sides.values()):
        return _core.attention_forward(query, key, value, attn_mask, scale, _causal(is_causal, causal_align),
                                       _features(alibi_slopes=alibi_slopes, sinks=sinks, **features), out,
                                       1 if return_lse else 0)
    wanted = tuple(name for name, x in sides.items() if type(x) is Tensor and x.requires_grad)
    return apply(_scaled_dot_product_attention_forward, scaled_dot_product_attention_backward,
                 query, key, value, attn_mask, alibi_slopes, sinks, is_causal=is_causal, causal_align=causal_align,
                 scale=scale, return_lse=return_lse, out=out, gradients=wanted, **features)


def alibi_slopes(num_heads):
    """The slopes of ALiBi (Press et al. 2022, arXiv:2108.12409).

    Parameters
    ----------
    num_heads : int

    Returns
    -------
    ndarray, (num_heads,), float32
        ``2^(-8 h / n)``, h = 1 ... n, for a power of two n. For another number, those of the largest power of two
        below it, followed by every other one of twice as many heads, as the paper's code has it.

    Raises
    ------
    TypeError
        If `num_heads` is no integer.
    ValueError
        If `num_heads` is below 1.
    """
    num_heads = as_integer(num_heads, "alibi_slopes", "num_heads")
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {num_heads}")
    power = 1 << (num_heads.bit_length() - 1)
    whole = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([whole, between[:num_heads - power]]).astype(np.float32)


def merge_attention_forward(out_a, lse_a, out_b, lse_b):
    """Return ``((out, lse), saved)``; `saved` is what :func:`merge_attention_backward` needs."""
    parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    out_a, lse_a, out_b, lse_b = (as_array(x, "merge_attention", name) for name, x in parts.items())
    if not out_a.shape == out_b.shape == (*lse_a.shape, *out_a.shape[-1:]) or lse_a.shape != lse_b.shape:
        raise ValueError("merge_attention: out_a and out_b must have one shape, and lse_a and lse_b that shape without "
                         f"its last axis, got {out_a.shape}, {lse_a.shape}, {out_b.shape}, {lse_b.shape}")
    for name, x, other in (("out", out_a, out_b), ("lse", lse_a, lse_b)):
        if not is_float(x.dtype) or x.dtype != other.dtype:
            raise TypeError(f"merge_attention: {name}_a and {name}_b must be floats of one dtype, got {x.dtype} and "
                            f"{other.dtype}; convert with .astype")
    dtype = out_a.dtype
    out_a, out_b = (x.astype(lse_a.dtype, copy=False) for x in (out_a, out_b))
    top = np.maximum(lse_a, lse_b)
    base = np.where(top == -np.inf, top.dtype.type(0), top)
    a, b = np.exp(lse_a - base), np.exp(lse_b - base)
    total = a + b
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    share_a, share_b = (np.divide(x, total, out=np.zeros_like(total), where=total != 0)[..., None] for x in (a, b))
    # A part that has no weight may hold anything.
    with np.errstate(invalid="ignore", over="ignore"):
        out = np.where(share_a == 0, out_b, out_a + (out_b - out_a) * share_b)
        out = np.where(share_b == 0, np.where(share_a == 0, out_a.dtype.type(0), out_a), out)
    return (out.astype(dtype, copy=False), lse), (out_a, out_b, share_a, share_b, dtype)


def merge_attention_backward(dy, saved):
    """Return the gradients with respect to out_a, lse_a, out_b and lse_b."""
    (dout, dlse), (out_a, out_b, share_a, share_b, dtype) = dy, saved
    dout = np.zeros_like(out_a) if dout is None else dout.astype(out_a.dtype, copy=False)
    both = (share_a > 0) & (share_b > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        turn = np.where(both, dout * (out_b - out_a), out_a.dtype.type(0)).sum(axis=-1) * (share_a * share_b)[..., 0]
    none = out_a.dtype.type(0)
    dlse_a, dlse_b = (0 if dlse is None else np.where(share == 0, none, share * dlse)
                      for share in (share_a[..., 0], share_b[..., 0]))
    return (np.where(share_a == 0, none, dout * share_a).astype(dtype, copy=False), dlse_a - turn,
            np.where(share_b == 0, none, dout * share_b).astype(dtype, copy=False), dlse_b + turn)


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Join the attention of one set of queries to two disjoint sets of keys.

    Parameters
    ----------
    out_a, out_b : array_like or Tensor, (..., Dv)
        What :func:`scaled_dot_product_attention` gave for each set.
    lse_a, lse_b : array_like or Tensor, (...)
        Its lse, of the shape of out without its last axis. With sinks, one of the two sets must be made without.
        The sum is made in its dtype.

    Returns
    -------
    out : (..., Dv)
        ``out_a + (out_b - out_a) * sigmoid(lse_b - lse_a)``; a part whose lse is -inf may hold anything, and where both
        are the result is 0.
    lse : (...)
        ``log(exp(lse_a) + exp(lse_b))``

    Raises
    ------
    TypeError
        If out_a and out_b, or lse_a and lse_b, are not floats of one dtype.
    ValueError
        If the shapes do not fit together.
    """
    return apply(merge_attention_forward, merge_attention_backward, out_a, lse_a, out_b, lse_b)


def _heads(packed, count):
    """(B, S, count D) as (B, S, count, D); -1 in reshape is no number where an axis is 0."""
    batch, length, width = packed.shape
    return packed.reshape(batch, length, count, width // count)


def heads_of(qkv, num_heads, num_kv_heads):
    """query, key and value as (B, heads, S, D) views of (B, S, (H + 2 Hkv) D)."""
    heads = _heads(qkv, num_heads + 2 * num_kv_heads).transpose(0, 2, 1, 3)
    return heads[:, :num_heads], heads[:, num_heads:num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads:]


def _turn(heads, rotary, inverse):
    """Turn heads (B, S, heads, D) by the angles of their positions, in place."""
    cos, sin = rotary
    _core.rotary(heads, cos[:, None], sin[:, None], heads.shape[-1], False, inverse, heads)


def packed_attention_forward(qkv, num_heads, num_kv_heads=None, is_causal=False, scale=None, rotary=None,
                             window_size=(-1, -1), alibi_slopes=None):
    """Return ``(out, saved)``; `saved` is what :func:`packed_attention_backward` needs."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    qkv = as_array(qkv, "packed_attention", "qkv")
    if qkv.ndim != 3 or num_kv_heads < 1 or num_heads < 1 or qkv.shape[2] % (num_heads + 2 * num_kv_heads):
        raise ValueError(f"packed_attention: qkv must have shape (B, S, (H + 2 Hkv) D) with H = {num_heads} and "
                         f"Hkv = {num_kv_heads}, got {qkv.shape}")
    if rotary is not None:
        qkv = _core.pooled(np.array, qkv, order="C")
        heads = _heads(qkv, num_heads + 2 * num_kv_heads)
        _turn(heads[:, :, :num_heads + num_kv_heads], rotary, False)
    query, key, value = heads_of(qkv, num_heads, num_kv_heads)
    features = _features(window_size, alibi_slopes=alibi_slopes)
    out, _, stats, exact = _core.attention_forward(query, key, value, None, scale, int(is_causal), features, None, 2)
    joined = out.transpose(0, 2, 1, 3).reshape(*qkv.shape[:2], num_heads * out.shape[3])
    return joined, (query, key, value, int(is_causal), scale, features, exact, stats, rotary)


def packed_attention_backward(dy, saved):
    """Return the gradient with respect to `qkv`, in a tuple."""
    query, key, value, causal, scale, features, exact, stats, rotary = saved
    batch, heads, length, dim = exact.shape
    dout = dy.reshape(batch, length, heads, dim).transpose(0, 2, 1, 3)
    dqkv = _core.attention_backward(query, key, value, None, scale, causal, features, exact, stats, dout, None, _PACKED)
    if rotary is not None:
        _turn(_heads(dqkv, heads + 2 * key.shape[1])[:, :, :heads + key.shape[1]], rotary, True)
    return (dqkv,)


def packed_attention(qkv, num_heads, num_kv_heads=None, *, is_causal=False, scale=None, rotary=None,
                     window_size=(-1, -1), alibi_slopes=None):
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
    window_size : (left, right)
    alibi_slopes : ndarray, (H,), optional
        Constants here, without a gradient.

    Returns
    -------
    ndarray, or Tensor where `qkv` is one, (B, S, H D)

    Raises
    ------
    ValueError
        If the last axis of `qkv` does not divide into the heads.
    """
    return apply(packed_attention_forward, packed_attention_backward, qkv, num_heads=num_heads,
                 num_kv_heads=num_kv_heads, is_causal=is_causal, scale=scale, rotary=rotary, window_size=window_size,
                 alibi_slopes=alibi_slopes)
