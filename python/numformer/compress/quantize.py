"""Quantize the linear layers of a GPT, one after the other in the order in which tokens pass through them.

Each layer is fitted to what reaches it from the layers before it as they are by then: quantized. An expert is fitted to
the tokens that the router sends to it.
"""
from dataclasses import dataclass

import numpy as np

import numformer as nf
from numformer.compress.importance import real_tokens, take
from numformer.nn.layers import project
from numformer.ops.gated import swiglu_halves
from numformer.quant.weight import as_spec

__all__ = ["LayerReport", "ModelReport", "quantize_model"]

_METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class LayerReport:
    """One weight: its name in the state_dict, what was done, and :class:`numformer.quant.Report`'s figures.

    ``method`` is "rtn" where too few rows (`rows`) reached an expert for GPTQ. ``output_error`` is None where no row
    was there to measure it on.
    """

    name: str
    method: str
    shape: tuple
    rows: int
    weight_error: float
    output_error: float | None
    output_error_on: str | None
    bits_per_weight: float
    nbytes: int


@dataclass(frozen=True)
class ModelReport:
    """What quantizing a model cost.

    Attributes
    ----------
    layers : list of LayerReport
    nbytes, nbytes_before : int
        Of all arrays of the model, after and before.
    bits_per_weight : float
        Over the weights that were quantized.
    """

    layers: list
    nbytes: int
    nbytes_before: int
    bits_per_weight: float

    def __str__(self):
        lines = [f"{'weight':32}{'method':8}{'rows':>7}{'weight error':>14}{'output error':>14}{'bits':>8}"]
        for r in self.layers:
            output = "-" if r.output_error is None else f"{r.output_error:.4f}"
            lines.append(f"{r.name:32}{r.method:8}{r.rows:7}{r.weight_error:14.4f}{output:>14}{r.bits_per_weight:8.3f}")
        lines.append(f"{self.nbytes_before} bytes before, {self.nbytes} after; {self.bits_per_weight:.3f} bits per "
                     f"quantized weight")
        return "\n".join(lines)


def quantize_model(model, spec=None, method="rtn", batches=None, *, embedding=None, head=None, held_out=None,
                   count=None, min_rows=64, **options):
    """Return a model whose attention and feed-forward weights are quantized, and a report.

    Norms, router, learned positions and, unless `embedding` and `head` say otherwise, embedding and output matrix stay
    floats. The new model shares them with `model`.

    Parameters
    ----------
    model : GPT, float32
    spec : QuantSpec
        4 bits in groups of 128 where None.
    method : {"rtn", "gptq"}
        Round to nearest, or :func:`numformer.quant.gptq`.
    batches : iterable of (tokens, ...) or (tokens, targets)
        Calibration, which GPTQ needs; with "rtn" for the output errors of the report alone. What stands behind a row's
        last target that counts is padding and left out.
    embedding : QuantSpec, optional
        Quantize the embedding like this, 8 bits for example: to nearest, for a lookup has no inputs to fit it to.
    head : QuantSpec, optional
        Quantize the output matrix like this, by `method`. Where it is the embedding too (``tie_embedding``) give both
        the same: one matrix, rounded to nearest, serves as both.
    held_out : iterable of (tokens, ...), optional
        What the output errors are measured on; without it that is `batches`, and the report says so.
    count : int, optional
        How many batches to take; all where None.
    min_rows : int
        An expert to which fewer rows of the calibration go is rounded to nearest, which the report says.
    **options
        For :func:`numformer.quant.gptq`.

    Returns
    -------
    (GPT, ModelReport)
        In evaluation mode. It generates, gives logits and, under ``no_grad``, its loss, and is saved and loaded. An
        expert's weights are a list with one QuantizedWeight for each.

    Raises
    ------
    ValueError
        If the method is none of these, GPTQ is given no batches, or a tied embedding and head not the same spec.
    TypeError
        If the model is no GPT of float32 that is not quantized yet.
    """
    if method not in _METHODS:
        raise ValueError(f'quantize_model: method must be "rtn" or "gptq", got {method!r}')
    if not hasattr(model, "blocks") or not hasattr(model, "enter"):
        raise TypeError(f"quantize_model: model must be a GPT, got {type(model).__name__}")
    if any(True for _ in model.named_quantized()):
        raise TypeError("quantize_model: the model is quantized already; start from the one of floats")
    if model.config.dtype != "float32":
        raise TypeError(f"quantize_model: the model must be float32, got {model.config.dtype}")
    if method == "gptq" and batches is None:
        raise ValueError('quantize_model: "gptq" needs calibration batches')
    if method == "rtn" and options:
        raise ValueError(f'quantize_model: "rtn" takes no {", ".join(options)}')
    fit = [] if batches is None else take(batches, count, "quantize_model")
    test = [] if held_out is None else take(held_out, count, "quantize_model")
    tied = model.head is None
    for name, given in ("embedding", embedding), ("head", head):
        if given is not None:
            as_spec(given, f"quantize_model: {name}")
    if tied and embedding != head:
        raise ValueError("quantize_model: the model's embedding is its output matrix too (tie_embedding): give "
                         f"embedding and head the same spec, got {embedding} and {head}")
    before = sum(a.nbytes for a in model.state_dict().values())
    new = model.shared().eval()
    quantizer = _Quantizer(nf.quant.QuantSpec() if spec is None else spec, method, min_rows, options)
    with nf.no_grad():
        if embedding is not None:
            new.embedding.weight = quantizer("embedding.weight", model.embedding.weight.data, None, None, embedding)
        finals = _walk(new, quantizer, [real_tokens(batch) for batch in fit], [real_tokens(batch) for batch in test])
        if head is not None and not tied:
            new.head = quantizer("head", model.head.data, *finals, head)
    weights = [w for _, w in new.named_quantized()]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)
    return new, ModelReport(quantizer.reports, sum(a.nbytes for a in new.state_dict().values()), before, bits)


