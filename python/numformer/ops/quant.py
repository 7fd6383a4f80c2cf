"""Products with quantized weights."""
import numpy as np

from numformer import _core
from numformer.ops.arguments import as_array, as_gradient, as_rows, check_ids, choose
from numformer.ops.arithmetic import concatenate
from numformer.ops.gated import silu_backward, silu_forward, swiglu
from numformer.ops.gelu import gelu_backward, gelu_forward
from numformer.ops.moe import check_routing, combine, dispatch
from numformer.tensor import Tensor, apply, is_recording

__all__ = ["embedding", "int8_matmul", "linear", "linear_backward", "linear_forward", "moe_mlp"]

# name: number in _core.quant_linear, forward, backward
_ACTIVATIONS = {None: (0, None, None),
                "gelu": (1, lambda x: gelu_forward(x, "none"), gelu_backward),
                "gelu_tanh": (2, lambda x: gelu_forward(x, "tanh"), gelu_backward),
                "gelu_quick": (3, lambda x: gelu_forward(x, "quick"), gelu_backward),
                "silu": (4, silu_forward, silu_backward),
                "relu": (5, lambda x: (_core.relu(x), x), lambda dy, x: (_core.relu_backward(x, dy),))}
_COMPUTE = {"int8": True, "float32": False}


def _check_weight(qweight, op):
    if not hasattr(qweight, "packed"):
        raise TypeError(f"{op}: qweight must be a QuantizedWeight, got {type(qweight).__name__}; "
                        f"make one with quant.quantize(weight, spec)")


def linear_forward(x, qweight, bias=None, *, compute="int8", activation=None, out=None, keep=True):
    """Return ``(y, saved)``; `saved` is what :func:`linear_backward` needs, where `keep`."""
    _check_weight(qweight, "quant.linear")
    integers = choose(_COMPUTE, compute, "quant.linear", "compute")
    number, forward, _ = choose(_ACTIVATIONS, activation, "quant.linear", "activation")
    x = as_array(x, "quant.linear", "x")
    bias = None if bias is None else as_array(bias, "quant.linear", "bias")
    if not keep or forward is None:
        y = _core.quant_linear(x, qweight.packed(), bias, integers, number, out)
        return y, (y.shape, qweight, bias, activation, None)
    pre = _core.quant_linear(x, qweight.packed(), bias, integers, 0, out)
    y, inner = forward(pre if out is None else pre.copy())
    if out is not None:
        out[...] = y
        y = out
    return y, (y.shape, qweight, bias, activation, inner)


def linear_backward(dy, saved):
    """Return the gradient with respect to `x`, None, and that with respect to `bias` (None where there is none)."""
    shape, qweight, bias, activation, inner = saved
    dy = as_gradient(dy, shape, np.dtype(np.float32), "quant.linear_backward")
    if activation is not None:
        dy = _ACTIVATIONS[activation][2](dy, inner)[0]
    rows, weight = as_rows(dy), qweight.dequantize()
    dx = _core.product(rows, weight, None, False).reshape(*dy.shape[:-1], weight.shape[1])
    return dx, None, None if bias is None else _core.sum_rows(rows)


def linear(x, qweight, bias=None, *, compute="int8", activation=None, out=None):
    """Compute ``activation(x @ W.T + bias)`` with a quantized W.

    Parameters
    ----------
    x : (..., K) array_like or Tensor, float32
    qweight : QuantizedWeight (N, K)
    bias : (N,) array_like or Tensor, float32, optional
    compute : {"int8", "float32"}
        "int8": each row of x is quantized, q = round(x / a) with a = max|x| / 127, the products of integers are exact
        sums, and y = a * sum over groups, in ascending order, of scale * sum of products. Rounding x costs some 0.9 %
        of a row of normal values, more where a few are far larger than the rest. The same bits on every
        instruction set.
        "float32": x as it is; weights become floats, each once for some hundred rows.
    activation : {None, "gelu", "gelu_tanh", "gelu_quick", "silu", "relu"}
    out : (..., N) float32 ndarray, optional
        Where to write the result; C-contiguous, and no part of `x`.

    Returns
    -------
    (..., N) float32 ndarray, or Tensor where `x` or `bias` is one
        A row's bits do not depend on the other rows nor on the number of threads. A row of x that holds NaN or
        infinity gives NaN with "int8"; one whose values are all below 2^-120 in magnitude counts as zeros.

    Raises
    ------
    TypeError
        If `x` or `bias` is not float32, or `qweight` is no QuantizedWeight.
    ValueError
        If shapes disagree, or an option is none of the above.

    Notes
    -----
    There is a gradient with respect to `x` (dy W, rounding taken as the identity: straight-through) and to `bias`;
    none to the weight.
    """
    recorded = [t for t in (x, bias) if type(t) is Tensor]
    keep = is_recording() and any(t.requires_grad for t in recorded)
    return apply(linear_forward, linear_backward, x, qweight, bias, compute=compute, activation=activation, out=out,
                 keep=keep)


