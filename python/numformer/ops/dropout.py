"""Dropout (Srivastava et al. 2014, JMLR 15) by counter-based random numbers (Salmon et al. 2011, Philox 4x32-10)."""
from numformer import _core
from numformer.ops.arguments import as_floats, as_number
from numformer.tensor import apply, draw_key

__all__ = ["dropout", "dropout_backward", "dropout_forward"]


def dropout_forward(x, p, rng):
    """Return ``(y, saved)``; `saved` is what :func:`dropout_backward` needs: the key that makes the mask again."""
    x, p = as_floats(x, "dropout", "x"), as_number(p, "dropout", "p")
    if p == 0:
        return x, None
    key = draw_key("dropout", "p", rng)
    return _core.dropout(x, p, key), (p, key)


def dropout_backward(dy, saved):
    """Return the gradient with respect to `x`, in a tuple."""
    return (dy if saved is None else _core.dropout(dy, *saved),)


def dropout(x, p, rng):
    """Set elements to 0 with probability `p`, and divide the others by ``1 - p``.

    Which elements, is a function of one 64-bit key drawn from `rng` and the element's index in C order: the same on
    any number of threads and for float32 and float64. The backward makes the mask again; none is stored. A dropped
    NaN or inf is 0.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape
        Copied where it is not C-contiguous.
    p : float
        Between 0 and 1. Where it is 0 the result is `x` itself, and nothing is drawn.
    rng : numpy.random.Generator
        May be None where `p` is 0.

    Returns
    -------
    ndarray, or Tensor where `x` is one, of the shape and dtype of `x`

    Raises
    ------
    ValueError
        If `p` is not between 0 and 1.
    TypeError
        If `x` is not float32 or float64, `p` no number, or there is no `rng`.
    """
    return apply(dropout_forward, dropout_backward, x, p=p, rng=rng)
