"""The feed-forward layer of a transformer block."""
import numpy as np

import numformer as nf
from numformer.nn import init
from numformer.nn.layers import project
from numformer.nn.module import Module
from numformer.tensor import apply

__all__ = ["MLP", "split_halves"]


def split_halves_forward(x):
    """Return ``((first, second), saved)``: views of `x`."""
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]), x.shape


def split_halves_backward(dy, shape):
    """Return the gradient with respect to `x`, in a tuple."""
    half = shape[-1] // 2
    dx = np.empty(shape, next(d.dtype for d in dy if d is not None))
    for part, d in zip((dx[..., :half], dx[..., half:]), dy):
        part[...] = 0 if d is None else d
    return (dx,)


def split_halves(x):
    """The two halves of the last axis: views, no copies."""
    return apply(split_halves_forward, split_halves_backward, x)


class MLP(Module):
    """``down(activation(up(x)))``, or SwiGLU ``down(silu(gate(x)) * up(x))`` (Shazeer 2020).

    Parameters
    ----------
    n_embd, hidden : int
    activation : {"swiglu", "gelu", "gelu_tanh"}
    bias : bool
    rng : numpy.random.Generator
    """

    def __init__(self, n_embd, hidden, *, activation="swiglu", bias=False, rng, dtype=np.float32):
        if activation not in ("swiglu", "gelu", "gelu_tanh"):
            raise ValueError(f'MLP: activation must be "swiglu", "gelu" or "gelu_tanh", got {activation!r}')
        self.activation = activation
        gated = activation == "swiglu"
        self.up = init.constant(0, hidden * (1 + gated), n_embd, dtype=dtype)       # gate first
        for rows in np.split(self.up.data, 1 + gated):
            rows[...] = init.xavier_uniform(rng, hidden, n_embd, dtype=dtype).data
        self.up_bias = init.constant(0, hidden * (1 + gated), dtype=dtype) if bias else None
        self.down = init.xavier_uniform(rng, n_embd, hidden, dtype=dtype)
        self.down_bias = init.constant(0, n_embd, dtype=dtype) if bias else None

    def __call__(self, x, residual=None):
        if self.activation == "swiglu":
            y = nf.swiglu(*split_halves(project(x, self.up, self.up_bias)))
        else:
            y = project(x, self.up, self.up_bias, self.activation)
        return project(y, self.down, self.down_bias, residual=residual)
