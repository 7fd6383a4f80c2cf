"""What a quantized weight is: w = scale (integer - zero), for each group of a row."""
import warnings
from dataclasses import dataclass

import numpy as np

from numformer import _core
from numformer.ops.arguments import as_floats

__all__ = ["Grid", "QuantSpec", "QuantizedWeight", "quantize"]

_SCALES = ("float16", "float32")


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is quantized.

    Parameters
    ----------
    bits : {4, 8}
    group_size : int or None
        Values of a row that share a scale; the last group of a row may be shorter. None: a row is one group.
    symmetric : bool
        True: the integers -8..7 or -127..127, no zero point. False: 0..15 or 0..255 with a zero point in the same
        range.
    scale_dtype : {"float16", "float32"}
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self):
        if not isinstance(self.symmetric, (bool, np.bool_)):
            raise ValueError(f"QuantSpec: symmetric must be True or False, got {self.symmetric!r}")
        if self.bits not in (4, 8):
            raise ValueError(f"QuantSpec: bits must be 4 or 8, got {self.bits!r}")
        size = self.group_size
        if size is not None and (not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1):
            raise ValueError(f"QuantSpec: group_size must be a positive integer or None, got {size!r}")
        if self.scale_dtype not in _SCALES:
            raise ValueError(f'QuantSpec: scale_dtype must be "float16" or "float32", got {self.scale_dtype!r}')
        object.__setattr__(self, "bits", int(self.bits))        # one of NumPy's would overflow in 2**bits
        object.__setattr__(self, "symmetric", bool(self.symmetric))
        object.__setattr__(self, "group_size", None if size is None else int(size))


