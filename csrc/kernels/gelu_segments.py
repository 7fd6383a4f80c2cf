"""Writes the tables of gelu_segments.inc.

    python csrc/kernels/gelu_segments.py | clang-format > csrc/kernels/gelu_segments.h

A polynomial is fitted in its segment to the least greatest error (relative; of w absolute up to t = 2, where it crosses
zero). Its first coefficient is the function at m, rounded; each next one is rounded and the rest fitted again. Where a
table ends and how its segments widen towards 0 was tried out, for the error of the whole.
"""
import itertools

import numpy as np
from mpmath import erfc, exp, findroot, mp, mpf, pi, sqrt

mp.dps = 40
DEGREE, FAR_DEGREE = 7, 4
FAR_BEGIN, FAR_STEPS = 5.25, 1.7        # 16 segments of 1 / FAR_STEPS end beyond 14.6
BORDER = 1e-5                           # a segment is so much longer: rounding decides at its ends
A = sqrt(8 / pi)
B = A * mpf("0.044715")


def q_erf(t):
    return erfc(t / sqrt(2)) / 2


def w_erf(t):
    return q_erf(t) - t * exp(-t * t / 2) / sqrt(2 * pi)


def far_value(t):
    return t * q_erf(t) * exp(t * t / 2)


def far_slope(t):
    return w_erf(t) * exp(t * t / 2)


def q_tanh(t):
    return 1 / (1 + exp(A * t + B * t**3))


def w_tanh(t):
    q = q_tanh(t)
    return q * (1 - t * (A + 3 * B * t * t) * (1 - q))


def rounded(value):
    return float(np.float32(float(value)))


def anchor(f, begin, end):
    """m: where f is a float, near to the mean of its values at both ends, so that f / f(m) is nearest to 1."""
    half = (f(mpf(begin)) + f(mpf(end))) / 2
    middle = round(findroot(lambda t: f(t) / half - 1, ((begin + end) / 2, (begin + end) / 2 + 0.01)) * 2**16)
    reach = int((end - begin) * 2**16 / 20)
    candidates = (mpf(m) / 2**16 for m in range(middle - reach, middle + reach))
    return min(candidates, key=lambda m: abs(rounded(f(m)) / f(m) - 1))


def fit(f, begin, end, m, degree, scale):
    """(coefficients of (t - m)^i, the greatest error times 1 / scale)."""
    t = [mpf(begin + end) / 2 + mpf(end - begin) / 2 * np.cos(np.pi * (i + 0.5) / 48) for i in range(48)]
    d = np.array([float(v - m) for v in t])
    coefficients = [rounded(f(m))]
    rest = np.array([float(f(v) - coefficients[0]) for v in t])
    weight = np.array([float(1 / abs(scale(v))) for v in t])
    for i in range(1, degree + 1):
        powers = np.stack([d**j for j in range(i, degree + 1)], axis=1)
        sizes, trust = np.abs(powers).max(axis=0), np.ones(48)
        for _ in range(15):
            both = weight * trust
            fitted = np.linalg.lstsq(powers / sizes * both[:, None], rest * both, rcond=None)[0]
            error = np.abs(powers / sizes @ fitted - rest) * weight
            trust *= np.sqrt(error / error.max() + 0.02)
        coefficients.append(rounded(fitted[0] / sizes[0]))
        rest = rest - coefficients[-1] * d**i
    return coefficients, (np.abs(rest) * weight).max()


def near(name, f, end, rise, anchored, scale):
    """The table of f up to `end`: rows m and the coefficients."""
    curve, rise = rounded((15.49 - rise * end) / end**2), rounded(rise)
    borders = [0, *((-rise + np.sqrt(rise**2 + 4 * curve * (i + 0.5))) / (2 * curve) for i in range(16))]
    columns, errors = [], []
    for begin, border in itertools.pairwise(borders):
        begin, border = max(0, begin - BORDER), border + BORDER
        m = anchor(f, begin, border) if anchored else mpf(rounded((begin + border) / 2))
        coefficients, error = fit(f, begin, border, m, DEGREE, scale)
        columns.append([float(m), *coefficients])
        errors.append(error)
    print(f"/* To 2^{np.log2(max(errors)):.1f}. */")
    for what, value in ("END", end), ("CURVE", curve), ("RISE", rise):
        print(f"#define {name.upper()}_{what} {np.float32(value)!s}f")
    show(name, columns)


def far(name, f):
    """The table of f beyond: rows m and the coefficients; the segment is the rest of a number divided by 16."""
    first = round(FAR_BEGIN * FAR_STEPS)
    columns, errors = [None] * 16, []
    for k in range(first, first + 16):
        begin, end = (k - 0.5) / FAR_STEPS - BORDER, (k + 0.5) / FAR_STEPS + BORDER
        m = anchor(f, begin, end)
        coefficients, error = fit(f, begin, end, m, FAR_DEGREE, f)
        columns[k % 16] = [float(m), *coefficients]
        errors.append(error)
    print(f"/* To 2^{np.log2(max(errors)):.1f}. */")
    show(name, columns)


def show(name, columns):
    rows = ["{" + ", ".join(np.format_float_scientific(v) + "f" for v in np.float32(row)) + "}"
            for row in zip(*columns, strict=True)]
    print(f"static const float NF_NAME({name})[][16] __attribute__((aligned(64))) = {{" + ", ".join(rows) + "};\n")


print(f"/* Written by gelu_segments.py. */\nenum {{ SEGMENT_DEGREE = {DEGREE} }};\n#define FAR_STEPS {FAR_STEPS}f\n")
near("erf_values", q_erf, 5.3, 0.6, True, q_erf)
near("erf_slopes", w_erf, 6.0, 1.5, False, lambda t: max(abs(w_erf(t)), 1 if t < 2 else 0))
near("tanh_values", q_tanh, 4.9, 0.4, True, q_tanh)
near("tanh_slopes", w_tanh, 5.6, 1.5, False, lambda t: max(abs(w_tanh(t)), 1 if t < 2 else 0))
far("far_values", far_value)
far("far_slopes", far_slope)
