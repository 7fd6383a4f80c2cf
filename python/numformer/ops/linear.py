"""Products with a weight: linear layers, one or many at once, and the loss over a vocabulary of logits."""
from numformer.ops.arguments import as_array, as_floats, same_dtype
from numformer.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from numformer.ops.gated import silu_backward, silu_forward
from numformer.ops.gelu import gelu_backward, gelu_forward
from numformer.tensor import apply

__all__ = ["linear", "linear_backward", "linear_cross_entropy", "linear_cross_entropy_backward",
           "linear_cross_entropy_forward", "linear_forward"]

_ACTIVATIONS = {"gelu": (lambda x: gelu_forward(x, "none"), gelu_backward),
                "gelu_tanh": (lambda x: gelu_forward(x, "tanh"), gelu_backward),
                "gelu_quick": (lambda x: gelu_forward(x, "quick"), gelu_backward),
                "silu": (silu_forward, silu_backward)}


def linear_forward(x, weight, bias=None, residual=None, *, activation=None, out=None):
    """Return ``(y, saved)``; `saved` is what :func:`linear_backward` needs."""
    x, weight = as_floats(x, "linear", "x"), as_floats(weight, "linear", "weight")
    same_dtype("linear", x=x, weight=weight, bias=bias, residual=residual)
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f"linear: activation must be None, {', '.join(_ACTIVATIONS)}, got {activation!r}")
    y, inner = x @ weight.T, None
    if bias is not None:
        y += bias
    if activation is not None:
        y, inner = _ACTIVATIONS[activation][0](y)
    if residual is not None:
        y = y + residual
    return y, (x, weight, bias is not None, residual is not None, activation, inner)


def linear_backward(dy, saved):
    """Return the gradients of x, weight, bias and residual (None where there is none)."""
    x, weight, bias, residual, activation, inner = saved
    dz = dy if activation is None else _ACTIVATIONS[activation][1](dy, inner)[0]
    rows = dz.reshape(-1, dz.shape[-1])
    return (dz @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0) if bias else None,
            dy if residual else None)


def linear(x, weight, bias=None, *, activation=None, residual=None, out=None):
    """Compute ``activation(x @ weight.T + bias) + residual``."""
    return apply(linear_forward, linear_backward, x, weight, bias, residual, activation=activation, out=out)


def linear_cross_entropy_forward(hidden, weight, targets, **options):
    """Return ``(loss, saved)``."""
    hidden, weight = as_floats(hidden, "linear_cross_entropy", "hidden"), as_floats(weight, "linear_cross_entropy",
                                                                                   "weight")
    logits = hidden @ weight.T
    loss, saved = cross_entropy_forward(logits, as_array(targets, "linear_cross_entropy", "targets"), **options)
    return loss, (hidden, weight, saved)


def linear_cross_entropy_backward(dy, saved):
    """Return the gradients of hidden and weight, and None."""
    hidden, weight, inner = saved
    dlogits, _ = cross_entropy_backward(dy, inner)
    return dlogits @ weight, dlogits.T @ hidden, None


def linear_cross_entropy(hidden, weight, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
                         reduction="mean"):
    """``cross_entropy(hidden @ weight.T, targets)``."""
    return apply(linear_cross_entropy_forward, linear_cross_entropy_backward, hidden, weight, targets,
                 ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction)
