"""Prompts and completions as right-padded arrays, and what a model says about the completions' tokens.

A completion's token t (an action) is predicted from the hidden state one position before it. Only those states are
projected onto the vocabulary: N completion tokens cost N x V logits, prompts and padding none. Rollouts and training
both go through :func:`completion_log_probs`, so a first ratio is exactly 1.
"""
from dataclasses import dataclass

import numpy as np

import numformer as nf
from numformer.nn.layers import project
from numformer.ops.arguments import as_ids
from numformer.rlhf.masked import keep

__all__ = ["Sequences", "completion_log_probs", "completion_values", "pad"]


def pad(rows, value):
    """Lists of token ids as one array (B, longest), `value` behind the shorter ones."""
    array = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for line, row in zip(array, rows):
        line[:len(row)] = row
    return array


@dataclass
class Sequences:
    """B prompts, each with a completion of its own length.

    Attributes
    ----------
    tokens : (B, S) int64
        Prompt and completion, 0 behind them.
    lengths : (B,)
        Tokens of each row.
    actions : (B, T) int64
        The completions, -100 behind them.
    mask : (B, T) bool
        Where `actions` are.
    position : (B, T)
        The position in `tokens` from which each action is predicted.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    actions: np.ndarray
    mask: np.ndarray
    position: np.ndarray

    @classmethod
    def of(cls, prompts, completions):
        """From two lists of lists of token ids.

        ValueError where their numbers differ or one is empty, TypeError for what is no integer.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"Sequences: every prompt needs a completion, got {len(prompts)} and {len(completions)}")
        for what, rows in (("prompt", prompts), ("completion", completions)):
            empty = [i for i, row in enumerate(rows) if len(row) == 0]
            if empty or not len(rows):
                raise ValueError(f"Sequences: {what} {empty[0]} is empty" if empty else "Sequences: there are none")
        prompts, completions = ([as_ids(row, "Sequences", name) for row in rows]
                                for name, rows in (("prompts", prompts), ("completions", completions)))
        actions = pad(completions, -100)
        mask = np.arange(actions.shape[1]) < np.array([len(c) for c in completions])[:, None]
        begin = np.array([len(p) for p in prompts])[:, None] - 1
        rows = [[*p, *c] for p, c in zip(prompts, completions)]
        return cls(pad(rows, 0), np.array([len(r) for r in rows]), actions, mask,
                   np.where(mask, begin + np.arange(actions.shape[1]), 0))

    def __len__(self):
        return len(self.tokens)

    def rows(self, index):
        """Some of the rows, cut to the longest of them; T stays."""
        lengths = self.lengths[index]
        return Sequences(self.tokens[index, :lengths.max()], lengths, self.actions[index], self.mask[index],
                         self.position[index])

    def gather(self, x):
        """The vectors of `x` (B, S, d) from which the actions are predicted, one after another: (N, d)."""
        row, slot = np.nonzero(self.mask)
        return nf.embedding(row * x.shape[1] + self.position[row, slot], x.reshape(-1, x.shape[-1]))

    def spread(self, x):
        """N numbers, one for each action, as (B, T); 0 where there is none."""
        slot = np.maximum(np.cumsum(self.mask).reshape(self.mask.shape) - 1, 0)
        return keep(x[slot], self.mask)


def completion_log_probs(model, sequences, *, temperature=1.0, entropy=False):
    """Log-probabilities of the completions' tokens under ``softmax(logits / temperature)``.

    Parameters
    ----------
    model : GPT, or any module with ``hidden(tokens)`` and ``output_weight``
        Its twin from ``as_arrays()`` records nothing and gives arrays.
    sequences : Sequences
    temperature : float > 0
    entropy : bool
        Give the entropy of each distribution too.

    Returns
    -------
    (B, T), or two of them where `entropy`: Tensors or ndarrays; 0 behind the completions
    """
    logits = project(sequences.gather(model.hidden(sequences.tokens)), model.output_weight)
    logp = nf.token_log_probs(logits, sequences.actions[sequences.mask], temperature=temperature)
    if not entropy:
        return sequences.spread(logp)
    return sequences.spread(logp), sequences.spread(nf.softmax_entropy(logits, temperature=temperature))


def completion_values(model, sequences):
    """The values (B, T) of a :class:`ValueModel` before each action; 0 behind the completions.

    ValueError for a model that does not give one number a token.
    """
    values = model(sequences.tokens)
    if values.shape != sequences.tokens.shape:
        raise ValueError(f"completion_values: model must give one number for each of the tokens "
                         f"{sequences.tokens.shape}, as a ValueModel, got {values.shape} of a {type(model).__name__}")
    return sequences.spread(sequences.gather(values.reshape(*values.shape, 1)).reshape(-1))