class QuantizedWeight:
    """A matrix (N, K) of integers of 4 or 8 bits with a scale, and perhaps a zero point, per row and group.

    Made by :func:`quantize`, :func:`rtn`, :func:`gptq` and :meth:`from_arrays`; its arrays are not to be written to.
    On first use :func:`linear` makes a second copy in the layout that the kernels read (`packed`), of about the same
    size; it is never saved.

    Attributes
    ----------
    spec : QuantSpec
    shape : (N, K)
    data : uint8 (N, K), or (N, (K + 1) // 2) for 4 bits: integers plus 128 or 8 where symmetric; the even k low
    scales : (N, groups), float16 or float32
    zeros : uint8 (N, groups), or None where symmetric
    """

    __slots__ = ("spec", "shape", "data", "scales", "zeros", "_packed")

    def __init__(self, spec, shape, data, scales, zeros=None):
        n, k = (int(length) for length in shape)
        wanted = {"data": (data, (n, k if spec.bits == 8 else (k + 1) // 2), "uint8"),
                  "scales": (scales, (n, groups_of(k, spec.group_size)), spec.scale_dtype)}
        if not spec.symmetric:
            wanted["zeros"] = zeros, wanted["scales"][1], "uint8"
        elif zeros is not None:
            raise ValueError("QuantizedWeight: zeros were given, but spec.symmetric is True")
        for name, (array, size, dtype) in wanted.items():
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != size:
                came = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise ValueError(f"QuantizedWeight: {name} must be a {dtype} array of shape {size}, got {came}")
        if not np.isfinite(scales).all():
            raise ValueError("QuantizedWeight: scales must be finite")
        if zeros is not None and spec.bits == 4 and (zeros > 15).any():
            raise ValueError(f"QuantizedWeight: zeros of 4 bits must be 0..15, got {zeros.max()}")
        self.spec, self.shape = spec, (n, k)
        self.data, self.scales = np.ascontiguousarray(data), np.ascontiguousarray(scales)
        self.zeros = None if zeros is None else np.ascontiguousarray(zeros)
        self._packed = None

    @classmethod
    def from_integers(cls, spec, integers, scales, zeros=None):
        """From `integers` (N, K) in the range that :class:`QuantSpec` names."""
        low, high = integer_range(spec)
        if integers.size and (integers.min() < low or integers.max() > high):
            raise ValueError(f"QuantizedWeight: integers must be {low}..{high}, got {integers.min()}.."
                             f"{integers.max()}")
        u = integers.astype(np.uint8)       # wraps, and so does the sum
        if spec.symmetric:
            u += np.uint8(2 ** (spec.bits - 1))
        if spec.bits == 4:
            even, odd = u[:, ::2], u[:, 1::2]
            data = even.copy()
            data[:, :odd.shape[1]] |= odd << 4
        else:
            data = u
        return cls(spec, integers.shape, data, scales, zeros)

    @classmethod
    def from_arrays(cls, arrays, spec):
        """From what :meth:`arrays` gave, a dict of ndarrays, and the `spec`, or its fields as a dict."""
        if isinstance(spec, dict):
            spec = QuantSpec(**spec)
        missing = {"data", "scales", "shape"} - arrays.keys()
        if missing:
            raise ValueError(f"QuantizedWeight: arrays must hold data, scales and shape; {', '.join(sorted(missing))} "
                             f"is missing")
        return cls(spec, np.asarray(arrays["shape"]).tolist(), arrays["data"], arrays["scales"], arrays.get("zeros"))

    def arrays(self):
        """All that a file must hold beside the spec, as ndarrays: data, scales, shape, and zeros where there are any.

        Returns
        -------
        dict of str to ndarray
            Without copies. ``dataclasses.asdict(weight.spec)`` is the spec as JSON takes it.
        """
        arrays = {"data": self.data, "scales": self.scales, "shape": np.array(self.shape, np.int64)}
        return arrays if self.zeros is None else arrays | {"zeros": self.zeros}

    @property
    def integers(self):
        """int8 (N, K) where symmetric, else uint8."""
        n, k = self.shape
        if self.spec.bits == 8:
            u = self.data
        else:
            u = np.empty((n, 2 * self.data.shape[1]), np.uint8)
            np.bitwise_and(self.data, 15, out=u[:, ::2])
            np.right_shift(self.data, 4, out=u[:, 1::2])
            u = u[:, :k]
        if not self.spec.symmetric:
            return u.copy() if u is self.data else u
        return (u - np.uint8(2 ** (self.spec.bits - 1))).view(np.int8)      # wraps, as two's complement does

    def dequantize(self):
        """float32 (N, K): scale times (integer - zero), rounded once."""
        w = self.integers.astype(np.float32)
        size, k = self.spec.group_size or self.shape[1], self.shape[1]
        if self.zeros is not None:
            w -= _spread(self.zeros, size, k)
        w *= _spread(self.scales.astype(np.float32), size, k)
        return w

    def rows(self, numbers):
        """The QuantizedWeight (R, K) of these rows; `numbers` (R,) are integers within 0 .. N-1."""
        zeros = None if self.zeros is None else self.zeros[numbers]
        shape = len(numbers), self.shape[1]
        return QuantizedWeight(self.spec, shape, self.data[numbers], self.scales[numbers], zeros)

    @property
    def nbytes(self):
        """Bytes of the arrays that a file would hold."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def bits_per_weight(self):
        """All of them: 4.125 for 4 bits in groups of 128 with float16 scales."""
        return 8 * self.nbytes / max(self.shape[0] * self.shape[1], 1)

    def packed(self):
        """What the kernels read: opaque, made on first use."""
        if self._packed is None:
            self._packed = _core.quant_pack(self.data, self.scales, self.zeros, self.spec.bits, self.shape[1],
                                            self.spec.group_size or self.shape[1])
        return self._packed

    def __getstate__(self):
        return self.spec, self.shape, self.data, self.scales, self.zeros

    def __setstate__(self, state):
        self.__init__(*state)

    def __repr__(self):
        return f"QuantizedWeight({self.shape}, {self.spec}, {self.bits_per_weight:.4g} bits per weight)"


def groups_of(k, group_size):
    """How many groups a row of k values has."""
    return 1 if group_size is None else -(-k // group_size)


def integer_range(spec):
    """(least, greatest) integer. 8 symmetric bits leave -128 out, so that -w has the grid of w."""
    if not spec.symmetric:
        return 0, 2**spec.bits - 1
    return (-8, 7) if spec.bits == 4 else (-127, 127)


def _spread(groups, size, k):
    """(N, groups) to (N, k): each group's value for all of its columns."""
    return np.repeat(groups, size, axis=1)[:, :k]


class Grid:
    """The scales and zeros of some columns of a weight.

    Symmetric, 4 bits: the value of largest magnitude becomes exactly -8, whatever its sign (as in GGUF's Q4_0), which
    uses the whole range: 10.3 % error on a normal weight in groups of 128, not 11.7 %. Symmetric, 8 bits: largest
    magnitude / 127. Asymmetric: from min(w, 0) to max(w, 0), so that 0 is exact. Integers are
    round-half-to-even(w / scale) + zero with the scale as it is stored.

    A scale below the least normal number of its dtype, 6.1e-5 in float16, has few digits: there it is rounded away from
    0, so that it neither is 0 nor cuts off the largest value.
    """

    def __init__(self, w, spec):
        """`w`: (N, groups, columns) with NaN beyond a row's end, or no NaN."""
        self.spec = spec
        low, high = np.fmin.reduce(w, axis=2), np.fmax.reduce(w, axis=2)
        zeros = None
        if not spec.symmetric:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scales = self._stored((high - low) / (2**spec.bits - 1))
            zeros = np.rint(-low / np.where(scales > 0, scales, 1)).clip(0, 2**spec.bits - 1).astype(np.uint8)
        elif spec.bits == 4:
            scales = self._stored(np.where(-low >= high, low, high) / -8)
        else:
            scales = self._stored(np.maximum(-low, high) / 127)
        self.scales, self.zeros = scales, zeros
        self._warn_of_zeros(np.maximum(-low, high))

    def _warn_of_zeros(self, largest):
        lost = (largest > 0) & (largest <= np.abs(self.scales.astype(np.float64)) / 2)
        if lost.any():
            dtype = self.spec.scale_dtype
            mend = 'use scale_dtype="float32"' if dtype == "float16" else "multiply the weight first"
            warnings.warn(f"quantize: {lost.sum()} of {lost.size} groups become zeros: all their weights, up to "
                          f"{largest[lost].max():.3g}, are below half the least {dtype} scale; {mend}", stacklevel=4)

    def _stored(self, scales):
        with np.errstate(over="ignore", under="ignore"):
            stored = scales.astype(self.spec.scale_dtype)
        size, away = np.abs(stored), np.copysign(np.inf, scales).astype(stored.dtype)
        short = (size < np.abs(scales)) & (size < np.finfo(stored.dtype).tiny)
        stored[short] = np.nextafter(stored, away)[short]
        if not np.isfinite(stored).all():
            raise ValueError(f"quantize: a scale of {np.abs(scales).max():.3g} is beyond {self.spec.scale_dtype}; "
                             + ('use scale_dtype="float32"' if self.spec.scale_dtype == "float16"
                                else "divide the weight first"))
        return stored

    def integers(self, w, group):
        """Of columns `w` (N, columns) of group `group`, as floats."""
        scale = self.scales[:, group, None].astype(w.dtype)
        low, high = integer_range(self.spec)
        zero = 0 if self.zeros is None else self.zeros[:, group, None].astype(w.dtype)
        return (np.rint(w / np.where(scale != 0, scale, 1)) + zero).clip(low, high)

    def values(self, integers, group):
        """What those integers stand for."""
        zero = 0 if self.zeros is None else self.zeros[:, group, None].astype(integers.dtype)
        return (integers - zero) * self.scales[:, group, None].astype(integers.dtype)


def as_weight(weight, op):
    """`weight` as a (N, K) array of floats without NaN or infinity."""
    w = as_floats(weight, op, "weight")
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"{op}: weight must have shape (N, K), both at least 1, got {w.shape}")
    if not np.isfinite(w).all():
        n, k = np.argwhere(~np.isfinite(w))[0]
        raise ValueError(f"{op}: weight must be finite, got {w[n, k]} at [{n}, {k}]")
    return w


def as_spec(spec, op):
    """`spec`, or TypeError."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"{op}: spec must be a QuantSpec, got {type(spec).__name__}")
    return spec


def quantize(weight, spec=QuantSpec()):
    """Quantize to the nearest: each group's grid from its own largest values.

    Parameters
    ----------
    weight : (N, K) array_like, float32 or float64
    spec : QuantSpec

    Returns
    -------
    QuantizedWeight

    Raises
    ------
    ValueError
        If a weight is NaN or infinite, or a scale is beyond `spec.scale_dtype`.
    TypeError
        If `weight` is not float32 or float64, or `spec` no QuantSpec.

    Warns
    -----
    UserWarning
        If a group becomes zeros though its weights are none: they are below half the least scale, 3e-8 in float16.

    Notes
    -----
    Relative errors (Frobenius) on a normal weight with K = 4096: 8 bits by row 0.87 %, 4 bits in groups of 128 10.3 %
    (asymmetric 10.1 %).
    """
    w, spec = as_weight(weight, "quantize"), as_spec(spec, "quantize")
    n, k = w.shape
    size, groups = min(spec.group_size or k, k), groups_of(k, spec.group_size)
    padded = w
    if groups * size != k:
        padded = np.full((n, groups * size), np.nan, w.dtype)
        padded[:, :k] = w
    grid = Grid(padded.reshape(n, groups, size), spec)
    integers = np.empty((n, k), np.int16)
    for g in range(groups):
        columns = slice(g * size, min((g + 1) * size, k))
        integers[:, columns] = grid.integers(w[:, columns], g)
    return QuantizedWeight.from_integers(spec, integers, grid.scales, grid.zeros)
