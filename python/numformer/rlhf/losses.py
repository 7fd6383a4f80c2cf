"""The losses of RLHF: PPO's policy and value, the reward model's, DPO's. Masks select; they never multiply."""
import numpy as np

import numformer as nf
from numformer.ops import arithmetic as ar
from numformer.ops.arguments import as_array, as_number
from numformer.rlhf.masked import constant, floats, keep, masked_mean, read_mask, same_shape

__all__ = ["dpo_loss", "ppo_policy_loss", "ppo_value_loss", "reward_accuracy", "reward_model_loss"]


def ppo_policy_loss(logp, old_logp, advantages, mask, *, clip=0.2, dual_clip=None):
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347), the mean over the slots where `mask`::

        ratio = exp(logp - old_logp)
        loss = mean(max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)))

    Parameters
    ----------
    logp : array_like or Tensor, float32 or float64, shape (B, T)
        Log-probabilities of the taken actions; the loss is differentiated through these alone.
    old_logp, advantages : array_like, the dtype and shape of `logp`
        Constants: the log-probabilities at the time of the rollout, and what each action was worth.
    mask : array_like of bool (or of 0 and 1), shape (B, T)
        What the other arrays hold outside is not read.
    clip : float > 0
    dual_clip : float > 1, optional
        Where A < 0 a slot's loss is at most -A dual_clip (Ye et al. 2020, arXiv:1912.09729).

    Returns
    -------
    loss : 0-d, a Tensor where `logp` is one
        0, with no gradient, where every slot is masked.
    metrics : dict of float
        loss/policy_avg; policy/approxkl_avg, the mean of (logp - old_logp)^2 / 2; policy/clipfrac_avg, the share of
        slots where the clipped term is the larger; val/ratio and val/ratio_var, mean and variance of the ratio.

    Raises
    ------
    TypeError
        If the dtypes are not all float32 or all float64.
    ValueError
        If the shapes differ, or an option is out of range.
    """
    logp, old_logp, advantages = floats("ppo_policy_loss", logp=logp, old_logp=old_logp, advantages=advantages)
    same_shape("ppo_policy_loss", logp=logp, old_logp=old_logp, advantages=advantages)
    mask = read_mask("ppo_policy_loss", mask, logp, "logp")
    if not as_number(clip, "ppo_policy_loss", "clip") > 0:
        raise ValueError(f"ppo_policy_loss: clip must be above 0, got {clip}")
    if dual_clip is not None and not as_number(dual_clip, "ppo_policy_loss", "dual_clip") > 1:
        raise ValueError(f"ppo_policy_loss: dual_clip must be above 1, got {dual_clip}")
    loss_weight = -keep(constant(advantages), mask)
    change = keep(logp, mask) - keep(constant(old_logp), mask)
    ratio = ar.exp(change)
    plain, clipped = ratio * loss_weight, ar.clip(ratio, 1 - clip, 1 + clip) * loss_weight
    slots = ar.maximum(plain, clipped)
    if dual_clip is not None:
        slots = nf.where(loss_weight > 0, ar.minimum(slots, loss_weight * float(dual_clip)), slots)
    loss = masked_mean(slots, mask)
    change, ratio = constant(change), constant(ratio)
    mean_ratio = masked_mean(ratio, mask)
    return loss, {"loss/policy_avg": float(constant(loss)),
                  "policy/approxkl_avg": float(0.5 * masked_mean(change * change, mask)),
                  "policy/clipfrac_avg": _share(constant(clipped) > constant(plain), mask),
                  "val/ratio": float(mean_ratio),
                  "val/ratio_var": float(masked_mean((ratio - mean_ratio)**2, mask))}


def ppo_value_loss(values, old_values, returns, mask, *, clip=0.2):
    """Half the squared error of the value function, clipped around its old values, the mean over `mask`::

        loss = mean(max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)) / 2

    as OpenAI's baselines and lm-human-preferences have it.

    Parameters
    ----------
    values : array_like or Tensor, float32 or float64, shape (B, T)
        The loss is differentiated through these alone.
    old_values, returns : array_like, the dtype and shape of `values`
    mask : array_like of bool (or of 0 and 1), shape (B, T)
        What the other arrays hold outside is not read.
    clip : float > 0, or None
        None: no clipping.

    Returns
    -------
    loss : 0-d, a Tensor where `values` is one
        0, with no gradient, where every slot is masked.
    metrics : dict of float
        loss/value_avg; val/clipfrac_avg, the share of slots where the clipped term is the larger.

    Raises
    ------
    TypeError
        If the dtypes are not all float32 or all float64.
    ValueError
        If the shapes differ, or clip is not above 0.
    """
    values, old_values, returns = floats("ppo_value_loss", values=values, old_values=old_values, returns=returns)
    same_shape("ppo_value_loss", values=values, old_values=old_values, returns=returns)
    mask = read_mask("ppo_value_loss", mask, values, "values")
    if clip is not None and not as_number(clip, "ppo_value_loss", "clip") > 0:
        raise ValueError(f"ppo_value_loss: clip must be above 0 or None, got {clip}")
    values, old, returns = keep(values, mask), keep(constant(old_values), mask), keep(constant(returns), mask)
    error = values - returns
    slots, clipfrac = error * error, 0.0
    if clip is not None:
        error = ar.clip(values, old - clip, old + clip) - returns
        clipped = error * error
        clipfrac = _share(constant(clipped) > constant(slots), mask)
        slots = ar.maximum(slots, clipped)
    loss = masked_mean(slots, mask) * 0.5
    return loss, {"loss/value_avg": float(constant(loss)), "val/clipfrac_avg": clipfrac}


def _share(slots, mask):
    return float((slots & mask).sum() / max(mask.sum(), 1))


def reward_model_loss(chosen, rejected, margin=0.0, *, centering=0.0):
    """The Bradley-Terry loss of pairs: ``mean(-log sigmoid(chosen - rejected - margin))``.

    (Ouyang et al. 2022, arXiv:2203.02155; the margin as in Llama 2, arXiv:2307.09288.)

    Parameters
    ----------
    chosen, rejected : array_like or Tensor, float32 or float64, shape (B,)
        Scores of the better and of the worse completion of a pair.
    margin : float, or array_like of shape (B,)
        By how much the better should win.
    centering : float
        Weight of ``mean((chosen + rejected)^2)``, which keeps scores around 0 (Eisenstein et al. 2023,
        arXiv:2312.09244).

    Returns
    -------
    0-d, a Tensor where one was given; 0 where there are no pairs

    Raises
    ------
    TypeError
        If the dtypes are not both float32 or both float64.
    ValueError
        If the shapes differ.
    """
    chosen, rejected = floats("reward_model_loss", chosen=chosen, rejected=rejected)
    same_shape("reward_model_loss", chosen=chosen, rejected=rejected)
    margin = as_array(constant(margin), "reward_model_loss", "margin")
    if margin.dtype.kind not in "biuf":
        raise TypeError(f"reward_model_loss: margin must be of real numbers, got {margin.dtype}")
    margin, centering = margin.astype(chosen.dtype), as_number(centering, "reward_model_loss", "centering")
    if margin.ndim:
        same_shape("reward_model_loss", chosen=chosen, margin=margin)
    every = np.ones(chosen.shape, bool)
    loss = masked_mean(-ar.log_sigmoid(chosen - rejected - margin), every)
    if centering:
        loss = loss + masked_mean((chosen + rejected) ** 2, every) * centering
    return loss


def reward_accuracy(chosen, rejected):
    """The share of pairs whose better completion has the higher score, as a float; equal scores count half.

    Arguments and errors as :func:`reward_model_loss`.
    """
    chosen, rejected = (constant(x) for x in floats("reward_accuracy", chosen=chosen, rejected=rejected))
    same_shape("reward_accuracy", chosen=chosen, rejected=rejected)
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).sum() / max(chosen.size, 1))


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, *, label_smoothing=0.0):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)::

        D = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
        loss = mean(-log sigmoid(beta D))

    Parameters
    ----------
    policy_chosen, policy_rejected : array_like or Tensor, float32 or float64, shape (B,)
        Log-probabilities of whole completions, e.g. ``masked_sum(logp, mask, axis=1)``.
    ref_chosen, ref_rejected : array_like, the same dtype and shape
        Those of the frozen reference: constants.
    beta : float > 0
    label_smoothing : float within 0 .. 0.5
        The chance that a pair is labelled the wrong way (conservative DPO, Mitchell 2023).

    Returns
    -------
    0-d, a Tensor where one was given; 0 where there are no pairs

    Raises
    ------
    TypeError
        If the dtypes are not all float32 or all float64.
    ValueError
        If the shapes differ, or an option is out of range.
    """
    arrays = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected, "ref_chosen": ref_chosen,
              "ref_rejected": ref_rejected}
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = floats("dpo_loss", **arrays)
    same_shape("dpo_loss", policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen,
               ref_rejected=ref_rejected)
    if not as_number(beta, "dpo_loss", "beta") > 0:
        raise ValueError(f"dpo_loss: beta must be above 0, got {beta}")
    if not 0 <= as_number(label_smoothing, "dpo_loss", "label_smoothing") <= 0.5:
        raise ValueError(f"dpo_loss: label_smoothing must be within 0 .. 0.5, got {label_smoothing}")
    x = (policy_chosen - policy_rejected - (constant(ref_chosen) - constant(ref_rejected))) * float(beta)
    losses, label_smoothing = -ar.log_sigmoid(x), float(label_smoothing)
    if label_smoothing:
        losses = losses * (1 - label_smoothing) - ar.log_sigmoid(-x) * label_smoothing
    return masked_mean(losses, np.ones(x.shape, bool))
