"""Keys and values of what came before: in one piece, in a ring as long as the window, or in blocks by a table.

Each is made for the attention layers of a model and serves them in turn: ``attend`` puts the new keys and values of a
layer in and attends to what is then there, ``advance`` counts them once the last layer has done so. The results have
the bits of the forward pass over the whole sequence. Caches are for reading on: they carry no gradients.
"""
import copy

import numpy as np

import numformer as nf
from numformer.ops.arguments import need_sizes
from numformer.tensor import Tensor

__all__ = ["KVCache", "PagedKVCache", "RollingKVCache"]

_WHOLE = 4096       # the kernels cut keys from the first on, into pieces of which this is a multiple


def _arrays(query, key, value, stored, dropout_p, rng):
    """What is to be cached, as arrays; `stored` is the dtype of the cache."""
    if dropout_p:
        raise ValueError("attention: a cache is for inference, and there is dropout: call eval() on the model first")
    if (query.dtype == np.float64) != (stored == np.float64):
        raise TypeError(f"attention: the cache is of {stored} and the model of {query.dtype}: make it of the model's "
                        "dtype, or for float32 of a shorter one")
    return [x.detach().data if type(x) is Tensor else x for x in (query, key, value)]


def _storage(dtype, cache, bytes_too=False):
    """`dtype` as one that a cache can hold."""
    dtype = np.dtype(dtype)
    if dtype.name not in ("float32", "float64", "float16", "bfloat16") and not (bytes_too and dtype == np.int8):
        raise TypeError(f"{cache}: dtype must be float32, float64, float16{', int8' if bytes_too else ''} or bfloat16 "
                        f"(of ml_dtypes), got {dtype}")
    return dtype


class KVCache:
    """Keys and values of the positions so far, for every layer: two arrays (B, its n_kv_head, capacity, D).

    Parameters
    ----------
    attentions : sequence of MultiHeadAttention
        The layers.
    batch, capacity : int
        Sequences, all of one length, and the most positions of each.
    dtype : dtype
        That of the model; float16 or bfloat16 for a float32 model rounds what is kept, and all is computed in float32
        from it.

    Attributes
    ----------
    length : int
        Positions that every layer holds; whoever runs the layers adds to it after the last one, by :meth:`advance`.

    Raises
    ------
    TypeError
        If a size is no integer, or `dtype` another.
    ValueError
        If a size is below 1.
    """

    def __init__(self, attentions, batch, capacity, dtype=np.float32):
        need_sizes("KVCache", batch=batch, capacity=capacity)
        shapes, dtype = [(batch, a.n_kv_head, capacity, a.head_dim) for a in attentions], _storage(dtype, "KVCache")
        self.capacity = capacity
        self.keys = [np.empty(shape, dtype) for shape in shapes]
        self.values = [np.empty(shape, dtype) for shape in shapes]
        self.length = 0

    def attend(self, layer, query, key, value, *, dropout_p=0.0, rng=None, **keywords):
        """Attend to all of `layer` so far and to `key` and `value` (B, Hkv, S, D), which are put behind it."""
        query, key, value = _arrays(query, key, value, self.keys[layer].dtype, dropout_p, rng)
        if self.keys[layer].dtype == query.dtype:
            return nf.scaled_dot_product_attention(query, *self.extend(layer, key, value), **keywords)
        self.extend(layer, key, value)
        keys, values = (x[layer].swapaxes(1, 2) for x in (self.keys, self.values))      # a block for each sequence
        batch, length = len(keys), self.length + query.shape[2]
        return nf.paged_attention(query, keys, values, np.arange(batch)[:, None], np.full(batch, length), **keywords)

    def extend(self, layer, key, value):
        """Put new keys and values behind those of `layer`; return all of them (views)."""
        keys, values, old = self.keys[layer], self.values[layer], self.length
        if len(key) != len(keys):
            raise ValueError(f"KVCache: a batch of {len(key)}, and the cache is for {len(keys)} sequences")
        new = old + key.shape[2]
        if new > self.capacity:
            raise ValueError(f"KVCache: {new} positions, and the capacity is {self.capacity}")
        keys[:, :, old:new] = key
        values[:, :, old:new] = value
        return keys[:, :, :new], values[:, :, :new]

    def advance(self, count):
        """Every layer has been given `count` more positions."""
        self.length += count

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]


