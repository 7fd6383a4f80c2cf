"""The operators of a Tensor: NumPy's arithmetic, reductions and indexing with their gradients.

Every function takes arrays or Tensors and follows NumPy's broadcasting; a gradient is summed back over what was
broadcast. A Python or NumPy number takes the dtype of the tensor beside it, and so does an array of integers or
booleans, so float32 stays float32; float arrays of two dtypes are an error. What is selected by a mask (`where`,
`maximum`, `clip`, indexing) gets a gradient by selection, never by multiplication with 0: NaN in a slot that was not
selected goes nowhere.
"""
import itertools
import math
import numbers

import numpy as np

from numformer import _core
from numformer._core import pooled
from numformer.ops.arguments import FLOATS, as_rows
from numformer.tensor import Tensor, apply, is_float

__all__ = ["absolute", "add", "amax", "astype", "clip", "concatenate", "divide", "exp", "getitem", "log", "log_sigmoid",
           "matmul", "maximum", "mean", "minimum", "multiply", "negative", "power", "reshape", "sigmoid", "sqrt",
           "squeeze", "stack", "subtract", "sum", "swapaxes", "take_along_axis", "tanh", "transpose", "unsqueeze",
           "where"]


def _unbroadcast(gradient, shape):
    """Sum `gradient` over the axes along which an array of `shape` was broadcast."""
    if gradient.shape == shape:
        return gradient
    lead = gradient.ndim - len(shape)
    size = math.prod(shape)
    if size > 1 and gradient.shape[lead:] == shape and gradient.dtype in FLOATS:
        # NumPy adds one row after the other, and errs by as many roundings
        return _core.sum_rows(gradient.reshape(math.prod(gradient.shape[:lead]), size)).reshape(shape)
    axes = tuple(range(lead)) + tuple(i + lead for i, n in enumerate(shape) if n == 1 != gradient.shape[i + lead])
    return _added(gradient, axes, True).reshape(shape)


def _wide(dtype):
    """What numbers of `dtype` are added up in: float32 for those of 16 bits, or 256 ones and one are 256."""
    return np.dtype(np.float32) if dtype.itemsize == 2 and is_float(dtype) else dtype


def _added(x, axis, keepdims):
    if (wide := _wide(x.dtype)) is x.dtype:
        return x.sum(axis=axis, keepdims=keepdims)
    return x.sum(axis=axis, keepdims=keepdims, dtype=wide).astype(x.dtype)


def _operands(op, a, b):
    """`a` and `b` in one float dtype; numbers and integer arrays take that of the other."""
    if type(a) is Tensor:
        dtype = a.data.dtype
        if type(b) is Tensor and b.data.dtype is dtype and dtype.kind == "f":
            return a, b
        if type(b) in (int, float) and dtype.kind == "f":
            return a, np.array(b, dtype)
    dtype_a, dtype_b = _float_dtype(a), _float_dtype(b)
    if dtype_a is None and dtype_b is None:
        return _plain(a), _plain(b)
    if dtype_a is None:
        return _cast(op, a, dtype_b), b
    if dtype_b is None:
        return a, _cast(op, b, dtype_a)
    if dtype_a != dtype_b:
        raise TypeError(f"{op}: operands must have the same dtype, got {dtype_a} and {dtype_b}; convert with .astype")
    return a, b


def _cast(op, x, dtype):
    """A real number, or an array of integers or booleans, in a float dtype."""
    if type(x) not in (float, int) and not isinstance(x, numbers.Real):     # which takes its time
        x = np.asarray(_plain(x))
        if x.dtype.kind not in "biuf":
            raise TypeError(f"{op}: operands must be real numbers or arrays of them, got {x.dtype}")
    return np.asarray(x, dtype)


def _plain(x):
    return x if type(x) in (np.ndarray, Tensor) else np.asarray(x)


def _float_dtype(x):
    """The dtype that an operand insists on: None for numbers and for arrays of integers or booleans."""
    if type(x) is Tensor or type(x) is np.ndarray:
        return x.dtype if is_float(x.dtype) else None
    if type(x) in (float, int) or isinstance(x, numbers.Number) or isinstance(x, np.generic):
        return None
    x = np.asarray(x)
    return x.dtype if is_float(x.dtype) else None


def _binary(name, forward, backward):
    def op(a, b):
        return apply(forward, backward, *_operands(name, a, b))
    op.__name__ = name
    return op


def _add_forward(a, b):
    return a + b, (a.shape, b.shape)


