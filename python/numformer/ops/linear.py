"""Products with a weight (N, K), as torch keeps it: one, or one for each group of rows."""
import itertools

import numpy as np

from numformer import _core
from numformer._core import pooled
from numformer.ops.arguments import PLAIN, as_array, as_arrays, as_floats, as_gradient, as_rows, choose
from numformer.tensor import Tensor, apply, is_recording, unrecorded

__all__ = ["grouped_linear", "grouped_linear_backward", "grouped_linear_forward", "linear", "linear_backward",
           "linear_forward"]

# the number of an activation in the kernels, and its backward (x, dy) -> dx
_ACTIVATIONS = {None: (0, None), "relu": (1, _core.relu_backward), "silu": (2, _core.silu_backward),
                "gelu": (3, _core.gelu_erf_backward), "gelu_tanh": (4, _core.gelu_tanh_backward),
                "gelu_quick": (5, _core.gelu_quick_backward)}


def _number(activation):
    return choose(_ACTIVATIONS, activation, "linear", "activation")[0]


def _wanted(tensors):
    """Whether each of them needs a gradient."""
    return tuple([type(x) is Tensor and x.requires_grad for x in tensors])


def linear_forward(x, weight, bias=None, residual=None, *, activation=None, out=None, wanted=(True, True)):
    """Return ``(y, saved)``; `saved` is what :func:`linear_backward` needs.

    `wanted`: whether the gradients of x and of weight will be asked for.
    """
    x, weight, bias, residual = as_arrays("linear", x=x, weight=weight, bias=bias, residual=residual)
    y = _core.linear(x, weight, bias, residual, _number(activation), out, activation is not None)
    y, pre = y if activation is not None else (y, None)
    return y, (x, weight, bias is not None, residual is not None, activation, pre, wanted)


def linear_backward(dy, saved):
    """Return the gradients of x, weight, bias and residual: None where there is none."""
    x, weight, bias, residual, activation, pre, (x_wanted, weight_wanted) = saved
    dy = as_gradient(dy, (*x.shape[:-1], len(weight)), x.dtype, "linear_backward")
    dz = dy if activation is None else pooled(_ACTIVATIONS[activation][1], pre, dy)
    rows = as_rows(dz)
    dx = _core.product(rows, weight, None, False).reshape(x.shape) if x_wanted else None
    dweight = _core.product(rows.T, as_rows(x), None, False) if weight_wanted else None
    return dx, dweight, _core.sum_rows(rows) if bias else None, dy if residual else None


def linear(x, weight, bias=None, *, activation=None, residual=None, out=None):
    """Compute ``activation(x @ weight.T + bias) + residual`` in one pass.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, shape (..., K)
    weight : array_like or Tensor, shape (N, K), of the same dtype, as are all that follow
        Read by its strides: a transposed (K, N) array costs no copy.
    bias : array_like or Tensor, shape (N,), optional
    activation : {None, "relu", "silu", "gelu", "gelu_tanh", "gelu_quick"}
        The forms of GeLU as in :func:`numformer.gelu`.
    residual : array_like or Tensor, shape (..., N), optional
        Added last.
    out : ndarray, shape (..., N), optional
        Where to write the result: C-contiguous, sharing no memory with the others.

    Returns
    -------
    ndarray, or Tensor where one came in, of shape (..., N)
        An element's bits depend on its row of `x` and its row of `weight` alone: not on the other rows, nor on the
        number of threads, nor on the strides.

    Raises
    ------
    TypeError
        If a dtype is not float32 or float64, or they differ.
    ValueError
        If shapes do not fit, `activation` is not one of the names above, or `out` is not as above.

    Notes
    -----
    M N K multiply-adds; the gradients of `x` and of `weight` take as many each. The sum over K goes in blocks of at
    most 384, or 256 below AVX-512, in ascending order: error at most (384 + K / 256) eps times the sum of |x| |weight|.
    """
    if type(x) is np.ndarray and type(weight) is np.ndarray and type(bias) in PLAIN and type(residual) in PLAIN:
        return _core.linear(x, weight, bias, residual, _number(activation), out, False)
    inputs = x, weight, bias, residual
    if not is_recording() and Tensor in map(type, inputs):
        x, weight, bias, residual = (t.data if type(t) is Tensor else t for t in inputs)
        x, weight, bias, residual = as_arrays("linear", x=x, weight=weight, bias=bias, residual=residual)
        return unrecorded(_core.linear(x, weight, bias, residual, _number(activation), out, False), inputs)
    return apply(linear_forward, linear_backward, x, weight, bias, residual, activation=activation, out=out,
                 wanted=_wanted((x, weight)))


def grouped_linear_forward(x, weight, offsets, bias=None):
    """Return ``(y, saved)``; `saved` is what :func:`grouped_linear_backward` needs."""
    x, weight = as_floats(x, "grouped_linear", "x"), as_floats(weight, "grouped_linear", "weight")
    offsets, bias = as_array(offsets, "grouped_linear", "offsets"), *as_arrays("grouped_linear", bias=bias)
    offsets = np.ascontiguousarray(offsets, np.int64 if offsets.dtype.kind in "iu" else None)
    return _core.grouped_linear(x, weight, offsets, bias, False), (x, weight, offsets, bias is not None)


def grouped_linear_backward(dy, saved):
    """Return the gradients of x and weight, None for offsets, and that of bias (None where there is none)."""
    x, weight, offsets, bias = saved
    dy = as_gradient(dy, (len(x), weight.shape[1]), x.dtype, "grouped_linear_backward")
    dbias = None
    if bias:
        dbias = np.stack([_core.sum_rows(dy[i:j]) for i, j in itertools.pairwise(offsets)]) if len(weight) else \
            np.zeros(weight.shape[:2], weight.dtype)
    return _core.grouped_linear(dy, weight, offsets, None, True), _core.grouped_outer(dy, x, offsets), None, dbias


def grouped_linear(x, weight, offsets, bias=None):
    """Compute ``x[i] @ weight[e].T + bias[e]`` for every row i, e being its group, in one parallel region.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, shape (T, K)
        Sorted by group: rows ``offsets[e]:offsets[e + 1]`` belong to group e.
    weight : array_like or Tensor, shape (E, N, K), of the same dtype
    offsets : array_like of integers, shape (E + 1,)
        Ascends from 0 to T; a group may be empty.
    bias : array_like or Tensor, shape (E, N), optional

    Returns
    -------
    ndarray, or Tensor where one came in, of shape (T, N)
        Every row has the bits of :func:`linear` with its group's weight.

    Raises
    ------
    TypeError
        If a dtype is not as above.
    ValueError
        If shapes do not fit, or `offsets` does not ascend from 0 to T.
    """
    return apply(grouped_linear_forward, grouped_linear_backward, x, weight, offsets, bias)
