"""Token streams on disk, and batches from them in a seeded order that can be taken up again anywhere.

A shard is a .npy file of one axis, uint16 or uint32, mapped into memory: only what is read is loaded. A window is
``block + 1`` neighbouring tokens of one shard, the first ``block`` of them the input, the last ``block`` the targets.
"""
from pathlib import Path

import numpy as np

from numformer.files import replace_file
from numformer.ops.arguments import need_seed, need_sizes

__all__ = ["Batches", "TokenShards", "write_shard"]


def write_shard(path, tokens):
    """Write token ids as a shard; aside first, so that a file of this name is whole at any time.

    Parameters
    ----------
    path : str or Path
    tokens : array_like of integers within 0 .. 2^32 - 1, one axis
        Written as uint16 where all fit, else uint32.

    Raises
    ------
    ValueError
        If `tokens` is not as above.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
        raise ValueError(f"write_shard: tokens must be integers on one axis, got {tokens.dtype} {tokens.shape}")
    least, most = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if least < 0 or most > 0xFFFFFFFF:
        raise ValueError(f"write_shard: token ids must be in 0..2^32-1, got {least if least < 0 else most}")
    tokens = tokens.astype(np.uint16 if most <= 0xFFFF else np.uint32)
    replace_file(path, lambda file: _write(file, tokens))


def _write(file, tokens):
    """np.save, but for what it says of a full disk: "579283 requested and 356288 written", without an errno."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
    file.write(np.ascontiguousarray(tokens))


class TokenShards:
    """The shards of a folder (its .npy files by name), of one file, or of a list of files, as one collection.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no shard in the folder.
    ValueError
        If a file is not a shard.
    """

    def __init__(self, source):
        if isinstance(source, (str, Path)):
            source = Path(source)
            paths = sorted(source.glob("*.npy")) if source.is_dir() else [source]
            if not paths:
                raise FileNotFoundError(f"{source} has no .npy files; write them with numformer.data.write_shard")
        else:
            paths = [Path(p) for p in source]
            if not paths:
                raise FileNotFoundError("TokenShards: the list of files is empty")
        self.paths = paths
        self.shards = [_open(path) for path in paths]
        self.size = sum(len(shard) for shard in self.shards)

    def __len__(self):
        """Tokens in all."""
        return self.size

    def __repr__(self):
        return f"TokenShards({len(self.shards)} shards, {self.size} tokens)"


def _open(path):
    try:
        with open(path, "rb") as file:
            begin = file.read(len(np.lib.format.MAGIC_PREFIX))
        if begin.startswith(b"PK"):
            raise ValueError("it is an archive of several arrays (.npz)")
        if begin != np.lib.format.MAGIC_PREFIX:         # np.load would advise to unpickle it
            raise ValueError("it does not begin as one")
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole .npy file, as write_shard writes it: {error}") from None
    if shard.ndim != 1 or shard.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"{path}: a shard has one axis of uint16 or uint32, got {shard.dtype} {shard.shape}")
    return shard


class Batches:
    """An endless iterator of (tokens, targets), each int64 (batch, block).

    Every epoch goes through all windows once, in a permutation that `seed` and the epoch's number alone decide; a
    batch may end one epoch and begin the next.

    Parameters
    ----------
    shards : TokenShards, or what it takes
    batch, block : int
    seed : int

    Raises
    ------
    TypeError
        If `batch`, `block` or `seed` is no integer.
    ValueError
        If one of the first two is below 1, `seed` below 0, or no shard has the block + 1 tokens of a window.
    """

    endless = True      # a list of all of them has no end

    def __init__(self, shards, batch, block, *, seed=0):
        self.shards = shards if isinstance(shards, TokenShards) else TokenShards(shards)
        need_sizes("Batches", batch=batch, block=block)
        need_seed(seed, "Batches")
        self.batch, self.block, self.seed = batch, block, seed
        counts = [max(len(shard) - 1, 0) // block for shard in self.shards.shards]
        self.first = np.concatenate([[0], np.cumsum(counts)])      # the number of each shard's first window
        self.windows = int(self.first[-1])
        if not self.windows:
            longest = max(len(shard) for shard in self.shards.shards)
            raise ValueError(f"Batches: no shard has the {block + 1} tokens of a window; the longest has {longest}")
        self.drawn = 0                      # windows so far: all that is to be remembered
        self._epoch, self._order = None, None

    def state(self):
        """Where it stands, for a checkpoint."""
        return {"seed": self.seed, "drawn": self.drawn, "windows": self.windows, "block": self.block}

    def restore(self, state):
        """Go on from where :meth:`state` was taken. ValueError for another seed, block or number of windows.

        What the windows hold is not compared.
        """
        own = self.state() | {"drawn": state["drawn"]}
        if own != state:
            raise ValueError(f"Batches: the checkpoint was made with {state}, these data are {own}")
        self.drawn = state["drawn"]

    def window(self, number):
        """Window `number`: block + 1 tokens."""
        shard = int(np.searchsorted(self.first, number, "right")) - 1
        start = (number - int(self.first[shard])) * self.block
        return self.shards.shards[shard][start:start + self.block + 1]

    def __iter__(self):
        return self

    def __next__(self):
        rows = np.empty((self.batch, self.block + 1), np.int64)
        for row in rows:
            epoch, position = divmod(self.drawn, self.windows)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
            row[:] = self.window(int(self._order[position]))
            self.drawn += 1
        return rows[:, :-1], rows[:, 1:]
