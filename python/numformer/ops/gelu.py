"""GeLU, the Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
from numformer import _core
from numformer.ops.arguments import as_floats, as_gradient, check_apart, check_out, choose
from numformer.tensor import Tensor, apply

__all__ = ["bias_gelu", "bias_gelu_backward", "bias_gelu_forward", "gelu", "gelu_backward", "gelu_forward"]

_FORWARD = {"none": _core.gelu_erf, "tanh": _core.gelu_tanh, "quick": _core.gelu_quick}
_BACKWARD = {"none": _core.gelu_erf_backward, "tanh": _core.gelu_tanh_backward, "quick": _core.gelu_quick_backward}
_BIAS_FORMS = {"none": 0, "tanh": 1, "quick": 2}    # of _core.bias_gelu


def gelu_forward(x, approximate="none", *, out=None):
    """Return ``(y, saved)``; `saved` is what :func:`gelu_backward` needs."""
    x = as_floats(x, "gelu", "x")
    kernel = choose(_FORWARD, approximate, "gelu", "approximate")
    check_out(out, x, "gelu")
    return _core.pooled(kernel, x, out=out), (x, approximate)


def gelu_backward(dy, saved):
    """Return the gradient with respect to `x`, in a tuple."""
    x, approximate = saved
    return (_core.pooled(_BACKWARD[approximate], x, as_gradient(dy, x.shape, x.dtype, "gelu_backward")),)


def gelu(x, approximate="none", *, out=None):
    """Apply GeLU to every element.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape
    approximate : {"none", "tanh", "quick"}
        "none": ``x Phi(x)``, Phi the normal distribution function (torch's default). "tanh":
        ``x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))``, which is the tanh form of the paper (GPT-2). "quick":
        ``x / (1 + exp(-1.702 x))`` (CLIP). float32: each to 2 ULP on the whole line, the negative tail included;
        float64: to 1e-11.
    out : ndarray, optional
        Where to write the result; may be `x` itself, unless `x` is a Tensor.

    Returns
    -------
    ndarray, or Tensor where `x` is one, of the shape and dtype of `x`

    Raises
    ------
    ValueError
        If `approximate` is not one of the names above, or `out` not of the shape of `x`, not writeable or part of a
        Tensor `x`.
    TypeError
        If `x` is not float32 or float64, or `out` no array of its dtype.
    """
    if out is not None and type(x) is Tensor:
        check_apart(out, x.data, "gelu")
    return apply(gelu_forward, gelu_backward, x, approximate=approximate, out=out)


def bias_gelu_forward(x, bias, approximate="none"):
    """Return ``(y, saved)``; `saved` is what :func:`bias_gelu_backward` needs."""
    x, bias = as_floats(x, "bias_gelu", "x"), as_floats(bias, "bias_gelu", "bias")
    form = choose(_BIAS_FORMS, approximate, "bias_gelu", "approximate")
    return _core.bias_gelu(form, x, bias), (form, x, bias)


def bias_gelu_backward(dy, saved):
    """Return the gradients with respect to `x` and `bias`."""
    return _core.bias_gelu_backward(*saved, dy)


def bias_gelu(x, bias, approximate="none"):
    """Compute ``gelu(x + bias, approximate)`` in one pass over memory.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, shape (..., N)
    bias : array_like or Tensor, shape (N,), of the dtype of `x`
        Its gradient is summed over all rows in one order, whatever the number of threads.
    approximate : {"none", "tanh", "quick"}
        As for :func:`gelu`.

    Returns
    -------
    ndarray, or Tensor where one came in, of the shape and dtype of `x`

    Raises
    ------
    ValueError
        If `bias` is not of shape (N,), or `approximate` is not one of the names above.
    TypeError
        If a dtype is not float32 or float64, or they differ.
    """
    return apply(bias_gelu_forward, bias_gelu_backward, x, bias, approximate=approximate)
