"""What every op does with what it is given."""
import math
import operator
import reprlib

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
PLAIN = (np.ndarray, type(None))        # types of what goes to a kernel as it is


def as_array(x, op, name):
    """`x` as an ndarray without a copy where that is possible: ndarray, ``__array__``, DLPack on the CPU."""
    if type(x) is np.ndarray:
        return x
    if not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        torch = type(x).__module__.partition(".")[0] == "torch"
        hint = "; numformer.torch has the attention of PyTorch's tensors, other ops take x.detach().float()"
        raise TypeError(f"{op}: {name} must be an array, got {type(x).__name__}: {error}{hint * torch}") from None
    if array.dtype == np.object_:
        raise TypeError(f"{op}: {name} must be an array of numbers, got {type(x).__name__}")
    return array


def as_arrays(op, **inputs):
    """Each as :func:`as_array` gives it; what is None stays so."""
    return [None if x is None else as_array(x, op, name) for name, x in inputs.items()]


def as_floats(x, op, name):
    """`x` as a float32 or float64 ndarray. TypeError for any other dtype: nothing is cast behind one's back."""
    x = as_array(x, op, name)
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32 or float64, got {x.dtype}; "
                        f"convert it with .astype(numpy.float32)")
    return x


def as_integer(x, op, name):
    """`x`, an integer of Python or NumPy, as an int. TypeError for anything else, a whole float too."""
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {x!r}") from None


def as_ids(row, op, name):
    """`row`, the ids of tokens, as a list of ints. TypeError for anything else, such as text or floats."""
    try:
        return [operator.index(i) for i in row]
    except TypeError:
        raise TypeError(f"{op}: {name} must be lists of integers, the ids of tokens, got {reprlib.repr(row)}") from None


def check_ids(ids, count, op, name, ignored=None):
    """TypeError or ValueError, for the first, unless all of an array are integers in 0 .. count - 1, or `ignored`."""
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be an array of integers, got {ids.dtype}")
    outside = (ids < 0) | (ids >= count)
    outside = np.flatnonzero(outside if ignored is None else outside & (ids != ignored))
    if outside.size:
        raise ValueError(f"{op}: {name} must be within 0 .. {count - 1}, got {ids.flat[outside[0]]} at position "
                         f"{outside[0]} (counted through the flattened array)")


def need_sizes(layer, **sizes):
    """TypeError or ValueError, by name, unless all are integers of 1 or more."""
    for name, size in sizes.items():
        if as_integer(size, layer, name) < 1:
            raise ValueError(f"{layer}: {name} must be 1 or more, got {size}")


def need_seed(seed, op):
    """TypeError or ValueError unless it is an integer of 0 or more."""
    if as_integer(seed, op, "seed") < 0:
        raise ValueError(f"{op}: seed must be 0 or more, got {seed}")


def as_number(x, op, name):
    """`x`, a real number of any kind, as a float. TypeError for anything else, and for a tensor whose gradient is
    wanted, since what takes a number gives it none."""
    if getattr(x, "requires_grad", False):
        raise TypeError(f"{op}: {name} must be a real number, and has no gradient, got a {type(x).__name__} that "
                        "requires one: .detach() it, or multiply by it outside")
    try:
        return math.fsum((x,))      # float would read text
    except (TypeError, OverflowError):
        raise TypeError(f"{op}: {name} must be a real number, got {x!r}") from None


def as_bool(x, op, name):
    """`x` as a bool. TypeError for an array of several, which has no truth value."""
    try:
        return bool(x)
    except (ValueError, RuntimeError):      # of NumPy and of torch
        raise TypeError(f"{op}: {name} must be True or False, got {type(x).__name__} of shape "
                        f"{tuple(x.shape)}") from None


def need_generator(rng, op, option=None):
    """The bit generator of `rng`. TypeError unless that is a Generator, as `op` needs one (where `option` is not 0)."""
    bits = getattr(rng, "bit_generator", None)
    if bits is None:
        where = f" where {option} is not 0" if option else ""
        raise TypeError(f"{op}: rng must be a numpy.random.Generator{where}, got {type(rng).__name__}; make one with "
                        "numpy.random.default_rng(seed)")
    return bits


def choose(table, option, op, name):
    """What `table` has under `option`, the value of `op`'s option `name`. ValueError for anything that it lacks."""
    try:
        return table[option]
    except (KeyError, TypeError):       # a list has no hash
        names = ["None" if key is None else f'"{key}"' for key in table]
        raise ValueError(f"{op}: {name} must be {', '.join(names[:-1])} or {names[-1]}, got {option!r}") from None


def same_dtype(op, **arrays):
    """TypeError unless all the arrays (None is skipped) have one dtype."""
    dtypes = {name: x.dtype for name, x in arrays.items() if x is not None}
    if len(set(dtypes.values())) > 1:
        came = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: all arrays must have the same dtype, got {came}; convert with .astype")


def as_gradient(dy, shape, dtype, op):
    """`dy`, the gradient of an output of that shape and dtype, as an array; a number where the output has no axis.
    TypeError or ValueError for any other."""
    if type(dy) is not np.ndarray:
        dy = as_array(dy, op, "dy") if shape else np.asarray(as_number(dy, op, "dy"), dtype)
    if dy.dtype != dtype:
        raise TypeError(f"{op}: dy must be {dtype}, got {dy.dtype}; convert it with .astype(numpy.{dtype})")
    if dy.shape != shape:
        raise ValueError(f"{op}: dy must have shape {shape}, got {dy.shape}")
    return dy


def check_out(out, x, op):
    """TypeError or ValueError unless `out`, where one is given, can hold a result of the shape and dtype of `x`."""
    if out is None:
        return
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{op}: out must be an ndarray, got {type(out).__name__}")
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out must be {x.dtype}, got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"{op}: out must have shape {x.shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"{op}: out must be writeable; give a fresh array")


def check_apart(out, x, op):
    """ValueError where `out` is memory of `x`, the values of a Tensor: what is recorded would read them later."""
    if isinstance(out, np.ndarray) and np.shares_memory(out, x):
        raise ValueError(f"{op}: out must not share memory with x where that is a Tensor; give a fresh array")


def as_rows(x):
    """An array of one axis and more as a matrix of its rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])      # -1 is no number where an axis is 0
