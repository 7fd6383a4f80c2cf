"""Multi-head attention with grouped queries, rotary positions and a key-value cache."""
import numpy as np

import numformer as nf
from numformer._core import pooled
from numformer.nn import init
from numformer.nn.layers import project
from numformer.nn.module import Module
from numformer.ops.attention import packed_attention
from numformer.tensor import apply

__all__ = ["KVCache", "MultiHeadAttention", "rotary_tables", "split_heads"]


def rotary_tables(length, head_dim, *, theta=10000.0, dtype=np.float32):
    """cos and sin of position times frequency, each (length, head_dim / 2) (Su et al. 2021, RoFormer)."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.outer(np.arange(length), frequency)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def split_heads_forward(qkv, n_head, n_kv_head):
    """Return ``((query, key, value), saved)``: views of `qkv`."""
    batch, length, width = qkv.shape
    heads = n_head + 2 * n_kv_head
    x = qkv.reshape(batch, length, heads, width // heads).swapaxes(1, 2)
    return (x[:, :n_head], x[:, n_head:n_head + n_kv_head], x[:, n_head + n_kv_head:]), (qkv.shape, n_head, n_kv_head)


def split_heads_backward(dy, saved):
    """Return the gradient with respect to `qkv`, in a tuple."""
    (batch, length, width), n_head, n_kv_head = saved
    heads = n_head + 2 * n_kv_head
    dtype = next(d.dtype for d in dy if d is not None)
    dqkv = pooled(np.empty, (batch, length, heads, width // heads), dtype)
    parts = dqkv.swapaxes(1, 2)
    for part, d in zip((parts[:, :n_head], parts[:, n_head:n_head + n_kv_head], parts[:, n_head + n_kv_head:]), dy):
        part[...] = 0 if d is None else d
    return (dqkv.reshape(batch, length, width),)


def split_heads(qkv, n_head, n_kv_head):
    """Query, key and value (B, heads, S, D) in one array (B, S, (n_head + 2 n_kv_head) D): views, no copies."""
    return apply(split_heads_forward, split_heads_backward, qkv, n_head=n_head, n_kv_head=n_kv_head)


class KVCache:
    """Keys and values of the positions so far, for every layer: two arrays (B, its n_kv_head, capacity, D).

    ``length`` counts the positions that every layer holds; whoever runs the layers adds to it after the last one.
    """

    def __init__(self, attentions, batch, capacity, dtype=np.float32):
        shapes = [(batch, a.n_kv_head, capacity, a.head_dim) for a in attentions]
        self.keys = [np.empty(shape, dtype) for shape in shapes]
        self.values = [np.empty(shape, dtype) for shape in shapes]
        self.length = 0

    def extend(self, layer, key, value):
        """Put new keys and values behind those of `layer`; return all of them (views)."""
        keys, values, old = self.keys[layer], self.values[layer], self.length
        new = old + key.shape[2]
        keys[:, :, old:new] = key
        values[:, :, old:new] = value
        return keys[:, :, :new], values[:, :, :new]

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]


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
    rng : numpy.random.Generator

    Attributes
    ----------
    head_gate : array or Tensor (n_head,) or (B, n_head), optional
        Multiplies what each head says: 0 silences a head. None, as at first, is 1 everywhere.
    """

    head_gate = None

    def __init__(self, n_embd, n_head, n_kv_head=None, *, head_dim=None, causal=True, bias=False, dropout=0.0, rng,
                 dtype=np.float32):
        n_kv_head = n_kv_head or n_head
        if head_dim is None and n_embd % n_head:
            raise ValueError(f"MultiHeadAttention: n_embd must be a multiple of n_head, got {n_embd} and {n_head}")
        if n_head % n_kv_head:
            raise ValueError("MultiHeadAttention: n_head must be a multiple of n_kv_head, "
                             f"got {n_head} and {n_kv_head}")
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim or n_embd // n_head
        self.causal = causal
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
            Each (S, head_dim / 2), of the positions of `x`.
        cache : KVCache, optional
            What came before `x`; gets the keys and values of `x` as those of `layer`.
        """
        return project(self.heads(x, rotary, cache, layer), self.out, self.out_bias, residual=residual)

    def heads(self, x, rotary=None, cache=None, layer=0):
        """What the heads say, side by side (B, S, n_head * head_dim), before `out` mixes them; times ``head_gate``."""
        qkv = project(x, self.qkv, self.qkv_bias)
        dropout = self.training and self.dropout > 0
        if cache is None and not dropout:
            y = packed_attention(qkv, self.n_head, self.n_kv_head, is_causal=self.causal, rotary=rotary)
        else:
            q, k, v = split_heads(qkv, self.n_head, self.n_kv_head)
            if rotary is not None:
                q, k = nf.rotary_embedding(q, *rotary), nf.rotary_embedding(k, *rotary)
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            drop = {"dropout_p": self.dropout, "rng": self.rng} if dropout else {}
            y = nf.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.n_kv_head < self.n_head,
                                                **drop)
            y = y.swapaxes(1, 2)
        batch, length = x.shape[:2]
        if self.head_gate is not None:
            y = y.reshape(batch, length, self.n_head, self.head_dim) * self.head_gate.reshape(-1, 1, self.n_head, 1)
        return y.reshape(batch, length, self.n_head * self.head_dim)
