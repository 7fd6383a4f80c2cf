"""What an action was worth: GAE, the KL penalty and its coefficient, GRPO's group baseline."""
import math

import numpy as np

from numformer.ops.arguments import as_number
from numformer.rlhf.masked import constant, floats, keep, read_mask, same_shape
from numformer.tensor import apply

__all__ = ["AdaptiveKL", "gae", "grpo_advantages", "kl_penalty"]


def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), backward over each row::

        delta_t = r_t + gamma V_(t+1) - V_t
        A_t = delta_t + gamma lam A_(t+1)
        return_t = A_t + V_t

    with V and A zero behind the last slot. A masked slot is stepped over: the slots on its two sides are neighbours.

    Parameters
    ----------
    rewards, values : array_like, float32 or float64, shape (B, T)
        Taken as constants: nothing is differentiated.
    mask : array_like of bool (or of 0 and 1), shape (B, T)
    gamma, lam : float within 0 .. 1

    Returns
    -------
    advantages, returns : ndarray (B, T)
        Not whitened; 0 in masked slots.

    Raises
    ------
    TypeError
        If the dtypes are not both float32 or both float64.
    ValueError
        If the shapes differ or are not (B, T), or gamma or lam is out of range.
    """
    rewards, values = (constant(x) for x in floats("gae", rewards=rewards, values=values))
    same_shape("gae", rewards=rewards, values=values)
    if rewards.ndim != 2:
        raise ValueError(f"gae: rewards must have shape (B, T), got {rewards.shape}")
    gamma, lam = as_number(gamma, "gae", "gamma"), as_number(lam, "gae", "lam")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma and lam must be within 0 .. 1, got {gamma} and {lam}")
    mask = read_mask("gae", mask, rewards, "rewards")
    rewards, values = keep(rewards, mask), keep(values, mask)
    advantages = np.zeros_like(rewards)
    next_value = next_advantage = np.zeros(len(rewards), rewards.dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = np.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = np.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = np.where(mask[:, t], next_advantage, 0)
    return advantages, advantages + values


def _k3_forward(d):
    slope = -np.expm1(-d)
    return np.maximum(d - slope, 0), slope


def _k3_backward(dy, slope):
    return (dy * slope,)


def kl_penalty(logp, logp_ref, form="k1", mask=None):
    """KL(policy || reference), estimated from the log-probabilities of tokens that the policy sampled.

    With d = logp - logp_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, unbiased, of either sign;
    k2 = d^2 / 2, of low variance and biased; k3 = exp(-d) - 1 + d, unbiased and never negative.

    As a *loss*, its gradient is another matter: that of k2 has the expectation of the KL's gradient, that of k1 has the
    expectation 0. As a penalty in the reward, nothing is differentiated.

    Parameters
    ----------
    logp, logp_ref : array_like or Tensor, float32 or float64, one shape
    form : {"k1", "k2", "k3"}
    mask : array_like of bool, optional
        Slots outside give 0. Without it every slot is computed.

    Returns
    -------
    Of the shape of `logp`: a Tensor where one was given

    Raises
    ------
    TypeError
        If the dtypes are not both float32 or both float64.
    ValueError
        If the shapes differ, or `form` is not one of the three.
    """
    logp, logp_ref = floats("kl_penalty", logp=logp, logp_ref=logp_ref)
    same_shape("kl_penalty", logp=logp, logp_ref=logp_ref)
    if form not in ("k1", "k2", "k3"):
        raise ValueError(f'kl_penalty: form must be "k1", "k2" or "k3", got {form!r}')
    if mask is not None:
        mask = read_mask("kl_penalty", mask, logp, "logp")
        logp, logp_ref = keep(logp, mask), keep(logp_ref, mask)
    d = logp - logp_ref
    if form == "k1":
        return d
    return d * d * 0.5 if form == "k2" else apply(_k3_forward, _k3_backward, d)


class AdaptiveKL:
    """A coefficient that steers the KL to a target (Ziegler et al. 2019, arXiv:1909.08593)::

        error = clip(KL / target - 1, -0.2, 0.2);   value = value * (1 + error n / horizon)

    Parameters
    ----------
    init : float
    target : float or None
        None: the value stays what it is.
    horizon : float
        In the unit of `n`: after so many at the largest error, the value has changed by about 20 %.

    Attributes
    ----------
    value : float
    """

    def __init__(self, init, target=None, horizon=10000):
        if not as_number(init, "AdaptiveKL", "init") >= 0:
            raise ValueError(f"AdaptiveKL: init must be 0 or more, got {init}")
        if target is not None and not (as_number(target, "AdaptiveKL", "target") > 0
                                       and as_number(horizon, "AdaptiveKL", "horizon") > 0):
            raise ValueError(f"AdaptiveKL: target and horizon must be above 0, got {target} and {horizon}")
        self.value, self.target, self.horizon = float(init), target, horizon

    def update(self, kl, n):
        """Take in the mean `kl` of `n` more episodes; return the new value.

        ValueError where `kl` is not finite, or `n` is 5 horizons or more, which could turn the value's sign; TypeError
        where one is no number.
        """
        kl, episodes = as_number(kl, "AdaptiveKL", "kl"), as_number(n, "AdaptiveKL", "n")
        if not math.isfinite(kl):
            raise ValueError(f"AdaptiveKL: kl must be finite, got {kl}")
        if self.target is not None:
            if not 0 <= episodes < 5 * self.horizon:
                raise ValueError(f"AdaptiveKL: n must be below 5 horizons, 5 * {self.horizon}, got {n}; a coefficient "
                                 "below 0 would reward the KL: give a longer horizon")
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * episodes / self.horizon
        return self.value


def grpo_advantages(rewards, group, *, unbiased=True, eps=1e-4):
    """``(r - mean) / (std + eps)`` within each group of completions of one prompt (Shao et al. 2024, arXiv:2402.03300).

    Parameters
    ----------
    rewards : array_like, float32 or float64, shape (N,)
    group : int, or array_like of int of shape (N,)
        How many neighbours make a group, or the group that each reward belongs to.
    unbiased : bool
        Divide by count - 1 in the variance, as torch.std and TRL; False divides by the count, as numpy.std.
    eps : float

    Returns
    -------
    ndarray (N,)
        0 throughout a group whose rewards are equal, or that has one member.

    Raises
    ------
    TypeError
        If `rewards` is not float32 or float64, or `group` not of integers.
    ValueError
        If the groups do not fit the rewards.
    """
    rewards = constant(floats("grpo_advantages", rewards=rewards))
    if rewards.ndim != 1:
        raise ValueError(f"grpo_advantages: rewards must have shape (N,), got {rewards.shape}")
    group = np.asarray(group)
    if group.dtype.kind not in "iu":
        raise TypeError(f"grpo_advantages: group must be an integer or integers, got {group.dtype}")
    if group.ndim == 0:
        if group < 1 or rewards.size % group:
            raise ValueError(f"grpo_advantages: {rewards.size} rewards are no whole number of groups of {group}")
        group = np.arange(rewards.size) // group
    if group.shape != rewards.shape:
        raise ValueError(f"grpo_advantages: rewards and group must have the same shape, got {rewards.shape} and "
                         f"{group.shape}")
    advantages = np.zeros_like(rewards)
    for name in np.unique(group):
        members = group == name
        centred = rewards[members] - rewards[members][0]        # equal rewards: exactly 0
        centred -= centred.mean()
        variance = (centred * centred).sum() / max(len(centred) - int(unbiased), 1)
        advantages[members] = centred / (np.sqrt(variance) + rewards.dtype.type(eps))
    return advantages
