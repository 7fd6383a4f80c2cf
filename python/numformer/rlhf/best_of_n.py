"""Best of n: the plainest way to a higher reward, and the yardstick for PPO."""
import math

import numpy as np

from numformer.ops.arguments import as_ids, need_sizes
from numformer.rlhf.scorers import RewardModel

__all__ = ["best_of_n", "best_of_n_kl"]


def best_of_n(model, prompts, n, reward_fn, *, rng, max_new_tokens, batch=64, **sampling):
    """Sample n completions of each prompt and keep the one with the highest reward.

    Parameters
    ----------
    model : GPT
    prompts : iterable of lists of token ids
    n : int
    reward_fn : callable
        ``reward_fn(prompts, completions)``, two lists of lists of ids, gives a score for each.
    rng : numpy.random.Generator
    max_new_tokens : int
    batch : int
        Rows that are generated together; it decides which random numbers a row gets.
    **sampling
        temperature, top_k, top_p, min_p, eos_id, as in ``model.generate``.

    Returns
    -------
    completions : list of lists of int
        The best of each prompt, the first of equals.
    scores : ndarray (prompts, n)
        Of all samples: ``scores[:, :k].max(1)`` is best of k.

    Raises
    ------
    TypeError
        If n or batch is no integer, prompts are no lists of integers, or reward_fn is no function.
    ValueError
        If n or batch is below 1, or reward_fn does not give a finite score for each.
    """
    need_sizes("best_of_n", n=n, batch=batch)
    check_reward_fn("best_of_n", reward_fn)
    prompts = list(prompts)
    rows = [as_ids(prompt, "best_of_n", "prompts") for prompt in prompts for _ in range(n)]
    completions = []
    for begin in range(0, len(rows), batch):
        some = rows[begin:begin + batch]
        whole = model.generate(some, max_new_tokens, rng=rng, **sampling)
        completions += [row[len(prompt):] for row, prompt in zip(whole, some)]
    scores = read_scores("best_of_n", reward_fn(rows, completions), len(rows)).reshape(len(prompts), n)
    best = scores.argmax(1)
    return [completions[i * n + k] for i, k in enumerate(best)], scores


def best_of_n_kl(n):
    """The most that best of n, an int, can move from the policy it samples from: ``log n - (n - 1) / n`` nats."""
    need_sizes("best_of_n_kl", n=n)
    return math.log(n) - (n - 1) / n


def check_reward_fn(op, reward_fn):
    """TypeError unless it can be called with prompts and completions, which a RewardModel itself cannot."""
    if not callable(reward_fn) or isinstance(reward_fn, RewardModel):
        raise TypeError(f"{op}: reward_fn must be a function of prompts and completions, as reward_model.reward is, "
                        f"got {type(reward_fn).__name__}")


def read_scores(op, scores, count):
    """What a reward function gave, as float64 (count,). ValueError unless there are so many, all finite."""
    scores = np.asarray(scores, np.float64)
    if scores.shape != (count,):
        raise ValueError(f"{op}: reward_fn must give {count} scores, got an array of shape {scores.shape}")
    wrong = np.flatnonzero(~np.isfinite(scores))
    if wrong.size:
        raise ValueError(f"{op}: score {wrong[0]} that reward_fn gave is {scores[wrong[0]]}")
    return scores
