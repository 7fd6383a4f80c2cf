"""Multi-head attention with grouped queries, rotary positions or ALiBi, a window, and a key-value cache."""
import reprlib

import numpy as np

import numformer as nf
from numformer._core import pooled
from numformer.nn import init
from numformer.nn.layers import project
from numformer.nn.maps import attention_maps
from numformer.nn.module import Module
from numformer.ops.arguments import as_array, as_integer, as_number, need_sizes
from numformer.ops.attention import as_window, heads_of, packed_attention
from numformer.tensor import apply, is_float

__all__ = ["MultiHeadAttention", "rotary_tables", "split_heads"]


def rotary_tables(length, head_dim, *, theta=10000.0, dtype=np.float32):
    """The tables of rotary positions (Su et al. 2021, RoFormer): angles ``position * theta^(-2 i / head_dim)``.

    Parameters
    ----------
    length, head_dim : int
    theta : float
    dtype : float32 or float64

    Returns
    -------
    cos, sin : ndarray, (length, head_dim / 2)

    Raises
    ------
    ValueError
        If `head_dim` is odd or below 2, or `length` below 0.
    """
    if as_integer(length, "rotary_tables", "length") < 0:
        raise ValueError(f"rotary_tables: length must be 0 or more, got {length}")
    if as_integer(head_dim, "rotary_tables", "head_dim") < 2 or head_dim % 2:
        raise ValueError(f"rotary_tables: head_dim must be even and 2 or more, got {head_dim}")
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.outer(np.arange(length), frequency)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def split_heads_forward(qkv, n_head, n_kv_head):
    """Return ``((query, key, value), saved)``: views of `qkv`."""
    return heads_of(qkv, n_head, n_kv_head), (qkv.shape, n_head, n_kv_head)


def split_heads_backward(dy, saved):
    """Return the gradient with respect to `qkv`, in a tuple."""
    shape, n_head, n_kv_head = saved
    dqkv = pooled(np.empty, shape, next(d.dtype for d in dy if d is not None))
    for part, d in zip(heads_of(dqkv, n_head, n_kv_head), dy):
        part[...] = 0 if d is None else d
    return (dqkv,)


def split_heads(qkv, n_head, n_kv_head):
    """Query, key and value (B, heads, S, D) in one array (B, S, (n_head + 2 n_kv_head) D): views, no copies."""
    return apply(split_heads_forward, split_heads_backward, qkv, n_head=n_head, n_kv_head=n_kv_head)


