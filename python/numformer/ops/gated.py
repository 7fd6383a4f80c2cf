"""SiLU and the gated units: SwiGLU and GEGLU (Shazeer 2020, arXiv:2002.05202)."""
from numformer import _core
from numformer.ops.arguments import as_floats, as_gradient, check_apart, check_out, choose
from numformer.tensor import Tensor, apply

__all__ = ["geglu", "geglu_backward", "geglu_forward", "silu", "silu_backward", "silu_forward", "swiglu",
           "swiglu_backward", "swiglu_forward", "swiglu_halves", "swiglu_halves_backward", "swiglu_halves_forward"]

_FORMS = {"none": 1, "tanh": 2, "quick": 3}     # of _core.gated; 0 is SwiGLU


def silu_forward(x, *, out=None):
    """Return ``(y, saved)``; `saved` is what :func:`silu_backward` needs."""
    x = as_floats(x, "silu", "x")
    check_out(out, x, "silu")
    return _core.pooled(_core.silu, x, out=out), x


def silu_backward(dy, saved):
    """Return the gradient with respect to `x`, in a tuple."""
    return (_core.pooled(_core.silu_backward, saved, as_gradient(dy, saved.shape, saved.dtype, "silu_backward")),)


def silu(x, *, out=None):
    """Apply SiLU, ``x / (1 + exp(-x))`` (Elfwing et al. 2017, arXiv:1702.03118), to every element.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, any shape
    out : ndarray, optional
        Where to write the result; may be `x` itself, unless `x` is a Tensor.

    Returns
    -------
    ndarray, or Tensor where `x` is one, of the shape and dtype of `x`

    Raises
    ------
    TypeError
        If `x` is not float32 or float64, or `out` no array of its dtype.
    ValueError
        If `out` is not of the shape of `x`, not writeable or part of a Tensor `x`.
    """
    if out is not None and type(x) is Tensor:
        check_apart(out, x.data, "silu")
    return apply(silu_forward, silu_backward, x, out=out)


def swiglu_forward(gate, up):
    """Return ``(y, saved)``; `saved` is what :func:`swiglu_backward` needs."""
    gate, up = as_floats(gate, "swiglu", "gate"), as_floats(up, "swiglu", "up")
    return _gated("swiglu", 0, gate, up), (gate, up)


def swiglu_backward(dy, saved):
    """Return the gradients with respect to `gate` and `up`."""
    return _core.gated_backward(0, *saved, dy)


def swiglu(gate, up):
    """Compute ``silu(gate) * up`` in one pass over memory.

    Parameters
    ----------
    gate, up : array_like or Tensor, float32 or float64, of one shape and dtype
        They may be the halves of one array, ``h[..., :I]`` and ``h[..., I:]``: rows of contiguous elements are read
        where they lie. Other strides are copied.

    Returns
    -------
    ndarray, or Tensor where one came in, of the shape and dtype of `gate`

    Raises
    ------
    ValueError
        If the shapes differ.
    TypeError
        If a dtype is not float32 or float64, or they differ.
    """
    return apply(swiglu_forward, swiglu_backward, gate, up)


def swiglu_halves_forward(h):
    """Return ``(y, saved)``; `saved` is what :func:`swiglu_halves_backward` needs."""
    h = as_floats(h, "swiglu_halves", "h")
    return _core.gated_halves(0, h), h


def swiglu_halves_backward(dy, saved):
    """Return the gradient with respect to `h`, in a tuple."""
    return (_core.gated_halves_backward(0, saved, dy),)


def swiglu_halves(h):
    """Compute ``silu(gate) * up`` of the halves of the last axis, gate first; the gradient is one array too.

    Parameters
    ----------
    h : array_like or Tensor, float32 or float64, shape (..., 2 * I)

    Returns
    -------
    ndarray, or Tensor where `h` is one, of shape (..., I)

    Raises
    ------
    ValueError
        If the last axis is odd.
    TypeError
        If `h` is not float32 or float64.
    """
    return apply(swiglu_halves_forward, swiglu_halves_backward, h)


def geglu_forward(gate, up, approximate="none"):
    """Return ``(y, saved)``; `saved` is what :func:`geglu_backward` needs."""
    gate, up = as_floats(gate, "geglu", "gate"), as_floats(up, "geglu", "up")
    form = choose(_FORMS, approximate, "geglu", "approximate")
    return _gated("geglu", form, gate, up), (form, gate, up)


def geglu_backward(dy, saved):
    """Return the gradients with respect to `gate` and `up`."""
    return _core.gated_backward(*saved, dy)


def geglu(gate, up, approximate="none"):
    """Compute ``gelu(gate, approximate) * up`` in one pass over memory.

    Parameters
    ----------
    gate, up : array_like or Tensor, float32 or float64, of one shape and dtype
        They may be the halves of one array, as for :func:`swiglu`.
    approximate : {"none", "tanh", "quick"}
        As for :func:`numformer.gelu`.

    Returns
    -------
    ndarray, or Tensor where one came in, of the shape and dtype of `gate`

    Raises
    ------
    ValueError
        If the shapes differ, or `approximate` is not one of the names above.
    TypeError
        If a dtype is not float32 or float64, or they differ.
    """
    return apply(geglu_forward, geglu_backward, gate, up, approximate=approximate)


def _gated(op, form, gate, up):
    if gate.shape != up.shape:
        raise ValueError(f"{op}: gate and up must have one shape, got {gate.shape} and {up.shape}")
    if gate.dtype is not up.dtype and gate.dtype != up.dtype:
        raise TypeError(f"{op}: gate and up must have one dtype, got {gate.dtype} and {up.dtype}; convert with .astype")
    return _core.gated(form, gate, up)
