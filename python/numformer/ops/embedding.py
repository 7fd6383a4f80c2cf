"""Rows of a table by their numbers."""
from numpy import ndarray

from numformer import _core
from numformer.ops.arguments import as_array
from numformer.tensor import apply

__all__ = ["embedding", "embedding_backward", "embedding_forward"]


def embedding_forward(ids, weight):
    """Return ``(y, saved)``; `saved` is what :func:`embedding_backward` needs."""
    if type(ids) is not ndarray:
        ids = as_array(ids, "embedding", "ids")
    if type(weight) is not ndarray:
        weight = as_array(weight, "embedding", "weight")
    return _core.embedding(ids, weight), (ids, len(weight))


def embedding_backward(dy, saved):
    """Return the gradients of, None, `ids` and of `weight`."""
    ids, rows = saved
    return None, _core.embedding_backward(dy, ids, rows)


def embedding(ids, weight):
    """Return ``weight[ids]``, with every id checked.

    The gradient of `weight` is dense; where an id comes more than once, its terms are added in ascending order of
    their place in `ids`, whatever the threads.

    Parameters
    ----------
    ids : array_like of integers, any shape
    weight : array_like or Tensor, float32 or float64, shape (V, D)

    Returns
    -------
    ndarray, or Tensor where `weight` is one, of shape ids.shape + (D,)

    Raises
    ------
    TypeError
        If `ids` is not of integers, or `weight` not float32 or float64.
    ValueError
        If an id is not within 0 .. V-1 (the first is named), or `weight` has not two axes.
    """
    return apply(embedding_forward, embedding_backward, ids, weight)
