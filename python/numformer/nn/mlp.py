"""The feed-forward layer of a transformer block."""
import numpy as np

from numformer.nn import init
from numformer.nn.layers import project
from numformer.nn.module import Module
from numformer.ops.arguments import need_sizes
from numformer.ops.gated import swiglu_halves

__all__ = ["MLP"]


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
        need_sizes("MLP", n_embd=n_embd, hidden=hidden)
        self.activation = activation
        gated = activation == "swiglu"
        self.up = init.constant(0, hidden * (1 + gated), n_embd, dtype=dtype)       # gate first
        for rows in np.split(self.up.data, 1 + gated):
            rows[...] = init.xavier_uniform(rng, hidden, n_embd, dtype=dtype).data
        self.up_bias = init.constant(0, hidden * (1 + gated), dtype=dtype) if bias else None
        self.down = init.xavier_uniform(rng, n_embd, hidden, dtype=dtype)
        self.down_bias = init.constant(0, n_embd, dtype=dtype) if bias else None

    def __call__(self, x, residual=None):
        return project(self.inner(x), self.down, self.down_bias, residual=residual)

    def inner(self, x):
        """What `down` is given."""
        if self.activation == "swiglu":
            return swiglu_halves(project(x, self.up, self.up_bias))
        return project(x, self.up, self.up_bias, self.activation)
