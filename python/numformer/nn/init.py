"""First values of parameters, drawn from the Generator that is given."""
import math

import numpy as np

from numformer.ops.arguments import need_generator
from numformer.tensor import Tensor

__all__ = ["constant", "normal", "xavier_uniform"]


def xavier_uniform(rng, *shape, dtype=np.float32, gain=1.0):
    """U(-a, a) with a = gain * sqrt(6 / (fan_in + fan_out)) over the last two axes (Glorot & Bengio 2010)."""
    need_generator(rng, "nn.init")
    bound = gain * math.sqrt(6 / (shape[-1] + shape[-2]))
    return Tensor(rng.uniform(-bound, bound, shape).astype(dtype), requires_grad=True)


def normal(rng, *shape, std=0.02, dtype=np.float32):
    """N(0, std), as GPT-2."""
    need_generator(rng, "nn.init")
    return Tensor((rng.standard_normal(shape) * std).astype(dtype), requires_grad=True)


def constant(value, *shape, dtype=np.float32):
    """One value everywhere."""
    return Tensor(np.full(shape, value, dtype), requires_grad=True)
