"""RewardModel and ValueModel: the trunk of a GPT with one number instead of a vocabulary at its end."""
import dataclasses
import math

import numpy as np

import numformer as nf
from numformer.models.gpt import GPT, GPTConfig, need_config
from numformer.models.pretrained import Pretrained
from numformer.nn import Linear, Module
from numformer.ops.arguments import as_ids
from numformer.rlhf.losses import reward_accuracy, reward_model_loss
from numformer.rlhf.sequences import pad

__all__ = ["RewardModel", "ValueModel", "refuse_quantized"]


def refuse_quantized(model, name):
    """TypeError if a weight of `model`, which was given as `name`, is quantized."""
    if any(True for _ in model.named_quantized()):
        raise TypeError(f"{name} is quantized, and nothing trains its weights; give a model of floats")


class _Scorer(Module):
    """``head(trunk.hidden(tokens))``, one number a position."""

    config_class = GPTConfig

    def __init__(self, config, *, rng):
        config = need_config(config, type(self).__name__)
        self.config = dataclasses.replace(config, tie_embedding=True)       # no logits, so no weight for them
        self.trunk = GPT(self.config, rng=rng)
        self.head = Linear(config.n_embd, 1, rng=rng, dtype=np.dtype(config.dtype))

    @classmethod
    def from_gpt(cls, gpt, *, rng):
        """With a copy of the weights of `gpt` and a new head, drawn from `rng`. TypeError where they are quantized."""
        refuse_quantized(gpt, f"{cls.__name__}: gpt")
        model = cls(gpt.config, rng=rng)
        weights = gpt.state_dict()
        model.trunk.load_state_dict({name: array for name, array in weights.items() if name != "head"})
        return model

    def config_dict(self):
        return dataclasses.asdict(self.config)


class RewardModel(_Scorer, Pretrained):
    """A score for a whole sequence, read at its last token.

    Padding stands behind the tokens and changes no bit of a score. The head begins as N(0, 1 / (n_embd + 1))
    (Stiennon et al. 2020, arXiv:2009.01325).

    Parameters
    ----------
    config : GPTConfig
        Of the trunk; :meth:`from_gpt` takes over a trained one.
    rng : numpy.random.Generator
    """

    model_type = "numformer-reward"

    def __init__(self, config, *, rng):
        super().__init__(config, rng=rng)
        weight = self.head.weight.data
        weight[...] = rng.standard_normal(weight.shape) / math.sqrt(config.n_embd + 1)

    def __call__(self, tokens, lengths=None):
        """Scores (B,) of `tokens` (B, S) as a Tensor.

        Parameters
        ----------
        tokens : (B, S) array of int
            Right-padded. Negative ids are padding.
        lengths : (B,) array of int, optional
            Tokens of each row, where the padding is not negative.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"RewardModel: tokens must be integers (B, S), got {tokens.dtype} {tokens.shape}")
        if lengths is None:
            lengths = (tokens >= 0).sum(1)
        lengths = np.asarray(lengths)
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(f"RewardModel: lengths must have shape {tokens.shape[:1]}, got {lengths.shape}")
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        wrong = np.flatnonzero((lengths < 1) | (lengths > tokens.shape[1]) | (real & (tokens < 0)).any(1))
        if wrong.size:
            raise ValueError(f"RewardModel: row {wrong[0]} must hold 1 to {tokens.shape[1]} tokens with its padding "
                             f"behind them, got {tokens[wrong[0]].tolist()} of length {lengths[wrong[0]]}")
        hidden = self.trunk.hidden(np.where(real, tokens, 0))
        last = np.arange(len(tokens)) * tokens.shape[1] + lengths - 1
        return self.head(nf.embedding(last, hidden.reshape(-1, hidden.shape[-1]))).reshape(-1)

    def loss(self, chosen, rejected):
        """:func:`reward_model_loss` of sequences, each (B, S) padded with negative ids, as PairBatches gives them.

        The share of pairs in the right order is left in ``accuracy`` (a float).
        """
        rows = np.full((len(chosen) + len(rejected), max(chosen.shape[1], rejected.shape[1])), -1, np.int64)
        rows[:len(chosen), :chosen.shape[1]] = chosen
        rows[len(chosen):, :rejected.shape[1]] = rejected
        scores = self(rows)
        chosen, rejected = scores[:len(chosen)], scores[len(chosen):]
        self.accuracy = reward_accuracy(chosen, rejected)
        return reward_model_loss(chosen, rejected)

    def score(self, sequences, batch=64):
        """Scores of lists of token ids, as an ndarray; nothing is recorded, dropout is off.

        Sequences of similar length go through the model together, `batch` at a time. TypeError for what is no integer.
        """
        model = self.as_arrays()
        sequences = [as_ids(row, "RewardModel", "sequences") for row in sequences]
        order = np.argsort([len(s) for s in sequences], kind="stable")
        scores = np.empty(len(sequences), np.dtype(self.config.dtype))
        for begin in range(0, len(order), batch):
            rows = order[begin:begin + batch]
            scores[rows] = model(pad([sequences[i] for i in rows], -1))
        return scores

    def reward(self, prompts, completions):
        """The scores of prompts with their completions: what :class:`PPO` takes as a reward."""
        return self.score([[*p, *c] for p, c in zip(prompts, completions)])

    def pair_accuracy(self, chosen, rejected):
        """:func:`reward_accuracy` over two lists of sequences, as a float."""
        return reward_accuracy(self.score(chosen), self.score(rejected))

    def normalize(self, sequences):
        """Scale and shift the head so that the scores of `sequences` have mean 0 and standard deviation 1.

        (Ziegler et al. 2019 do it before PPO, with samples of the policy to be trained.)
        """
        scores = self.score(sequences).astype(np.float64)
        if not scores.size or not scores.std() > 0:
            raise ValueError(f"RewardModel.normalize: the scores of these {scores.size} sequences do not vary")
        self.head.weight.data /= scores.std()
        self.head.bias.data[...] = (self.head.bias.data - scores.mean()) / scores.std()


class ValueModel(_Scorer, Pretrained):
    """What is still to come, after each token: the value function of PPO.

    The head begins as 0, or, :meth:`from_reward`, as the reward model's (Ouyang et al. 2022).

    Parameters
    ----------
    config : GPTConfig
        Of the trunk; :meth:`from_gpt` takes over a trained one.
    rng : numpy.random.Generator
    """

    model_type = "numformer-value"

    def __init__(self, config, *, rng):
        super().__init__(config, rng=rng)
        self.head.weight.data[...] = 0

    @classmethod
    def from_reward(cls, reward_model, *, rng):
        """With a copy of all weights of a :class:`RewardModel`."""
        model = cls(reward_model.config, rng=rng)
        model.load_state_dict(reward_model.state_dict())
        return model

    def __call__(self, tokens):
        """Values (B, S) of `tokens` (B, S)."""
        values = self.head(self.trunk.hidden(tokens))
        return values.reshape(*values.shape[:2])
