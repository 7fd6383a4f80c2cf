"""How good a quantized weight is, and round-to-nearest, which the others are measured against."""
from dataclasses import dataclass

import numpy as np

from numformer.ops.arguments import as_floats
from numformer.quant.weight import as_spec, as_weight, quantize

__all__ = ["Report", "as_activations", "report_on", "rtn"]


@dataclass(frozen=True)
class Report:
    """What quantizing cost.

    Attributes
    ----------
    method : str
    bits_per_weight : float
    weight_error : float
        ||W - W'|| / ||W||, Frobenius. Misleads: GPTQ's is larger than round-to-nearest's where its output error is
        smaller.
    output_error : float or None
        ||X (W - W')^T|| / ||X W^T||; None without activations.
    output_error_on : {"held-out", "calibration", None}
        Whether X was kept from the method, or is what it fitted.
    damp : float
        GPTQ: what was added to the diagonal, as a share of its mean. More than was asked for where Cholesky's
        factorization failed with less.
    dead_columns : int
        GPTQ: columns that no activation reaches; their weights are 0.
    """

    method: str
    bits_per_weight: float
    weight_error: float
    output_error: float | None = None
    output_error_on: str | None = None
    damp: float = 0.0
    dead_columns: int = 0


def as_activations(x, k, op, name):
    """`x` as a float64 array (rows, K)."""
    x = as_floats(x, op, name)
    if x.ndim < 2 or x.shape[-1] != k or x.size == 0:
        raise ValueError(f"{op}: {name} must have shape (rows, {k}), at least one row, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{op}: {name} must be finite")
    return x.reshape(-1, k).astype(np.float64)


def report_on(method, weight, quantized, activations, on, **facts):
    """Compare `quantized` with `weight`; `activations` may be None."""
    w = weight.astype(np.float64)
    error = w - quantized.dequantize()
    output_error = None
    if activations is not None:
        output_error = _ratio(activations @ error.T, activations @ w.T)
    return Report(method, quantized.bits_per_weight, _ratio(error, w), output_error,
                  None if activations is None else on, **facts)


def _ratio(error, whole):
    size, error = np.linalg.norm(whole), np.linalg.norm(error)
    return float(error / size) if size > 0 else 0.0 if error == 0 else float("inf")


def rtn(weight, spec, activations=None):
    """Round to nearest: :func:`quantize` with a report.

    Parameters
    ----------
    weight : (N, K) array_like, float32 or float64
    spec : QuantSpec
    activations : (rows, K) array_like, optional
        For the output error alone: rounding does not look at them.

    Returns
    -------
    (QuantizedWeight, Report)

    Raises
    ------
    TypeError
        If a dtype is wrong, or `spec` is no QuantSpec.
    ValueError
        If shapes disagree, or something is NaN, infinite or beyond the dtype of the scales.
    """
    w, spec = as_weight(weight, "rtn"), as_spec(spec, "rtn")
    x = None if activations is None else as_activations(activations, w.shape[1], "rtn", "activations")
    quantized = quantize(w, spec)
    return quantized, report_on("rtn", w, quantized, x, "held-out")
