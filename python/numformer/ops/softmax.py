"""softmax and log_softmax along an axis."""
from numpy import moveaxis, ndarray

from numformer import _core
from numformer.ops.arguments import as_array, as_integer
from numformer.tensor import apply

__all__ = ["log_softmax", "log_softmax_backward", "log_softmax_forward", "softmax", "softmax_backward",
           "softmax_forward"]


def _along(kernel, op, x, axis):
    """`kernel` of the rows of `x` along `axis`; (y, y with the axis last)."""
    if type(x) is not ndarray:
        x = as_array(x, op, "x")
    if type(axis) is not int:
        axis = as_integer(axis, op, "axis")
    if axis == -1:
        y = kernel(x)
        return y, y
    if not x.ndim:
        raise ValueError(f"{op}: x must have at least one dimension, got ()")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{op}: axis must be within {-x.ndim} .. {x.ndim - 1} for shape {x.shape}, got {axis}")
    rows = kernel(moveaxis(x, axis, -1))
    return moveaxis(rows, -1, axis), rows


def _along_backward(kernel, dy, saved):
    """The gradient of what went into :func:`_along`, in a tuple."""
    rows, axis = saved
    if axis == -1:
        return (kernel(dy, rows),)
    return (moveaxis(kernel(moveaxis(dy, axis, -1), rows), -1, axis),)


def softmax_forward(x, axis=-1):
    """Return ``(y, saved)``; `saved` is what :func:`softmax_backward` needs."""
    y, rows = _along(_core.softmax, "softmax", x, axis)
    return y, (rows, axis)


def softmax_backward(dy, saved):
    """Return the gradient of `x`, in a tuple."""
    return _along_backward(_core.softmax_backward, dy, saved)


def softmax(x, axis=-1):
    """Return ``exp(x) / sum(exp(x))`` along `axis`, without overflow.

    Entries of -inf give 0. A row that is -inf throughout gives 0 everywhere (not NaN), and no gradient: a query that
    may look at nothing takes nothing. NaN or +inf in a row makes all of it NaN.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape of at least one axis
    axis : int
        Along any axis but the last the data is copied, and the result is a transposed view of contiguous rows.

    Returns
    -------
    ndarray, or Tensor where `x` is one, of the shape and dtype of `x`

    Raises
    ------
    TypeError
        If `x` is not float32 or float64, or `axis` no integer.
    ValueError
        If `x` has no such axis.
    """
    return apply(softmax_forward, softmax_backward, x, axis=axis)


def log_softmax_forward(x, axis=-1):
    """Return ``(y, saved)``; `saved` is what :func:`log_softmax_backward` needs."""
    y, rows = _along(_core.log_softmax, "log_softmax", x, axis)
    return y, (rows, axis)


def log_softmax_backward(dy, saved):
    """Return the gradient of `x`, in a tuple."""
    return _along_backward(_core.log_softmax_backward, dy, saved)


def log_softmax(x, axis=-1):
    """Return ``x - log(sum(exp(x)))`` along `axis`, without overflow.

    Entries of -inf give -inf. A row that is -inf throughout stays so (not NaN), and has no gradient. NaN or +inf in a
    row makes all of it NaN.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape of at least one axis
    axis : int
        Along any axis but the last the data is copied, and the result is a transposed view of contiguous rows.

    Returns
    -------
    ndarray, or Tensor where `x` is one, of the shape and dtype of `x`

    Raises
    ------
    TypeError
        If `x` is not float32 or float64, or `axis` no integer.
    ValueError
        If `x` has no such axis.
    """
    return apply(log_softmax_forward, log_softmax_backward, x, axis=axis)