def embedding(ids, qweight):
    """Return ``qweight.dequantize()[ids]``, with every id checked; only the rows that are wanted become floats.

    Parameters
    ----------
    ids : array_like of integers, any shape
    qweight : QuantizedWeight (V, D)

    Returns
    -------
    float32 ndarray of shape ids.shape + (D,)
        Nothing trains a quantized weight: there is no gradient.

    Raises
    ------
    TypeError
        If `ids` is not of integers, or `qweight` no QuantizedWeight.
    ValueError
        If an id is not within 0 .. V-1 (the first is named).
    """
    _check_weight(qweight, "quant.embedding")
    ids = as_array(ids, "quant.embedding", "ids")
    count, size = qweight.shape
    check_ids(ids, count, "quant.embedding", "ids")
    return qweight.rows(ids.reshape(-1)).dequantize().reshape(*ids.shape, size)


def moe_mlp(x, routing, gate_up, down, *, compute="int8"):
    """:func:`numformer.moe.mlp` with quantized experts.

    Parameters
    ----------
    x : (T, d) array_like or Tensor, float32
    routing : numformer.moe.Routing
        Of float32.
    gate_up, down : sequence of QuantizedWeight
        One for each expert: (2 * I, d), gate first, and (d, I).
    compute : {"int8", "float32"}
        As for :func:`linear`.

    Returns
    -------
    (T, d) float32 ndarray, or Tensor where `x` or the routing is one
        A token's bits do not depend on the other tokens.

    Raises
    ------
    TypeError
        If `routing` is no Routing, `gate_up` or `down` no sequence of QuantizedWeights, or `x` not float32.
    ValueError
        If there is not a weight for each expert, shapes do not fit, or `compute` is not known.
    """
    check_routing(routing, "quant.moe_mlp")
    experts = len(routing.counts)
    for name, weights in (("gate_up", gate_up), ("down", down)):
        if not hasattr(weights, "__len__"):
            raise TypeError(f"quant.moe_mlp: {name} must be a sequence of QuantizedWeights, one for each expert, got "
                            f"{type(weights).__name__}")
    if len(gate_up) != experts or len(down) != experts:
        raise ValueError(f"quant.moe_mlp: gate_up and down must hold one weight for each of {experts} experts, got "
                         f"{len(gate_up)} and {len(down)}")
    rows = dispatch(x, routing)
    width = rows.shape[1]
    for e, (up, low) in enumerate(zip(gate_up, down)):
        _check_weight(up, "quant.moe_mlp")
        _check_weight(low, "quant.moe_mlp")
        if up.shape[1] != width or up.shape[0] % 2 or low.shape != (down[0].shape[0], up.shape[0] // 2):
            raise ValueError(f"quant.moe_mlp: gate_up must be of shape (2 * I, {width}) and down of shape (d, I), d "
                             f"the same for all experts, got {up.shape} and {low.shape} for expert {e}")
    choose(_COMPUTE, compute, "quant.moe_mlp", "compute")
    parts = []
    for e, (i, j) in enumerate(zip(routing.offsets[:-1].tolist(), routing.offsets[1:].tolist())):
        if i < j:
            hidden = linear(rows[i:j], gate_up[e], compute=compute)
            inner = hidden.shape[1] // 2
            parts.append(linear(swiglu(hidden[:, :inner], hidden[:, inner:]), down[e], compute=compute))
    y = concatenate(parts) if parts else np.zeros((0, down[0].shape[0]), np.float32)
    return combine(y, routing)


def int8_matmul(a, b):
    """Compute ``a @ b.T`` of signed bytes exactly.

    Parameters
    ----------
    a : (M, K) array_like, int8
    b : (N, K) array_like, int8
        K at most 65536.

    Returns
    -------
    (M, N) int32 ndarray

    Raises
    ------
    TypeError
        If `a` or `b` is not int8.
    ValueError
        If shapes disagree, or K is larger.
    """
    return _core.int8_matmul(as_array(a, "int8_matmul", "a"), as_array(b, "int8_matmul", "b"))
