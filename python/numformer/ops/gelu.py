"""GeLU, the Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
from numformer import _core
from numformer.ops.arguments import as_floats
from numformer.tensor import apply

__all__ = ["gelu", "gelu_backward", "gelu_forward"]

_FORWARD = {"none": _core.gelu_erf, "tanh": _core.gelu_tanh}
_BACKWARD = {"none": _core.gelu_erf_backward, "tanh": _core.gelu_tanh_backward}


def gelu_forward(x, approximate="none", *, out=None):
    """Return ``(y, saved)``; `saved` is what :func:`gelu_backward` needs."""
    x = as_floats(x, "gelu", "x")
    if approximate not in _FORWARD:
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    return _core.pooled(_FORWARD[approximate], x, out=out), (x, approximate)


def gelu_backward(dy, saved):
    """Return the gradient with respect to `x`, in a tuple."""
    x, approximate = saved
    return (_core.pooled(_BACKWARD[approximate], x, dy),)


def gelu(x, approximate="none", *, out=None):
    """Apply GeLU to every element.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape
    approximate : {"none", "tanh"}
    out : ndarray, optional
        Where to write the result; may be `x` itself, unless `x` is a Tensor.

    Returns
    -------
    ndarray, or Tensor where `x` is one, of the shape and dtype of `x`

    Raises
    ------
    ValueError
        If `approximate` is not one of the names above.
    TypeError
        If `x` is not float32 or float64.
    """
    return apply(gelu_forward, gelu_backward, x, approximate=approximate, out=out)
