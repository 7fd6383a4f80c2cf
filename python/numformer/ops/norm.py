"""Norms over the last axis: layer_norm (Ba et al. 2016, arXiv:1607.06450), rms_norm (Zhang & Sennrich 2019,
arXiv:1910.07467), and both of a residual sum in one pass."""
from numpy import ndarray

from numformer import _core
from numformer.ops.arguments import as_array, as_number
from numformer.tensor import apply

__all__ = ["add_layer_norm", "add_layer_norm_backward", "add_layer_norm_forward", "add_rms_norm",
           "add_rms_norm_backward", "add_rms_norm_forward", "layer_norm", "layer_norm_backward", "layer_norm_forward",
           "rms_norm", "rms_norm_backward", "rms_norm_forward"]


def layer_norm_forward(x, weight, bias=None, eps=1e-5):
    """Return ``(y, saved)``; `saved` is what :func:`layer_norm_backward` needs."""
    if type(x) is not ndarray:
        x = as_array(x, "layer_norm", "x")
    if type(weight) is not ndarray:
        weight = as_array(weight, "layer_norm", "weight")
    if bias is not None and type(bias) is not ndarray:
        bias = as_array(bias, "layer_norm", "bias")
    if type(eps) is not float:
        eps = as_number(eps, "layer_norm", "eps")
    y, stats = _core.layer_norm(x, weight, bias, eps, None)
    return y, (x, weight, bias is not None, stats)


def layer_norm_backward(dy, saved):
    """Return the gradients of `x`, `weight` and `bias` (None where there was no bias)."""
    x, weight, with_bias, stats = saved
    dx, sums = _core.layer_norm_backward(dy, x, weight, stats, None)
    return dx, sums[0], sums[1] if with_bias else None


def layer_norm(x, weight, bias=None, eps=1e-5):
    """Bring every row (the last axis) to mean 0 and variance 1, then scale and shift it.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the variance about the mean in a second pass over the
    row. A row's result depends on that row alone; the sums over rows in the gradients of `weight` and `bias` have one
    order whatever the threads. Squares are summed in the dtype of `x`: where they overflow, from about 1e19 on in
    float32, the row becomes 0.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, shape (..., n)
        Read in place where one step leads from each row to the next, else copied.
    weight, bias : array_like or Tensor of the dtype of `x`, shape (n,)
        `bias` may be None.
    eps : float

    Returns
    -------
    ndarray, or Tensor where an argument is one, of the shape and dtype of `x`

    Raises
    ------
    TypeError
        If the dtypes are not all float32 or all float64, or `eps` is no number.
    ValueError
        If `x` has no axis, or `weight` or `bias` is not of shape (n,).
    """
    return apply(layer_norm_forward, layer_norm_backward, x, weight, bias, eps=eps)


def rms_norm_forward(x, weight, eps=1e-6):
    """Return ``(y, saved)``; `saved` is what :func:`rms_norm_backward` needs."""
    if type(x) is not ndarray:
        x = as_array(x, "rms_norm", "x")
    if type(weight) is not ndarray:
        weight = as_array(weight, "rms_norm", "weight")
    if type(eps) is not float:
        eps = as_number(eps, "rms_norm", "eps")
    y, stats = _core.rms_norm(x, weight, None, eps, None)
    return y, (x, weight, stats)


def rms_norm_backward(dy, saved):
    """Return the gradients of `x` and `weight`."""
    x, weight, stats = saved
    dx, sums = _core.rms_norm_backward(dy, x, weight, stats, None)
    return dx, sums[0]


def rms_norm(x, weight, eps=1e-6):
    """Divide every row (the last axis) by its root mean square, then scale it.

    ``y = x / sqrt(mean(x^2) + eps) * weight``. A row's result depends on that row alone. Squares are summed in the
    dtype of `x`: where they overflow, from about 1e19 on in float32, the row becomes 0.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, shape (..., n)
        Read in place where one step leads from each row to the next, else copied.
    weight : array_like or Tensor of the dtype of `x`, shape (n,)
    eps : float

    Returns
    -------
    ndarray, or Tensor where an argument is one, of the shape and dtype of `x`

    Raises
    ------
    TypeError
        If the dtypes are not all float32 or all float64, or `eps` is no number.
    ValueError
        If `x` has no axis, or `weight` is not of shape (n,).
    """
    return apply(rms_norm_forward, rms_norm_backward, x, weight, eps=eps)


def add_layer_norm_forward(x, residual, weight, bias=None, eps=1e-5):
    """Return ``((y, sum), saved)``."""
    x, residual = as_array(x, "layer_norm", "x"), as_array(residual, "layer_norm", "residual")
    weight = as_array(weight, "layer_norm", "weight")
    bias = None if bias is None else as_array(bias, "layer_norm", "bias")
    if type(eps) is not float:
        eps = as_number(eps, "layer_norm", "eps")
    y, total, stats = _core.layer_norm(x, weight, bias, eps, residual)
    return (y, total), (total, weight, bias is not None, stats)


def add_layer_norm_backward(dy, saved):
    """Return the gradients of `x`, `residual`, `weight` and `bias` from those of y and the sum (either may be None)."""
    total, weight, with_bias, stats = saved
    dy, dsum = dy
    if dy is None:
        return dsum, dsum, None, None
    dx, sums = _core.layer_norm_backward(dy, total, weight, stats, dsum)
    return dx, dx, sums[0], sums[1] if with_bias else None


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5):
    """``layer_norm(x + residual, weight, bias, eps)`` and the sum itself, in one pass over memory.

    Parameters and errors are those of :func:`layer_norm`; `residual` has the shape and dtype of `x`.

    Returns
    -------
    y, sum : ndarrays, or Tensors where an argument is one, of the shape and dtype of `x`
    """
    return apply(add_layer_norm_forward, add_layer_norm_backward, x, residual, weight, bias, eps=eps)


def add_rms_norm_forward(x, residual, weight, eps=1e-6):
    """Return ``((y, sum), saved)``."""
    x, residual = as_array(x, "rms_norm", "x"), as_array(residual, "rms_norm", "residual")
    weight = as_array(weight, "rms_norm", "weight")
    if type(eps) is not float:
        eps = as_number(eps, "rms_norm", "eps")
    y, total, stats = _core.rms_norm(x, weight, None, eps, residual)
    return (y, total), (total, weight, stats)


def add_rms_norm_backward(dy, saved):
    """Return the gradients of `x`, `residual` and `weight` from those of y and the sum (either may be None)."""
    total, weight, stats = saved
    dy, dsum = dy
    if dy is None:
        return dsum, dsum, None
    dx, sums = _core.rms_norm_backward(dy, total, weight, stats, dsum)
    return dx, dx, sums[0]


def add_rms_norm(x, residual, weight, eps=1e-6):
    """``rms_norm(x + residual, weight, eps)`` and the sum itself, in one pass over memory.

    Parameters and errors are those of :func:`rms_norm`; `residual` has the shape and dtype of `x`.

    Returns
    -------
    y, sum : ndarrays, or Tensors where an argument is one, of the shape and dtype of `x`
    """
    return apply(add_rms_norm_forward, add_rms_norm_backward, x, residual, weight, eps=eps)