def _add_backward(dy, saved):
    return _unbroadcast(dy, saved[0]), _unbroadcast(dy, saved[1])


def _subtract_forward(a, b):
    return a - b, (a.shape, b.shape)


def _subtract_backward(dy, saved):
    return _unbroadcast(dy, saved[0]), _unbroadcast(-dy, saved[1])


def _multiply_forward(a, b):
    return a * b, (a, b)


def _multiply_backward(dy, saved):
    a, b = saved
    return _unbroadcast(dy * b, a.shape), _unbroadcast(dy * a, b.shape)


def _divide_forward(a, b):
    y = a / b
    return y, (a.shape, b, y)


def _divide_backward(dy, saved):
    shape, b, y = saved
    da = dy / b
    return _unbroadcast(da, shape), _unbroadcast(-da * y, b.shape)


def _maximum_forward(a, b):
    return np.maximum(a, b), (a, b)


def _maximum_backward(dy, saved):
    a, b = saved
    return _split(dy, a > b, a, b)


def _minimum_forward(a, b):
    return np.minimum(a, b), (a, b)


def _minimum_backward(dy, saved):
    a, b = saved
    return _split(dy, a < b, a, b)


def _split(dy, first, a, b):
    """`dy` to `a` where `first`, half to each where they are equal (as torch), else to `b`."""
    dy, equal, zero = np.broadcast_to(dy, first.shape), a == b, dy.dtype.type(0)
    half = dy * dy.dtype.type(0.5)
    da = np.where(equal, half, np.where(first, dy, zero))
    db = np.where(equal, half, np.where(first, zero, dy))
    return _unbroadcast(da, a.shape), _unbroadcast(db, b.shape)


add = _binary("add", _add_forward, _add_backward)
subtract = _binary("subtract", _subtract_forward, _subtract_backward)
multiply = _binary("multiply", _multiply_forward, _multiply_backward)
divide = _binary("divide", _divide_forward, _divide_backward)
maximum = _binary("maximum", _maximum_forward, _maximum_backward)
minimum = _binary("minimum", _minimum_forward, _minimum_backward)


def where(condition, a, b):
    """`a` where `condition` (an array), else `b`: the gradient goes by selection."""
    a, b = _operands("where", a, b)
    condition = np.asarray(condition.data if type(condition) is Tensor else condition, bool)
    return apply(_where_forward, _where_backward, condition, a, b)


def _where_forward(condition, a, b):
    return np.where(condition, a, b), (condition, np.shape(a), np.shape(b))


def _where_backward(dy, saved):
    condition, shape_a, shape_b = saved
    zero = dy.dtype.type(0)
    da, db = np.where(condition, dy, zero), np.where(condition, zero, dy)
    return None, _unbroadcast(da, shape_a), _unbroadcast(db, shape_b)


# One array


def _unary(name, forward, backward, text):
    def op(x):
        return apply(forward, backward, x)
    op.__name__, op.__doc__ = name, text
    return op


def _stable_sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _log_sigmoid_forward(x):
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), x


def _from_y(f):
    def forward(x):
        y = f(x)
        return y, y
    return forward


def _from_x(f):
    return lambda x: (f(x), x)


negative = _unary("negative", _from_x(np.negative), lambda dy, x: (-dy,), "-x")
absolute = _unary("absolute", _from_x(np.abs), lambda dy, x: (dy * np.sign(x),), "|x|; its gradient at 0 is 0.")
exp = _unary("exp", _from_y(np.exp), lambda dy, y: (dy * y,), "e to the power of x.")
log = _unary("log", _from_x(np.log), lambda dy, x: (dy / x,), "The natural logarithm.")
sqrt = _unary("sqrt", _from_y(np.sqrt), lambda dy, y: (dy / (2 * y),), "The square root.")
tanh = _unary("tanh", _from_y(np.tanh), lambda dy, y: (dy * (1 - y * y),), "The hyperbolic tangent.")
sigmoid = _unary("sigmoid", _from_y(_stable_sigmoid), lambda dy, y: (dy * y * (1 - y),),
                 "1 / (1 + exp(-x)), for any x without overflow.")
log_sigmoid = _unary("log_sigmoid", _log_sigmoid_forward, lambda dy, x: (dy * _stable_sigmoid(-x),),
                     "log(1 / (1 + exp(-x))), for any x without overflow.")


