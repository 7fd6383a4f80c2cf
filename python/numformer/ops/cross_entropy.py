"""Losses over rows of logits that never hold their probabilities: cross_entropy, token_log_probs, softmax_entropy."""
from numpy import ndarray

from numformer import _core
from numformer.ops.arguments import as_array, as_gradient, as_integer, as_number, choose
from numformer.tensor import apply

__all__ = ["cross_entropy", "cross_entropy_backward", "cross_entropy_forward", "softmax_entropy",
           "softmax_entropy_backward", "softmax_entropy_forward", "token_log_probs", "token_log_probs_backward",
           "token_log_probs_forward"]

_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


def loss_options(op, ignore_index, label_smoothing, z_loss):
    """The three as an int and floats. TypeError or ValueError for what they cannot be."""
    ignore_index, z_loss = as_integer(ignore_index, op, "ignore_index"), as_number(z_loss, op, "z_loss")
    if not 0 <= as_number(label_smoothing, op, "label_smoothing") <= 1:
        raise ValueError(f"{op}: label_smoothing must be within 0 .. 1, got {label_smoothing}")
    return ignore_index, float(label_smoothing), z_loss


def cross_entropy_forward(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """Return ``(loss, saved)``; `saved` is what :func:`cross_entropy_backward` needs."""
    if type(logits) is not ndarray:
        logits = as_array(logits, "cross_entropy", "logits")
    if type(targets) is not ndarray:
        targets = as_array(targets, "cross_entropy", "targets")
    number = choose(_REDUCTIONS, reduction, "cross_entropy", "reduction")
    ignore_index, label_smoothing, z_loss = loss_options("cross_entropy", ignore_index, label_smoothing, z_loss)
    loss, lse, targets, count = _core.cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, 1.0, 1.0,
                                                    number)
    share = 1 / max(count, 1) if reduction == "mean" else 1.0
    return loss, (logits, targets, lse, ignore_index, label_smoothing, z_loss, share, reduction != "none")


def cross_entropy_backward(dy, saved):
    """Return the gradients of `logits` and, None, of `targets`."""
    logits, targets, lse, ignore_index, label_smoothing, z_loss, share, single = saved
    dy = as_gradient(dy, () if single else logits.shape[:-1], logits.dtype, "cross_entropy_backward")
    return _core.cross_entropy_backward(dy, logits, targets, lse, ignore_index, label_smoothing, z_loss, 1.0, 1.0,
                                        share, single), None


def cross_entropy(logits, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """Return the negative log-likelihood of `targets` under the softmax of `logits`.

    A row's loss is ``lse - (1 - e) * logits[target] - e * mean(logits) + z_loss * lse**2`` with ``lse =
    log(sum(exp(logits)))`` and e the label smoothing (spread over all classes, as in torch). The logits are read once;
    the backward writes their gradient from the saved lse.

    Parameters
    ----------
    logits : array_like or Tensor, float32 or float64, shape (..., V)
    targets : array_like of integers, shape (...)
        Classes within 0 .. V-1, or `ignore_index`.
    ignore_index : int
        A row with this target has the loss 0 and no gradient, and does not count in the mean.
    label_smoothing : float within 0 .. 1
    z_loss : float
        Weight of lse squared, which keeps logits from drifting (PaLM, Chowdhery et al. 2022).
    reduction : {"mean", "sum", "none"}
        Mean over the rows that count (0 where none does), sum, or the loss of each row.

    Returns
    -------
    ndarray, or Tensor where `logits` is one: 0-d, or of the shape of `targets` for "none"

    Raises
    ------
    TypeError
        If `logits` is not float32 or float64, `targets` not of integers, or an option no number.
    ValueError
        If a target is out of range (the first is named), the shapes do not fit, or an option is not as above.
    """
    return apply(cross_entropy_forward, cross_entropy_backward, logits, targets, ignore_index=ignore_index,
                 label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction)


def token_log_probs_forward(logits, targets, temperature=1.0, ignore_index=-100):
    """Return ``(log_probs, saved)``; `saved` is what :func:`token_log_probs_backward` needs."""
    logits, targets = as_array(logits, "token_log_probs", "logits"), as_array(targets, "token_log_probs", "targets")
    ignore_index = as_integer(ignore_index, "token_log_probs", "ignore_index")
    scale = _inverse(temperature, "token_log_probs")
    y, lse, targets, _ = _core.cross_entropy(logits, targets, ignore_index, 0.0, 0.0, scale, -1.0, 2)
    return y, (logits, targets, lse, ignore_index, scale)


def token_log_probs_backward(dy, saved):
    """Return the gradients of `logits` and, None, of `targets`."""
    logits, targets, lse, ignore_index, scale = saved
    return _core.cross_entropy_backward(dy, logits, targets, lse, ignore_index, 0.0, 0.0, scale, -1.0, 1.0,
                                        False), None


def token_log_probs(logits, targets, *, temperature=1.0, ignore_index=-100):
    """Return ``log_softmax(logits / temperature)`` at `targets`, without holding it for the other classes.

    Parameters
    ----------
    logits : array_like or Tensor, float32 or float64, shape (..., V)
    targets : array_like of integers, shape (...)
        Classes within 0 .. V-1, or `ignore_index`: there the result is 0, and no gradient.
    temperature : float > 0
    ignore_index : int

    Returns
    -------
    ndarray, or Tensor where `logits` is one, of the shape of `targets`

    Raises
    ------
    TypeError
        If `logits` is not float32 or float64, `targets` not of integers, or an option no number.
    ValueError
        If a target is out of range (the first is named), the shapes do not fit, or the temperature is not above 0.
    """
    return apply(token_log_probs_forward, token_log_probs_backward, logits, targets, temperature=temperature,
                 ignore_index=ignore_index)


def softmax_entropy_forward(logits, temperature=1.0):
    """Return ``(entropy, saved)``; `saved` is what :func:`softmax_entropy_backward` needs."""
    logits = as_array(logits, "softmax_entropy", "logits")
    scale = _inverse(temperature, "softmax_entropy")
    entropy, lse = _core.softmax_entropy(logits, scale)
    return entropy, (logits, entropy, lse, scale)


def softmax_entropy_backward(dy, saved):
    """Return the gradient of `logits`, in a tuple."""
    logits, entropy, lse, scale = saved
    return (_core.softmax_entropy_backward(dy, logits, entropy, lse, scale),)


def softmax_entropy(logits, *, temperature=1.0):
    """Return the entropy, in nats, of ``softmax(logits / temperature)`` over the last axis.

    Entries of -inf add nothing; a row that is -inf throughout has the entropy 0 and no gradient.

    Parameters
    ----------
    logits : array_like or Tensor, float32 or float64, shape (..., V)
    temperature : float > 0

    Returns
    -------
    ndarray, or Tensor where `logits` is one, of shape (...)

    Raises
    ------
    TypeError
        If `logits` is not float32 or float64, or `temperature` no number.
    ValueError
        If `logits` has no axis, or the temperature is not above 0.
    """
    return apply(softmax_entropy_forward, softmax_entropy_backward, logits, temperature=temperature)


def _inverse(temperature, op):
    if not as_number(temperature, op, "temperature") > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    return 1.0 / temperature
