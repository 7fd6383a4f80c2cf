"""The cross-entropy of a linear layer's logits, a chunk of rows at a time: tokens x vocabulary is never held."""
import numpy as np

from numformer import _core
from numformer._core import pooled
from numformer.ops.arguments import as_array, as_floats, as_gradient, check_ids, same_dtype
from numformer.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward, loss_options
from numformer.tensor import Tensor, apply, is_recording

__all__ = ["linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_forward"]

_OP = "linear_cross_entropy"
_CHUNK_BYTES = 16 << 20     # of logits; half of it costs a sixth more time, four times as much saves a twentieth
_LEAST_ROWS = 64            # of a chunk, however large the vocabulary: fewer would read the weight too often


def _chunks(rows, weight):
    """(begin, end) of each; the shapes of weight alone say where they are cut, so sums over chunks have one order."""
    step = max(_LEAST_ROWS, _CHUNK_BYTES // max(1, len(weight) * weight.itemsize))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _losses(rows, weight, targets, ignore_index, options):
    """cross_entropy_forward of a chunk's logits, a loss for each row."""
    logits = _core.product(rows, weight.T, None, False)
    return cross_entropy_forward(logits, targets, ignore_index, reduction="none", **options)


def _gradients(dlogits, hidden, weight, dhidden, dweight):
    """Write dhidden of a chunk; add its share to dweight."""
    _core.product(dlogits, weight, dhidden, False)
    _core.product(dlogits.T, hidden, dweight, True)


def _kept(targets, ignore_index):
    """The rows that count, or None where all do."""
    kept = np.flatnonzero(targets != ignore_index)
    return None if len(kept) == len(targets) else kept


def linear_cross_entropy_forward(hidden, weight, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
                                 reduction="mean", gradient=False):
    """Return ``(loss, saved)``; `saved` is what :func:`linear_cross_entropy_backward` needs.

    With `gradient` both gradients are made in the same pass, while the logits are there (reduction "mean" or "sum");
    without, the backward makes the logits again.
    """
    hidden, weight = as_floats(hidden, _OP, "hidden"), as_floats(weight, _OP, "weight")
    targets = as_array(targets, _OP, "targets")
    same_dtype(_OP, hidden=hidden, weight=weight)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{_OP}: hidden must have shape (..., K) and weight (V, K), got {hidden.shape} and "
                         f"{weight.shape}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{_OP}: targets must have shape {hidden.shape[:-1]}, got {targets.shape}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{_OP}: reduction must be "mean", "sum" or "none", got {reduction!r}')
    ignore_index, label_smoothing, z_loss = loss_options(_OP, ignore_index, label_smoothing, z_loss)
    flat = targets.reshape(-1)
    check_ids(flat, len(weight), _OP, "targets", ignore_index)
    kept = _kept(flat, ignore_index)
    rows, flat = hidden.reshape(len(flat), hidden.shape[-1]), flat if kept is None else flat[kept]
    rows = rows if kept is None else rows[kept]
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    share = 1.0 if reduction != "mean" else 1.0 / max(1, len(flat))
    losses = np.empty(len(flat), hidden.dtype)
    made = None
    if gradient and reduction != "none":
        made = pooled(np.empty, rows.shape, rows.dtype), pooled(np.zeros, weight.shape, weight.dtype)
    for i, j in _chunks(len(flat), weight):
        losses[i:j], inner = _losses(rows[i:j], weight, flat[i:j], ignore_index, options)
        if made is not None:
            dlogits, _ = cross_entropy_backward(np.full(j - i, share, rows.dtype), inner)
            _gradients(dlogits, rows[i:j], weight, made[0][i:j], made[1])
    saved = hidden.shape, rows, weight, flat, kept, share, reduction, ignore_index, options, made
    if reduction == "none":
        loss = np.zeros(targets.shape, hidden.dtype)
        loss.reshape(-1)[slice(None) if kept is None else kept] = losses
        return loss, saved
    return np.asarray(losses.sum(dtype=np.float64) * share, hidden.dtype), saved


def linear_cross_entropy_backward(dy, saved):
    """Return the gradients of hidden and weight and, None, of targets."""
    shape, rows, weight, targets, kept, share, reduction, ignore_index, options, made = saved
    dy = as_gradient(dy, shape[:-1] if reduction == "none" else (), rows.dtype, f"{_OP}_backward")
    if made is None:
        dhidden, dweight = pooled(np.empty, rows.shape, rows.dtype), pooled(np.zeros, weight.shape, weight.dtype)
        each = np.broadcast_to(dy * rows.dtype.type(share), len(targets)) if dy.ndim == 0 else dy.reshape(-1)
        each = each if dy.ndim == 0 or kept is None else each[kept]
        for i, j in _chunks(len(targets), weight):
            _, inner = _losses(rows[i:j], weight, targets[i:j], ignore_index, options)
            dlogits, _ = cross_entropy_backward(each[i:j], inner)
            _gradients(dlogits, rows[i:j], weight, dhidden[i:j], dweight)
    else:
        dhidden, dweight = made if dy == 1 else (made[0] * dy, made[1] * dy)
    if kept is not None:
        whole = pooled(np.zeros, (int(np.prod(shape[:-1])), shape[-1]), rows.dtype)
        whole[kept] = dhidden
        dhidden = whole
    return dhidden.reshape(shape), dweight, None


def linear_cross_entropy(hidden, weight, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
                         reduction="mean"):
    """Return ``cross_entropy(linear(hidden, weight), targets)`` without ever holding all logits.

    The logits of a chunk of rows (about 16 MB) are made, reduced to their losses and, where a gradient is wanted,
    turned into both gradients at once: a training step makes every logit once. Rows to be ignored are not read at all.

    Parameters
    ----------
    hidden : array_like or Tensor, float32 or float64, shape (..., K)
    weight : array_like or Tensor, shape (V, K), of the same dtype
    targets : array_like of integers, shape (...)
        Classes within 0 .. V-1, or `ignore_index`.
    ignore_index, label_smoothing, z_loss, reduction
        As for :func:`numformer.cross_entropy`.

    Returns
    -------
    ndarray, or Tensor where `hidden` or `weight` is one: 0-d, or of the shape of `targets` for "none"

    Raises
    ------
    TypeError
        If a dtype is not as above, or an option no number.
    ValueError
        If a target is out of range, shapes do not fit, or an option is not one of those named.

    Notes
    -----
    T V K multiply-adds forward and 2 T V K for the gradients. With reduction "none" the gradient makes the logits a
    second time. Wijmans et al. 2024 (arXiv:2411.09009) and Liger (Hsu et al. 2024, arXiv:2410.10989) are the source of
    the two ways.
    """
    gradient = is_recording() and any(type(x) is Tensor and x.requires_grad for x in (hidden, weight))
    return apply(linear_cross_entropy_forward, linear_cross_entropy_backward, hidden, weight, targets,
                 ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction,
                 gradient=gradient)