def power(x, exponent):
    """`x` to the power of a number, or of an array that needs no gradient."""
    if type(exponent) is Tensor:
        if exponent.requires_grad:
            raise TypeError("**: the exponent must be a number or an array, not a Tensor that requires a gradient; "
                            "use exp(b * log(a))")
        exponent = exponent.data
    number = isinstance(exponent, numbers.Number) and not isinstance(exponent, np.generic)
    if not number or x.dtype.name == "bfloat16":        # to the power of a number that is float32
        exponent = np.asarray(exponent, _float_dtype(x))
    return apply(_power_forward, _power_backward, x, exponent)


def _power_forward(x, exponent):
    return x**exponent, (x, exponent)


def _power_backward(dy, saved):
    x, exponent = saved
    # everything to the power of 0 is 1 and has the gradient 0, which 0 * 0**-1 is not
    if type(exponent) is np.ndarray:
        down = np.where(exponent == 0, x.dtype.type(0), exponent - 1)
    else:
        down = exponent - 1 if exponent else 0
    return _unbroadcast(dy * (exponent * x**down), x.shape), None


def clip(x, low=None, high=None):
    """`x` held between two constants, numbers or arrays (None: no bound); the gradient is 0 where it was held."""
    if any(type(v) is Tensor and v.requires_grad for v in (low, high)):
        raise TypeError("clip: the bounds must be numbers or arrays, not Tensors that require a gradient; "
                        "use minimum and maximum")
    x = _plain(x)
    dtype = _float_dtype(x)
    low, high = ((None if v is None else np.asarray(v.data if type(v) is Tensor else v, dtype)) for v in (low, high))
    return apply(_clip_forward, _clip_backward, x, low=low, high=high)


def _clip_forward(x, low, high):
    y = np.clip(x, low, high)
    if is_float(x.dtype):
        y = y.astype(x.dtype, copy=False)       # of bfloat16 it is float32
    return y, (y == x, x.shape)


def _clip_backward(dy, saved):
    inside, shape = saved
    return (_unbroadcast(np.where(inside, dy, dy.dtype.type(0)), shape),)


# Reductions


def sum(x, axis=None, keepdims=False):
    """The sum over `axis` (an int, a tuple, None for all)."""
    return apply(_sum_forward, _sum_backward, x, axis=axis, keepdims=keepdims)


def mean(x, axis=None, keepdims=False):
    """The mean over `axis` (an int, a tuple, None for all)."""
    return apply(_mean_forward, _mean_backward, x, axis=axis, keepdims=keepdims)


def amax(x, axis=None, keepdims=False):
    """The maximum over `axis`; elements that share it share its gradient evenly."""
    return apply(_max_forward, _max_backward, x, axis=axis, keepdims=keepdims)


def _spread(dy, shape, axis, keepdims):
    if not keepdims and axis is not None:
        dy = np.expand_dims(dy, axis)
    return np.broadcast_to(dy, shape)


def _sum_forward(x, axis, keepdims):
    return _added(x, axis, keepdims), (x.shape, axis, keepdims)


def _sum_backward(dy, saved):
    return (_spread(dy, *saved),)


def _mean_forward(x, axis, keepdims):
    if (wide := _wide(x.dtype)) is x.dtype:
        y = x.mean(axis=axis, keepdims=keepdims)
    else:
        y = x.mean(axis=axis, keepdims=keepdims, dtype=wide).astype(x.dtype)
    return y, (x.shape, axis, keepdims, x.dtype.type(y.size / max(x.size, 1)))


def _mean_backward(dy, saved):
    shape, axis, keepdims, share = saved
    return (_spread(dy * share, shape, axis, keepdims),)


def _max_forward(x, axis, keepdims):
    y = x.max(axis=axis, keepdims=keepdims)
    return y, (x, y, axis, keepdims)


def _max_backward(dy, saved):
    x, y, axis, keepdims = saved
    at = x == _spread(y, x.shape, axis, keepdims)
    count = np.asarray(at.sum(axis=axis, keepdims=keepdims), x.dtype)
    share = _spread(dy / count, x.shape, axis, keepdims)
    return (np.where(at, share, x.dtype.type(0)),)


# Shape and selection


def reshape(x, *shape):
    """`x` with another shape, as ``ndarray.reshape``."""
    if len(shape) == 1 and not isinstance(shape[0], numbers.Integral):
        shape = tuple(shape[0])
    return apply(_reshape_forward, _reshape_backward, x, shape=shape)


def _reshape_forward(x, shape):
    return x.reshape(shape), x.shape


def _reshape_backward(dy, shape):
    return (dy.reshape(shape),)


