"""Sums over the slots of a (B, T) array that a mask names.

What a masked slot holds (NaN, inf, 1e9) is replaced before anything is computed from it, never multiplied by 0: it
changes no bit of a result or of a gradient, and its own gradient is 0.
"""
import numpy as np

import numformer as nf
from numformer.ops import arithmetic as ar
from numformer.ops.arguments import as_array, as_number
from numformer.tensor import Tensor

__all__ = ["constant", "explained_variance", "floats", "keep", "masked_mean", "masked_sum", "masked_whiten",
           "read_mask", "same_shape"]


def floats(op, **arrays):
    """The arrays (Tensors stay Tensors), all float32 or all float64. TypeError otherwise."""
    found = {name: x if type(x) is Tensor else as_array(x, op, name) for name, x in arrays.items()}
    dtypes = {name: x.dtype for name, x in found.items()}
    if len(set(dtypes.values())) > 1 or not set(dtypes.values()) <= {np.dtype("f4"), np.dtype("f8")}:
        came = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: needs arrays of one dtype, float32 or float64, got {came}; convert with .astype")
    return found.values() if len(found) > 1 else next(iter(found.values()))


def same_shape(op, **arrays):
    """ValueError, naming both shapes, unless all the arrays have the shape of the first."""
    (first, a), *others = arrays.items()
    for name, b in others:
        if a.shape != b.shape:
            raise ValueError(f"{op}: {first} and {name} must have the same shape, got {a.shape} and {b.shape}")


def constant(x):
    """The values of `x`: nothing is differentiated through them."""
    return x.data if type(x) is Tensor else x


def read_mask(op, mask, like, name):
    """`mask` as booleans of the shape of `like`."""
    mask = as_array(constant(mask), op, "mask")
    if mask.dtype != np.bool_:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{op}: mask must be boolean, or 1 for a slot that counts and 0 for one that does not; "
                             f"got {mask.dtype} with other values")
        mask = mask.astype(bool)
    if mask.shape != like.shape:
        raise ValueError(f"{op}: {name} and mask must have the same shape, got {like.shape} and {mask.shape}")
    return mask


def keep(x, mask):
    """`x` where `mask`, else 0."""
    return nf.where(mask, x, 0.0)


def masked_sum(x, mask, axis=None):
    """The sum of `x` over the slots where `mask`, over all axes or over `axis`; 0 where there is none.

    Arguments, result and errors as :func:`masked_mean`.
    """
    x = floats("masked_sum", x=x)
    return ar.sum(keep(x, read_mask("masked_sum", mask, x, "x")), axis)


def masked_mean(x, mask, axis=None):
    """The mean of `x` over the slots where `mask`; 0 where there is none.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape
    mask : array_like of bool (or of 0 and 1), the shape of `x`
    axis : int or tuple, optional
        All axes where None.

    Returns
    -------
    Of the dtype of `x`: a Tensor where `x` is one.

    Raises
    ------
    TypeError
        If `x` is not float32 or float64.
    ValueError
        If `mask` has another shape than `x`, or holds something else than 0 and 1.
    """
    x = floats("masked_mean", x=x)
    mask = read_mask("masked_mean", mask, x, "x")
    count = np.maximum(mask.sum(axis=axis), 1).astype(x.dtype)
    return ar.sum(keep(x, mask), axis) / count


def masked_whiten(x, mask, shift_mean=True, *, unbiased=False, eps=1e-8):
    """``(x - mean) / sqrt(var + eps)`` with mean and variance over all slots where `mask`; 0 in the others.

    Parameters
    ----------
    x, mask
        As in :func:`masked_mean`.
    shift_mean : bool
        False: the mean is added back, so that only the scale changes (for rewards).
    unbiased : bool
        Divide by count - 1 in the variance, as TRL; OpenAI's lm-human-preferences divides by the count.
    eps : float

    Returns
    -------
    Of the shape and dtype of `x`: a Tensor where `x` is one. Fewer than two slots have the variance 0.

    Raises
    ------
    As :func:`masked_mean`.
    """
    x, eps = floats("masked_whiten", x=x), as_number(eps, "masked_whiten", "eps")
    mask = read_mask("masked_whiten", mask, x, "x")
    mean = masked_mean(x, mask)
    centred = keep(keep(x, mask) - mean, mask)
    squares = ar.sum(centred * centred)
    white = centred / ar.sqrt(squares / max(int(mask.sum()) - int(unbiased), 1) + eps)
    return white if shift_mean else keep(white + mean, mask)


def explained_variance(values, returns, mask):
    """``1 - var(returns - values) / var(returns)`` over the slots where `mask`, as a float.

    1 is a perfect value function, 0 one that knows the mean alone; 0 too where the returns do not vary.

    Parameters
    ----------
    values, returns : array_like or Tensor, float32 or float64, one shape
    mask : array_like of bool, the same shape

    Raises
    ------
    As :func:`masked_mean`.
    """
    values, returns = floats("explained_variance", values=values, returns=returns)
    same_shape("explained_variance", values=values, returns=returns)
    mask = read_mask("explained_variance", mask, values, "values")
    returns = constant(returns)[mask].astype(np.float64)
    if not returns.size or (total := returns.var()) == 0:
        return 0.0
    return float(1 - (returns - constant(values)[mask]).var() / total)
