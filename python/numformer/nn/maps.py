"""Attention weights to look at: of chosen heads and rows, since nothing else ever holds one.

    w[b, h, i, j] = exp(s[i, j] - log sum_j exp s[i, j]),   s as scaled_dot_product_attention has it

Memory O(B heads rows S).
"""
import numpy as np

from numformer.ops.arguments import as_arrays, as_bool, as_floats, as_number, same_dtype
from numformer.ops.attention import as_window
from numformer.tensor import Tensor, is_float

__all__ = ["attention_maps"]


def _chosen(index, length, name):
    """An index array of what is to be looked at."""
    if index is None:
        return np.arange(length)
    chosen = np.atleast_1d(np.asarray(index))
    if chosen.shape == (0,):        # an empty list is one of floats
        return np.arange(0)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or (chosen >= length).any() or (chosen < -length).any():
        raise ValueError(f"attention_maps: {name} must be integers below {length}, got {index!r}")
    return chosen % length


def attention_maps(query, key, attn_mask=None, is_causal=False, scale=None, *, heads=None, rows=None,
                   causal_align="bottom_right", window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None,
                   kv_lengths=None):
    """Return the weights that :func:`numformer.scaled_dot_product_attention` gives to the values, without dropout.

    Parameters
    ----------
    query : array_like or Tensor, (B, H, Sq, D), float32 or float64
    key : (B, Hkv, Sk, D)
    heads : int or sequence of int, optional
        Query heads to look at; all by default.
    rows : int or sequence of int, optional
        Queries to look at; negative ones count from the end; all by default.
    attn_mask, is_causal, scale, causal_align, window_size, softcap, alibi_slopes, sinks, kv_lengths
        As there.

    Returns
    -------
    ndarray, (B, heads, rows, Sk)
        Each row sums to 1, less the share of a sink; where a query sees no key it is 0. No gradient.

    Raises
    ------
    TypeError
        If query or key is of another dtype, or their dtypes differ, or something is no number.
    ValueError
        If shapes do not fit together, or there is no such head or row, or a number is out of its range.
    """
    op = "attention_maps"
    query, key, attn_mask, alibi_slopes, sinks = (
        x.data if type(x) is Tensor else x for x in (query, key, attn_mask, alibi_slopes, sinks))
    query, key = as_floats(query, op, "query"), as_floats(key, op, "key")
    attn_mask, alibi_slopes, sinks = as_arrays(op, attn_mask=attn_mask, alibi_slopes=alibi_slopes, sinks=sinks)
    boolean = attn_mask is not None and attn_mask.dtype == bool
    same_dtype(op, query=query, key=key)
    added = {"attn_mask": None if boolean else attn_mask, "alibi_slopes": alibi_slopes, "sinks": sinks}
    for name, x in added.items():
        if x is not None and not is_float(x.dtype):
            raise TypeError(f"{op}: {name} must be {'boolean or ' * (x is attn_mask)}of floats, got {x.dtype}")
    if query.ndim != 4 or key.ndim != 4 or query.shape[::3] != key.shape[::3] or (
            query.shape[1] != key.shape[1] and (key.shape[1] == 0 or query.shape[1] % key.shape[1])):
        raise ValueError("attention_maps: query must have shape (B, H, Sq, D) and key (B, Hkv, Sk, D), H a multiple of "
                         f"Hkv, got {query.shape} and {key.shape}")
    if causal_align not in ("bottom_right", "top_left"):
        raise ValueError(f'attention_maps: causal_align must be "bottom_right" or "top_left", got {causal_align!r}')
    batch, all_heads, queries, dim = query.shape
    keys = key.shape[2]
    scale = max(dim, 1) ** -0.5 if scale is None else as_number(scale, op, "scale")
    softcap = 0.0 if softcap is None else as_number(softcap, op, "softcap")
    if not 0 <= softcap < np.inf:
        raise ValueError(f"{op}: softcap must be finite and not negative, got {softcap}")
    left, right = as_window(window_size, op)
    if left < -1 or right < -1:
        raise ValueError(f"{op}: window_size must be two numbers of keys, -1 for no bound, got {window_size}")
    if sinks is not None and sinks.shape != (all_heads,):
        raise ValueError(f"{op}: sinks must have shape {(all_heads,)}, got {sinks.shape}")
    if alibi_slopes is not None and alibi_slopes.shape not in ((all_heads,), (batch, all_heads)):
        raise ValueError(f"{op}: alibi_slopes must have shape {(all_heads,)} or {(batch, all_heads)}, got "
                         f"{alibi_slopes.shape}")
    if attn_mask is not None:
        attn_mask = _broadcast(attn_mask, (batch, all_heads, queries, keys))
    heads, rows = _chosen(heads, all_heads, "heads"), _chosen(rows, queries, "rows")
    groups = all_heads // max(key.shape[1], 1)
    dtype = query.dtype.type
    score = np.empty((batch, len(heads), len(rows), keys), dtype)
    # what is masked may hold anything, and the product says nothing of it
    with np.errstate(invalid="ignore", over="ignore"):
        for i, h in enumerate(heads):
            score[:, i] = query[:, h, rows] @ key[:, h // groups].swapaxes(1, 2)
        score *= dtype(scale)
        if softcap:
            score = dtype(softcap) * np.tanh(score / dtype(softcap))
    ends = _ends(kv_lengths, batch, keys)
    shift = ends - queries if causal_align == "bottom_right" else np.zeros(batch, int)
    position = (rows + shift[:, None])[:, None, :, None]            # (B, 1, rows, 1)
    j = np.arange(keys)
    farthest = queries + keys       # the sides are Python's integers, of any size
    right = 0 if as_bool(is_causal, op, "is_causal") else min(right, farthest)
    seen = _seen(position, j, ends, min(left, farthest), right)
    if alibi_slopes is not None:
        slope = np.broadcast_to(alibi_slopes, (batch, all_heads))[:, heads, None, None].astype(dtype)
        score -= slope * (position - j).astype(dtype)
    if attn_mask is not None:
        mask = attn_mask[:, heads][:, :, rows]
        seen = seen & (mask if boolean else mask != -np.inf)
        if not boolean:
            with np.errstate(invalid="ignore", over="ignore"):
                score = score + mask.astype(dtype)
    sink = None if sinks is None else sinks[heads][:, None, None].astype(dtype)
    return _softmax(np.where(seen, score, dtype(-np.inf)), sink)


def _broadcast(mask, shape):
    """`mask` for every weight; a view."""
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"attention_maps: attn_mask must broadcast to (B, H, Sq, Sk) = {shape}, got "
                         f"{mask.shape}") from None


def _ends(kv_lengths, batch, keys):
    """Where the keys of each sequence end."""
    if kv_lengths is None:
        return np.full(batch, keys)
    ends = np.asarray(kv_lengths)
    if ends.shape != (batch,) or ends.dtype.kind not in "iu" or (ends < 0).any() or (ends > keys).any():
        raise ValueError(f"attention_maps: kv_lengths must be {batch} integers between 0 and Sk = {keys}, got "
                         f"{kv_lengths!r}")
    return ends.astype(np.int64)


def _seen(position, j, ends, left, right):
    """Which keys j a query at `position` sees, of sequences that end at `ends` (B,); -1 is no bound."""
    seen = j < ends[:, None, None, None]
    if left >= 0:
        seen = seen & (j >= position - left)
    if right >= 0:
        seen = seen & (j <= position + right)
    return seen


def _softmax(score, sink):
    """Of each row, with one more logit `sink` (None: without) that has no weight; 0 where a row is -inf."""
    dtype = score.dtype.type
    top = score.max(axis=3, keepdims=True, initial=-np.inf)
    if sink is not None:
        top = np.maximum(top, sink)
    top = np.where(top == -np.inf, dtype(0), top)
    weight = np.exp(score - top)
    total = weight.sum(axis=3, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