def transpose(x, *axes):
    """`x` with its axes in another order (reversed where none are given)."""
    if len(axes) == 1 and not isinstance(axes[0], numbers.Integral):
        axes = axes[0]
    return apply(_transpose_forward, _transpose_backward, x, axes=tuple(axes) if axes else None)


def _transpose_forward(x, axes):
    return x.transpose(axes), None if axes is None else np.argsort([a % x.ndim for a in axes])


def _transpose_backward(dy, axes):
    return (dy.transpose(axes),)


def swapaxes(x, a, b):
    """`x` with axes `a` and `b` exchanged."""
    return apply(_swapaxes_forward, _swapaxes_backward, x, a=a, b=b)


def _swapaxes_forward(x, a, b):
    return x.swapaxes(a, b), (a, b)


def _swapaxes_backward(dy, axes):
    return (dy.swapaxes(*axes),)


def squeeze(x, axis=None):
    """`x` without the axes of length 1 (or without `axis`)."""
    return reshape(x, np.squeeze(np.broadcast_to(False, x.shape), axis).shape)


def unsqueeze(x, axis):
    """`x` with a new axis of length 1 at `axis` (an int or a tuple)."""
    return reshape(x, np.expand_dims(np.broadcast_to(False, x.shape), axis).shape)


def astype(x, dtype):
    """`x` in another float dtype."""
    dtype = np.dtype(dtype)
    if not is_float(dtype):
        raise TypeError(f"astype: only floats have gradients, got {dtype}; convert .numpy() instead")
    return apply(_astype_forward, _astype_backward, x, dtype=dtype)


def _astype_forward(x, dtype):
    return x.astype(dtype), x.dtype


def _astype_backward(dy, dtype):
    return (dy.astype(dtype),)


def getitem(x, index):
    """``x[index]``: slices, integers, arrays of integers or booleans; what was taken twice gets both gradients."""
    if type(index) is tuple:
        index = tuple(i.data if type(i) is Tensor else i for i in index)
    elif type(index) is Tensor:
        index = index.data
    return apply(_getitem_forward, _getitem_backward, x, index=index)


def _getitem_forward(x, index):
    return x[index], (x.shape, index)


def _getitem_backward(dy, saved):
    shape, index = saved
    parts = index if type(index) is tuple else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, (slice, numbers.Integral)) for i in parts):
        return (_added_at(shape, index, dy),)
    dx = pooled(np.zeros, shape, dy.dtype)
    dx[index] = dy
    return (dx,)


def _added_at(shape, index, dy):
    """Zeros of `shape`, to which `dy` is added at `index`, where an element may come more than once."""
    wide = _wide(dy.dtype)
    dx = pooled(np.zeros, shape, wide)
    np.add.at(dx, index, dy.astype(wide, copy=False))
    return dx.astype(dy.dtype, copy=False)


def take_along_axis(x, indices, axis=-1):
    """The elements that `indices` (an array of integers) names along `axis`, as ``numpy.take_along_axis``."""
    indices = np.asarray(indices.data if type(indices) is Tensor else indices)
    if axis is None:
        x, axis = reshape(_plain(x), -1), 0
    return apply(_take_forward, _take_backward, _plain(x), indices=indices, axis=axis)


def _take_forward(x, indices, axis):
    return np.take_along_axis(x, indices, axis), (x.shape, indices, axis)


def _take_backward(dy, saved):
    shape, indices, axis = saved
    grid = list(np.ogrid[tuple(slice(n) for n in dy.shape)])
    grid = [at if n > 1 else np.zeros_like(at) for at, n in zip(grid, shape)]       # what was broadcast
    grid[axis] = indices
    if dy.shape[axis] != 1 or dy.size * shape[axis] != math.prod(shape):
        return (_added_at(shape, tuple(grid), dy),)
    dx = pooled(np.zeros, shape, dy.dtype)
    dx[tuple(grid)] = dy            # no element twice
    return (dx,)


def concatenate(arrays, axis=0):
    """The arrays one after another along `axis`, as ``numpy.concatenate``."""
    return apply(_concatenate_forward, _concatenate_backward, *_one_dtype("concatenate", arrays), axis=axis)


def stack(arrays, axis=0):
    """The arrays side by side along a new `axis`, as ``numpy.stack``."""
    return apply(_stack_forward, _stack_backward, *_one_dtype("stack", arrays), axis=axis)