def _pair(rotary, length, head_dim):
    """`rotary` as two arrays, for `length` positions, or None."""
    if rotary is None:
        return None
    try:
        cos, sin = rotary
    except (TypeError, ValueError):
        raise TypeError("MultiHeadAttention: rotary must be the pair (cos, sin), as rotary_tables gives it, got "
                        f"{reprlib.repr(rotary)}") from None
    cos, sin = as_array(cos, "MultiHeadAttention", "cos"), as_array(sin, "MultiHeadAttention", "sin")
    if not cos.shape[-2:] == sin.shape[-2:] == (length, head_dim // 2):
        raise ValueError("MultiHeadAttention: rotary must be (cos, sin), each (S, head_dim / 2) = "
                         f"{length, head_dim // 2}, got shapes {cos.shape} and {sin.shape}")
    return cos, sin


class MultiHeadAttention(Module):
    """Causal (or full) self-attention: one product for query, key and value, one back.

    Parameters
    ----------
    n_embd, n_head : int
    n_kv_head : int, optional
        Heads of keys and values; each serves n_head / n_kv_head query heads (Ainslie et al. 2023, GQA).
    head_dim : int, optional
        n_embd / n_head where None.
    causal : bool
    bias : bool
    dropout : float
        Of the attention weights, in training mode.
    window_size : (left, right)
        As of :func:`numformer.scaled_dot_product_attention`: how many keys back, and ahead, a query sees; -1 is no
        bound.
    alibi : bool or ndarray (n_head,)
        Lower scores by distance (Press et al. 2022), instead of rotary positions: with these slopes, or where True
        with those of :func:`numformer.alibi_slopes`. Not where a query sees keys ahead, whose scores it would raise.
    rng : numpy.random.Generator

    Attributes
    ----------
    head_gate : array or Tensor (n_head,) or (B, n_head), optional
        Multiplies what each head says: 0 silences a head. None, as at first, is 1 everywhere.
    """

    head_gate = None

    def __init__(self, n_embd, n_head, n_kv_head=None, *, head_dim=None, causal=True, bias=False, dropout=0.0,
                 window_size=(-1, -1), alibi=False, rng, dtype=np.float32):
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        need_sizes("MultiHeadAttention", n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head)
        if head_dim is not None:
            need_sizes("MultiHeadAttention", head_dim=head_dim)
        if head_dim is None and n_embd % n_head:
            raise ValueError(f"MultiHeadAttention: n_embd must be a multiple of n_head, got {n_embd} and {n_head}")
        if n_head % n_kv_head:
            raise ValueError("MultiHeadAttention: n_head must be a multiple of n_kv_head, "
                             f"got {n_head} and {n_kv_head}")
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim or n_embd // n_head
        left, right = as_window(window_size, "MultiHeadAttention")
        if left < -1 or right < -1 or (causal and right > 0):
            raise ValueError("MultiHeadAttention: window_size must be (left, right), each -1 or more, and nothing "
                             f"ahead where causal, got {window_size} and causal={causal}")
        if not 0 <= as_number(dropout, "MultiHeadAttention", "dropout") < 1:
            raise ValueError(f"MultiHeadAttention: dropout must be in [0, 1), got {dropout}")
        if alibi is not False and not causal and right != 0:
            raise ValueError("MultiHeadAttention: alibi lowers the scores of keys by how far back they are, and would "
                             "raise those of keys ahead: leave it out, or let no query see ahead, by causal=True")
        self.causal, self.window_size = causal, (left, right)
        self.slopes = None
        if alibi is not False:
            slopes = nf.alibi_slopes(n_head) if alibi is True else np.asarray(alibi)
            if slopes.dtype.kind not in "iu" and not is_float(slopes.dtype):
                raise TypeError(f"MultiHeadAttention: alibi must be a bool or {n_head} slopes, got {alibi!r}")
            if slopes.shape != (n_head,):
                raise ValueError(f"MultiHeadAttention: alibi must be a bool or {n_head} slopes, "
                                 f"got shape {slopes.shape}")
            self.slopes = slopes.astype(dtype)
        self.dropout, self.rng = dropout, rng
        rows = (n_head + 2 * n_kv_head) * self.head_dim
        # query, key and value are matrices of their own: each has its own fan-out
        parts = [init.xavier_uniform(rng, n * self.head_dim, n_embd, dtype=dtype).data
                 for n in (n_head, n_kv_head, n_kv_head)]
        self.qkv = init.constant(0, rows, n_embd, dtype=dtype)
        np.concatenate(parts, out=self.qkv.data)
        self.qkv_bias = init.constant(0, rows, dtype=dtype) if bias else None
        self.out = init.xavier_uniform(rng, n_embd, n_head * self.head_dim, dtype=dtype)
        self.out_bias = init.constant(0, n_embd, dtype=dtype) if bias else None

    def __call__(self, x, rotary=None, cache=None, layer=0, residual=None):
        """Attention over `x` (B, S, n_embd), plus `residual`.

        Parameters
        ----------
        rotary : (cos, sin), optional
            Each (S, head_dim / 2), of the positions of `x`; with a cache also (B, 1, S, head_dim / 2).
        cache : KVCache, RollingKVCache or PagedKVCache, optional
            What came before `x`; gets the keys and values of `x` as those of `layer`. The result has the bits that
            `x` has in a call with all that came before; ``cache.advance(S)`` ends the step.

        Raises
        ------
        TypeError
            If `rotary` is no pair, or `cache` no cache.
        ValueError
            If `rotary` has not these shapes; if there are both ALiBi and `rotary`; if there is a cache and not
            causality; or no room in it.
        """
        return project(self.heads(x, rotary, cache, layer), self.out, self.out_bias, residual=residual)

    def heads(self, x, rotary=None, cache=None, layer=0):
        """What the heads say, side by side (B, S, n_head * head_dim), before `out` mixes them; times ``head_gate``."""
        if rotary is not None and self.slopes is not None:
            raise ValueError("MultiHeadAttention: positions come by alibi or by rotary, and here are both: leave "
                             "rotary out, or make the layer with alibi=False")
        if cache is not None and not self.causal:
            raise ValueError("MultiHeadAttention: without causality a later key changes what an earlier query says, so "
                             "there is no cache for it: make the layer with causal=True")
        if cache is not None and not hasattr(cache, "attend"):
            raise TypeError("MultiHeadAttention: cache must be a KVCache, RollingKVCache or PagedKVCache, got "
                            f"{type(cache).__name__}")
        qkv, rotary = self._project(x), _pair(rotary, x.shape[1], self.head_dim)
        dropout = self.training and self.dropout > 0
        rules = {"is_causal": self.causal, "window_size": self.window_size, "alibi_slopes": self.slopes}
        if cache is None and not dropout:
            y = packed_attention(qkv, self.n_head, self.n_kv_head, rotary=rotary, **rules)
        else:
            q, k, v = self._turned(qkv, rotary)
            if dropout:
                rules |= {"dropout_p": self.dropout, "rng": self.rng}
            y = nf.scaled_dot_product_attention(q, k, v, **rules) if cache is None else cache.attend(layer, q, k, v,
                                                                                                     **rules)
            y = y.swapaxes(1, 2)
        batch, length = x.shape[:2]
        if (gate := self.head_gate) is not None:
            if getattr(gate, "shape", None) not in ((self.n_head,), (batch, self.n_head), (1, self.n_head)):
                raise ValueError(f"MultiHeadAttention: head_gate must be an array or Tensor of shape {(self.n_head,)} "
                                 f"or {(batch, self.n_head)}, got {getattr(gate, 'shape', type(gate).__name__)}")
            y = y.reshape(batch, length, self.n_head, self.head_dim) * gate.reshape(-1, 1, self.n_head, 1)
        return y.reshape(batch, length, self.n_head * self.head_dim)

    def _project(self, x):
        """Query, key and value, side by side."""
        if len(getattr(x, "shape", ())) != 3:
            raise ValueError("MultiHeadAttention: x must be an array or Tensor of shape (B, S, n_embd), got "
                             f"{getattr(x, 'shape', type(x).__name__)}")
        return project(x, self.qkv, self.qkv_bias)

    def _turned(self, qkv, rotary):
        """Query, key and value of each head, at their positions; an array `qkv` is turned in place."""
        if type(qkv) is np.ndarray:
            heads, n, end = qkv.reshape(*qkv.shape[:2], -1, self.head_dim).swapaxes(1, 2), self.n_head, -self.n_kv_head
            if rotary is not None:
                turned = heads[:, :end]
                nf.rotary_embedding(turned, *rotary, out=turned)
            return heads[:, :n], heads[:, n:end], heads[:, end:]
        q, k, v = split_heads(qkv, self.n_head, self.n_kv_head)
        if rotary is not None:
            q, k = nf.rotary_embedding(q, *rotary), nf.rotary_embedding(k, *rotary)
        return q, k, v

    def maps(self, x, rotary=None, *, heads=None, rows=None):
        """The weights of chosen heads and rows (:func:`numformer.nn.attention_maps`) for `x` (B, S, n_embd).

        Parameters
        ----------
        rotary : (cos, sin), optional
            As of a call.
        heads, rows : int or sequence of int, optional
            Which heads and which positions to look at; all by default.

        Returns
        -------
        ndarray, (B, heads, rows, S)
            Without dropout, of which there is none to look at, and without `head_gate`.
        """
        q, k, _ = self._turned(self._project(x), _pair(rotary, x.shape[1], self.head_dim))
        return attention_maps(q, k, is_causal=self.causal, window_size=self.window_size, alibi_slopes=self.slopes,
                              heads=heads, rows=rows)