class _Quantizer:
    """Quantizes one weight after the other and writes the reports."""

    def __init__(self, spec, method, min_rows, options):
        self.spec, self.method, self.min_rows, self.options = spec, method, min_rows, options
        self.reports = []

    def __call__(self, name, weight, rows, held_out, spec=None, expert=False):
        """`rows` and `held_out`: (n, K) arrays, or None where none were given. `spec`: another than the model's."""
        spec = self.spec if spec is None else spec
        measured = rows if held_out is None else held_out
        measured = None if measured is None or not len(measured) else measured
        count = 0 if rows is None else len(rows)
        if self.method == "gptq" and count >= (self.min_rows if expert else 1):
            quantized, r = nf.quant.gptq(weight, rows, spec, held_out=measured, **self.options)
        else:
            quantized, r = nf.quant.rtn(weight, spec, measured)
        on = None if measured is None else "held-out" if measured is held_out else "calibration"
        self.reports.append(LayerReport(name, r.method, quantized.shape, count, r.weight_error, r.output_error, on,
                                        r.bits_per_weight, quantized.nbytes))
        return quantized


def _walk(model, quantizer, fit, test):
    """Quantize the blocks of `model` in place, the streams of both sets of (tokens, which are real) going along.

    Returned are the rows of either set that reach the output matrix, or None.
    """
    entered = [model.as_arrays().enter(tokens) for tokens, _ in fit + test]
    streams, rotary = [x for x, _ in entered], [r for _, r in entered]

    def split(parts):
        """Rows of the calibration, and those held out; None where there are no such batches."""
        rows = [x[real] for x, (_, real) in zip(parts, fit + test)]
        return [np.concatenate(r) if r else None for r in (rows[:len(fit)], rows[len(fit):])]

    for layer, block in enumerate(model.blocks):
        name, attention = f"blocks.{layer}.", block.attention
        normed = [block.as_arrays().norm_1(x) for x in streams]
        attention.qkv = quantizer(name + "attention.qkv", attention.qkv.data, *split(normed))
        twin = attention.as_arrays()
        heads = [twin.heads(x, r) for x, r in zip(normed, rotary)]
        attention.out = quantizer(name + "attention.out", attention.out.data, *split(heads))
        twin = attention.as_arrays()
        streams = [project(y, twin.out, twin.out_bias, residual=x) for y, x in zip(heads, streams)]
        normed = [block.as_arrays().norm_2(x) for x in streams]
        rows = split(normed)
        if isinstance(block.mlp, nf.nn.MoE):
            _quantize_experts(block.mlp, name + "mlp.", quantizer, rows)
        else:
            mlp = block.mlp
            mlp.up = quantizer(name + "mlp.up", mlp.up.data, *rows)
            inner = [None if r is None else mlp.as_arrays().inner(r) for r in rows]
            mlp.down = quantizer(name + "mlp.down", mlp.down.data, *inner)
        twin = block.mlp.as_arrays()
        streams = [twin(x, residual=y) for x, y in zip(normed, streams)]
    return split([model.as_arrays().norm(x) for x in streams])


def _quantize_experts(moe, name, quantizer, sets):
    up, down = moe.up.data, moe.down.data
    router = moe.as_arrays().router
    parts = []          # of each set: the rows of each expert, or None
    for rows in sets:
        if rows is None:
            parts.append([None] * len(up))
        else:
            routing = nf.moe.route(project(rows, router), moe.top_k)
            parts.append(np.split(nf.moe.dispatch(rows, routing), np.asarray(routing.offsets)[1:-1]))
    ups = [quantizer(f"{name}up.{e}", up[e], *rows, expert=True) for e, rows in enumerate(zip(*parts))]
    inner = [[None if r is None else swiglu_halves(project(r, w)) for r, w in zip(rows, ups)] for rows in parts]
    downs = [quantizer(f"{name}down.{e}", down[e], *rows, expert=True) for e, rows in enumerate(zip(*inner))]
    moe.up, moe.down = ups, downs