def _one_dtype(op, arrays):
    arrays = [_plain(x) for x in arrays]
    if len({x.dtype for x in arrays}) > 1:
        raise TypeError(f"{op}: all arrays must have the same dtype, got {', '.join(str(x.dtype) for x in arrays)}")
    return arrays


def _concatenate_forward(*arrays, axis):
    return np.concatenate(arrays, axis), (np.cumsum([x.shape[axis] for x in arrays])[:-1], axis)


def _concatenate_backward(dy, saved):
    return np.split(dy, *saved)


def _stack_forward(*arrays, axis):
    return np.stack(arrays, axis), axis


def _stack_backward(dy, axis):
    return list(np.moveaxis(dy, axis, 0))


def _compare(ufunc):
    def compare(a, b):
        return ufunc(a.data, b.data if type(b) is Tensor else b)
    return compare


def _flip(op):
    return lambda self, other: op(other, self)


def matmul(a, b):
    """The product of matrices, as ``numpy.matmul``: leading axes broadcast, an array of one axis is a vector."""
    a, b = _operands("matmul", a, b)
    if a.dtype not in FLOATS:
        raise TypeError(f"matmul: operands must be float32 or float64, got {a.dtype}; convert with .astype(np.float32)")
    fits = a.ndim and b.ndim and a.shape[-1] == b.shape[-min(b.ndim, 2)]
    axes = itertools.zip_longest(a.shape[-3::-1], b.shape[-3::-1], fillvalue=1)
    if not fits or any(len({1, *pair}) > 2 for pair in axes):
        raise ValueError("matmul: the last axis of a must be as long as the last but one of b, and the axes before "
                         f"them must broadcast, got shapes {a.shape} and {b.shape}")
    wanted = [type(x) is Tensor and x.requires_grad for x in (a, b)]
    return apply(_matmul_forward, _matmul_backward, a, b, wanted=wanted)


def _matmul_forward(a, b, wanted):
    matrices = a[None] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b
    axes = (-2,) * (a.ndim == 1) + (-1,) * (b.ndim == 1)
    return _products(*matrices).squeeze(axes), (*matrices, axes, a.shape, b.shape, wanted)


def _matmul_backward(dy, saved):
    a, b, axes, a_shape, b_shape, (a_wanted, b_wanted) = saved
    dy, da, db = np.expand_dims(dy, axes), None, None
    if a_wanted:
        da = _unbroadcast(_products(dy, b.swapaxes(-1, -2)), a.shape).reshape(a_shape)
    if b_wanted and b.ndim == 2:
        db = _core.product(as_rows(a).T, as_rows(dy), None, False).reshape(b_shape)
    elif b_wanted:
        db = _unbroadcast(_products(a.swapaxes(-1, -2), dy), b.shape).reshape(b_shape)
    return da, db


def _products(a, b):
    """a @ b of matrices by numformer's own kernels."""
    if b.ndim == 2:
        return _core.product(as_rows(a), b, None, False).reshape(*a.shape[:-1], b.shape[1])
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = np.broadcast_to(a, lead + a.shape[-2:]), np.broadcast_to(b, lead + b.shape[-2:])
    y = np.empty((*lead, a.shape[-2], b.shape[-1]), a.dtype)
    for i in np.ndindex(lead):
        _core.product(a[i], b[i], y[i], False)
    return y


Tensor.__matmul__, Tensor.__rmatmul__ = matmul, _flip(matmul)
Tensor.__add__ = Tensor.__radd__ = add
Tensor.__mul__ = Tensor.__rmul__ = multiply
Tensor.__sub__, Tensor.__rsub__ = subtract, _flip(subtract)
Tensor.__truediv__, Tensor.__rtruediv__ = divide, _flip(divide)
Tensor.__pow__ = power
Tensor.__neg__ = negative
Tensor.__abs__ = absolute
Tensor.__getitem__ = getitem
Tensor.__lt__, Tensor.__le__ = _compare(np.less), _compare(np.less_equal)
Tensor.__gt__, Tensor.__ge__ = _compare(np.greater), _compare(np.greater_equal)
Tensor.__eq__, Tensor.__ne__ = _compare(np.equal), _compare(np.not_equal)
Tensor.__hash__ = object.__hash__
for _op in (exp, log, sqrt, tanh, sigmoid, log_sigmoid, clip, sum, mean, reshape, transpose, swapaxes, squeeze,
            unsqueeze, astype, take_along_axis):
    setattr(Tensor, _op.__name__, _op)
Tensor.max, Tensor.abs = amax, absolute
Tensor.T = property(transpose)
