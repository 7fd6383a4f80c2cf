"""Batches for fine-tuning: prompts with completions, and pairs of a better and a worse sequence.

They go into :class:`numformer.train.Trainer` as :class:`numformer.data.Batches` do: in an order that the seed alone
decides, to be taken up again anywhere.
"""
import zlib

import numpy as np

from numformer.ops.arguments import as_ids, need_seed, need_sizes
from numformer.rlhf.sequences import pad

__all__ = ["CompletionBatches", "PairBatches"]


class _Examples:
    """An endless iterator over examples. Every epoch takes each once, those of similar length in one batch.

    An epoch's order is a permutation, of which each stretch of `stretch` batches is sorted by length and cut into
    batches, and these are shuffled. `seed` and the epoch's number alone decide it.
    """

    endless = True      # a list of all of them has no end

    def __init__(self, pairs, batch, *, seed=0, stretch=8):
        name = type(self).__name__
        need_sizes(name, batch=batch, stretch=stretch)
        need_seed(seed, name)
        pairs = list(pairs)
        if not pairs:
            raise ValueError(f"{name}: there are no examples")
        for i, parts in enumerate(pairs):
            if len(parts) != 2 or not all(len(part) for part in parts):
                raise ValueError(f"{name}: example {i} must be two lists of token ids that are not empty, got {parts}")
        self.examples = [tuple(np.array(as_ids(part, name, f"example {i}"), np.int64) for part in parts)
                         for i, parts in enumerate(pairs)]
        self.batch, self.seed, self.stretch = batch, seed, stretch
        self.lengths = np.array([self.length(*parts) for parts in self.examples])
        self.checksum = 0
        for parts in self.examples:
            for part in parts:
                self.checksum = zlib.crc32(part.tobytes(), zlib.crc32(str(len(part)).encode(), self.checksum))
        self.drawn = 0
        self._epoch, self._order = None, None

    def state(self):
        """Where it stands, for a checkpoint."""
        return {"seed": self.seed, "drawn": self.drawn, "batch": self.batch, "stretch": self.stretch,
                "examples": len(self.examples), "checksum": self.checksum}

    def restore(self, state):
        """Go on from where :meth:`state` was taken. ValueError if the data are not the same."""
        own = self.state() | {"drawn": state["drawn"]}
        if own != state:
            raise ValueError(f"{type(self).__name__}: the checkpoint was made with {state}, these data are {own}")
        self.drawn = state["drawn"]

    def order(self, epoch):
        """The examples' numbers in the order of `epoch`."""
        rng = np.random.default_rng((self.seed, epoch))
        order, batches = rng.permutation(len(self.examples)), []
        for begin in range(0, len(order), self.batch * self.stretch):
            some = order[begin:begin + self.batch * self.stretch]
            some = some[np.argsort(self.lengths[some], kind="stable")]
            some = [some[i:i + self.batch] for i in range(0, len(some), self.batch)]
            batches += [some[i] for i in rng.permutation(len(some))]
        return np.concatenate(batches)

    def __iter__(self):
        return self

    def __next__(self):
        chosen = []
        while len(chosen) < self.batch:
            epoch, position = divmod(self.drawn, len(self.examples))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self.order(epoch)
            chosen.append(self.examples[self._order[position]])
            self.drawn += 1
        return self.collate(chosen)


class CompletionBatches(_Examples):
    """(tokens, targets) for supervised fine-tuning, each int64 (batch, S): what ``GPT.loss`` takes.

    Targets are -100 on the prompt and on the padding: the loss is the mean over the completions' tokens.

    Parameters
    ----------
    pairs : iterable of (prompt ids, completion ids)
        With the end-of-text token in the completion, where it is to be learned.
    batch : int
    seed : int
    stretch : int
        Batches within which examples are sorted by length; 1 mixes all lengths.
    """

    @staticmethod
    def length(prompt, completion):
        """Tokens of an example."""
        return len(prompt) + len(completion)

    @staticmethod
    def collate(examples):
        """Arrays from a list of (prompt, completion)."""
        rows = [np.concatenate(parts) for parts in examples]
        targets = pad([np.concatenate([np.full(len(p) - 1, -100), c]) for p, c in examples], -100)
        return pad([row[:-1] for row in rows], 0), targets


class PairBatches(_Examples):
    """(chosen, rejected) for a reward model, each int64 (batch, S), padded with -1: what ``RewardModel.loss`` takes.

    Parameters
    ----------
    pairs : iterable of (better ids, worse ids)
        Whole sequences, prompt and completion.
    batch : int
    seed : int
    stretch : int
        Batches within which pairs are sorted by length; 1 mixes all lengths.
    """

    @staticmethod
    def length(chosen, rejected):
        """Tokens of the longer one of a pair."""
        return max(len(chosen), len(rejected))

    @staticmethod
    def collate(examples):
        """Arrays from a list of (chosen, rejected)."""
        chosen, rejected = zip(*examples)
        return pad(chosen, -1), pad(rejected, -1)
