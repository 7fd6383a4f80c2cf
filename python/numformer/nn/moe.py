"""A mixture of experts in the place of the feed-forward layer of a transformer block."""
import numpy as np

import numformer as nf
from numformer.nn import init
from numformer.nn.layers import project
from numformer.nn.module import Module
from numformer.ops.arguments import need_sizes

__all__ = ["MoE"]


class MoE(Module):
    """SwiGLU experts, of which each token passes through `top_k`; no token is dropped.

    Parameters
    ----------
    n_embd, hidden : int
        Features of a token, and of the inside of one expert.
    n_expert, top_k : int
    rng : numpy.random.Generator

    Attributes
    ----------
    router : Tensor (n_expert, n_embd)
    up : Tensor (n_expert, 2 hidden, n_embd), gate first
    down : Tensor (n_expert, n_embd, hidden)
        `up` and `down` may also be lists of quantized weights, one for each expert.
    routing : numformer.moe.Routing or None
        How the last call distributed its tokens: what the load-balancing loss reads.
    """

    def __init__(self, n_embd, hidden, n_expert, top_k=2, *, rng, dtype=np.float32):
        need_sizes("MoE", n_embd=n_embd, hidden=hidden, n_expert=n_expert, top_k=top_k)
        if top_k > n_expert:
            raise ValueError(f"MoE: top_k must be 1 to n_expert, got {top_k} and {n_expert}")
        self.top_k = top_k
        self.router = init.xavier_uniform(rng, n_expert, n_embd, dtype=dtype)
        self.up = init.constant(0, n_expert, 2 * hidden, n_embd, dtype=dtype)
        for rows in np.split(self.up.data, 2, axis=1):      # gate and up are matrices of their own
            rows[...] = init.xavier_uniform(rng, n_expert, hidden, n_embd, dtype=dtype).data
        self.down = init.xavier_uniform(rng, n_expert, n_embd, hidden, dtype=dtype)
        self.routing = None

    def __call__(self, x, residual=None):
        tokens = x.reshape(-1, x.shape[-1])
        self.routing = nf.moe.route(project(tokens, self.router), self.top_k)
        mlp = nf.quant.moe_mlp if isinstance(self.up, list) else nf.moe.mlp
        y = mlp(tokens, self.routing, self.up, self.down).reshape(*x.shape)
        return y if residual is None else y + residual
