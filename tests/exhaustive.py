"""GeLU on every float32 there is: the largest error of each form and of its slope, at each instruction set.

    python -m tests.exhaustive [none] [tanh] [quick]

The reference is the float64 form, libm's erfc and exp number by number, which tests/kernels/test_gelu.py holds against
mpmath: its own error is below 1e-6 of the unit. Below 2^-30 it is x/2 + c x^2, and from 64 on x or 0. Values are
measured in units in the last place of the reference. Slopes cross zero, where no relative error holds: they are
measured in units in the last place of 1 (2^-23), and where x is below -2, out in the tail, in their own.
"""
import itertools
import multiprocessing
import sys

import numpy as np

from numformer import _core
from tests.conftest import levels

NAMES = {"none": "gelu_erf", "tanh": "gelu_tanh", "quick": "gelu_quick"}
CURVES = {"none": (2 * np.pi) ** -0.5, "tanh": (2 * np.pi) ** -0.5, "quick": 1.702 / 4}     # of x^2 at 0
CHUNK = 1 << 18         # float32 values at a time: their float64 twins stay in cache
EVERY = 1 << 32
LEVELS = levels()


def unit(want):
    """The unit in the last place of a float32 near each of `want`."""
    power = (want.view(np.int64) & 0x7FF0000000000000).view(np.float64)
    return np.maximum(power * 2.0**-23, 2.0**-149)


def worst(error, x):
    """(the largest error, where): an error of NaN is infinite."""
    error = np.where(np.isnan(error), np.inf, error)
    i = int(error.argmax())
    return float(error[i]), float(x[i])


def reference(form, x):
    """(value, slope) in float64; all of x lies on one side of each border."""
    size = abs(float(x[0]))
    if size < 2.0**-30:
        return x / 2 + CURVES[form] * x * x, 0.5 + 2 * CURVES[form] * x
    if size >= 64:
        return np.maximum(x, 0), np.where(x > 0, 1.0, 0.0)
    _core.cap_isa(LEVELS[-1])
    return getattr(_core, NAMES[form])(x), getattr(_core, NAMES[form] + "_backward")(x, np.ones_like(x))


def measure(job):
    """Of one form and a range of bit patterns: {(level, what): (error, x)}."""
    form, first, last = job
    _core.set_num_threads(1)
    name = NAMES[form]
    found = {}

    def note(level, what, error, x):
        if x.size:
            found[level, what] = max(found.get((level, what), (-1.0, 0.0)), worst(error, x))

    for begin in range(first, last, CHUNK):
        x = np.arange(begin, begin + CHUNK, dtype=np.uint32).view(np.float32)
        x = x[np.isfinite(x)]
        if not x.size:
            continue
        with np.errstate(all="ignore"):
            value, slope = reference(form, x.astype(np.float64))
            tail = x < -2
            value_unit, slope_unit = unit(value), unit(slope[tail])
            for level in LEVELS:
                _core.cap_isa(level)
                got = getattr(_core, name)(x)
                note(level, "value", np.abs(got - value) / value_unit, x)
                got = getattr(_core, name + "_backward")(x, np.ones_like(x))
                note(level, "slope, of 1", np.abs(got - slope) * 2.0**23, x)
                note(level, "slope, x < -2", np.abs(got[tail] - slope[tail]) / slope_unit, x[tail])
    return found


def main():
    unknown = set(sys.argv[1:]) - set(NAMES)
    if unknown:
        sys.exit(f"exhaustive: no form {', '.join(unknown)}; there are {', '.join(NAMES)}")
    piece = EVERY // 64
    for form in sys.argv[1:] or NAMES:
        jobs = [(form, i, i + piece) for i in range(0, EVERY, piece)]
        found = {}
        with multiprocessing.get_context("spawn").Pool() as pool:
            for part in pool.imap_unordered(measure, jobs):
                for key, error in part.items():
                    found[key] = max(found.get(key, (-1.0, 0.0)), error)
        for level, what in itertools.product(LEVELS, ["value", "slope, of 1", "slope, x < -2"]):
            error, x = found[level, what]
            print(f"gelu {form:<6} {level:<11} {what:<14} {error:7.3f} ULP at {x!r}", flush=True)


if __name__ == "__main__":
    main()