def _to_bytes(x):
    """(bytes, scales): x is near bytes * scales[..., None]."""
    scales = np.abs(x).max(axis=-1) / np.float32(127)
    some = np.where(scales > 0, scales, np.float32(1))
    return np.rint(x / some[..., None]).astype(np.int8), scales


class RollingKVCache:
    """The last keys and values of layers that look back a bounded window: memory O(window), however long the text.

    Parameters
    ----------
    attentions : sequence of MultiHeadAttention
        The layers; each must be causal and have a ``window_size`` that is bounded on the left.
    batch : int
    dtype : dtype
        As of :class:`KVCache`.
    piece : int
        Longer inputs are taken in pieces of so many positions: the ring of a layer holds its window and one piece.

    Attributes
    ----------
    length : int
        As of :class:`KVCache`.

    Raises
    ------
    TypeError, ValueError
        As :class:`KVCache`; ValueError for a layer that is not causal or sees all that came before.
    """

    block_size = 16

    def __init__(self, attentions, batch, dtype=np.float32, *, piece=128):
        need_sizes("RollingKVCache", batch=batch, piece=piece)
        self.keys, self.values, self.batch, self.piece, self.length = [], [], batch, piece, 0
        dtype = _storage(dtype, "RollingKVCache")
        for a in attentions:
            if not a.causal or a.window_size[0] < 0:
                raise ValueError("RollingKVCache: each layer must be causal with a window bounded on the left, got "
                                 f"causal={a.causal}, window_size={a.window_size}; KVCache keeps all keys")
            blocks = -(-(a.window_size[0] + piece) // self.block_size) + 1
            shape = batch * blocks, self.block_size, a.n_kv_head, a.head_dim
            self.keys.append(np.zeros(shape, dtype))
            self.values.append(np.zeros(shape, dtype))
        self._ends = [0] * len(self.keys)           # of what was ever put in

    def attend(self, layer, query, key, value, *, window_size, dropout_p=0.0, rng=None, **keywords):
        """As of :class:`KVCache`; what no later query sees is overwritten.

        ValueError where an input longer than a piece was not counted by :meth:`advance`, as after an interrupt: what
        came before it is overwritten, too.
        """
        query, key, value = _arrays(query, key, value, self.keys[layer].dtype, dropout_p, rng)
        if len(query) != self.batch:
            raise ValueError(f"RollingKVCache: a batch of {len(query)}, and the cache is for {self.batch} sequences")
        keys, values, size = self.keys[layer], self.values[layer], self.block_size
        blocks = len(keys) // self.batch
        own = np.arange(self.batch)[:, None] * blocks
        if max(self.length - window_size[0], 0) < self._ends[layer] - blocks * size:
            raise ValueError(f"RollingKVCache: layer {layer} has been given {self._ends[layer]} positions, "
                             f"{self.length} are counted, and what those after them see is overwritten: begin with a "
                             "new cache")
        parts = []
        for start in range(0, max(query.shape[2], 1), self.piece):
            piece = slice(start, start + self.piece)
            old = self.length + start
            new = old + query[:, :, piece].shape[2]
            at = np.arange(old, new)
            where = own + at // size % blocks, at % size
            self._ends[layer] = max(self._ends[layer], new)
            keys[where], values[where] = key[:, :, piece].swapaxes(1, 2), value[:, :, piece].swapaxes(1, 2)
            first = max(old - window_size[0], 0) // _WHOLE * _WHOLE
            table = own + np.arange(first // size, -(-new // size)) % blocks
            parts.append(nf.paged_attention(query[:, :, piece], keys, values, table, np.full(self.batch, new - first),
                                            window_size=window_size, **keywords))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def advance(self, count):
        """As of :class:`KVCache`."""
        self.length += count


class PagedKVCache:
    """Keys and values in blocks that sequences of different lengths take from one pool and give back.

    Parameters
    ----------
    attentions : sequence of MultiHeadAttention
        The layers, all causal.
    batch : int
        Most sequences at a time.
    num_blocks : int
        Blocks of the pool.
    block_size : int
        Positions of a block.
    dtype : dtype
        As of :class:`KVCache`; or int8, with a float32 scale for each head of each position, the largest of its numbers
        over 127.

    Attributes
    ----------
    lengths : ndarray (batch,)
        Positions of each sequence.
    block_table : ndarray (batch, num_blocks)
        Which blocks hold them, as :func:`numformer.paged_attention` reads it.
    rows : ndarray
        The sequences that a call is about, all at first.

    Raises
    ------
    TypeError, ValueError
        As :class:`KVCache`; ValueError for a layer that is not causal.
    """

    def __init__(self, attentions, batch, num_blocks, *, block_size=16, dtype=np.float32):
        need_sizes("PagedKVCache", batch=batch, num_blocks=num_blocks, block_size=block_size)
        if not all(a.causal for a in attentions):
            raise ValueError("PagedKVCache: each layer must be causal")
        shapes = [(num_blocks, block_size, a.n_kv_head, a.head_dim) for a in attentions]
        dtype = _storage(dtype, "PagedKVCache", bytes_too=True)
        self.keys = [np.zeros(shape, dtype) for shape in shapes]
        self.values = [np.zeros(shape, dtype) for shape in shapes]
        self.key_scales = self.value_scales = None
        if dtype == np.int8:
            self.key_scales, self.value_scales = ([np.zeros(s[:3], np.float32) for s in shapes] for _ in range(2))
        self.block_size, self.rows = block_size, np.arange(batch)
        self.lengths = np.zeros(batch, np.int64)
        self.block_table = np.zeros((batch, num_blocks), np.int64)
        self._held = np.zeros(batch, np.int64)              # blocks of each sequence
        self._free = list(range(num_blocks - 1, -1, -1))

    def of(self, rows):
        """The same cache for a call about these sequences alone, such as one prompt. ValueError unless `rows` are
        different integers that name them."""
        chosen, batch = np.atleast_1d(np.asarray(rows)), len(self.lengths)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or (chosen < -batch).any() or (chosen >= batch).any() or (
                len(set((chosen % batch).tolist())) < len(chosen)):
            raise ValueError(f"PagedKVCache: rows must be different integers within 0 .. {batch - 1}, got {rows!r}")
        twin = copy.copy(self)
        twin.rows = chosen % batch
        return twin

    @property
    def length(self):
        """The length of the sequences that a call is about, where it is one."""
        if (self.lengths[self.rows] != self.lengths[self.rows[0]]).any():
            raise ValueError(f"PagedKVCache: the sequences have different lengths, {self.lengths[self.rows]}: "
                             "look at .lengths")
        return int(self.lengths[self.rows[0]])

    def attend(self, layer, query, key, value, *, dropout_p=0.0, rng=None, **keywords):
        """As of :class:`KVCache`, row i of the batch being sequence ``rows[i]``."""
        query, key, value = _arrays(query, key, value, self.keys[layer].dtype, dropout_p, rng)
        if len(query) != len(self.rows):
            raise ValueError(f"PagedKVCache: a batch of {len(query)} for {len(self.rows)} sequences: choose them by "
                             ".of(rows)")
        new = self.lengths[self.rows] + query.shape[2]
        self._reserve(new)
        at = self.lengths[self.rows][:, None] + np.arange(query.shape[2])
        where = self.block_table[self.rows[:, None], at // self.block_size], at % self.block_size
        keys, values = self.keys[layer], self.values[layer]
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if self.key_scales is not None:
            scales = self.key_scales[layer], self.value_scales[layer]
            (key, scales[0][where]), (value, scales[1][where]) = _to_bytes(key), _to_bytes(value)
            keywords |= {"key_scale": scales[0], "value_scale": scales[1]}
        keys[where], values[where] = key, value
        most = -(-int(new.max()) // self.block_size)
        return nf.paged_attention(query, keys, values, self.block_table[self.rows, :most], new, **keywords)

    def _reserve(self, lengths):
        """Give each sequence the blocks that it is short of, or none to any."""
        short = np.maximum(-(-lengths // self.block_size) - self._held[self.rows], 0)
        if short.sum() > len(self._free):
            raise ValueError(f"PagedKVCache: {short.sum()} more blocks of {self.block_size} positions are needed and "
                             f"{len(self._free)} of {len(self.keys[0])} are free; release() a sequence, or make the "
                             "pool larger")
        for row, count in zip(self.rows, short):
            for _ in range(count):
                self.block_table[row, self._held[row]] = self._free.pop()
                self._held[row] += 1

    def advance(self, count):
        """Every layer has been given `count` more positions of each of the sequences."""
        self.lengths[self.rows] += count

    def release(self, row):
        """Forget sequence `row`: its blocks are free."""
        self._free.extend(self.block_table[row, :self._held[row]].tolist())
        self.lengths[row] = self._held[row] = 0
