"""The small layers: Linear, Embedding, LayerNorm, RMSNorm, Dropout."""
import numpy as np

import numformer as nf
from numformer.nn import init
from numformer.nn.module import Module
from numformer.ops.arguments import as_number, need_sizes
from numformer.quant.weight import QuantizedWeight
from numformer.tensor import Tensor

__all__ = ["Dropout", "Embedding", "LayerNorm", "Linear", "RMSNorm", "project"]


def project(x, weight, bias=None, activation=None, residual=None):
    """:func:`numformer.linear`, or :func:`numformer.quant.linear` where `weight` is quantized."""
    if type(weight) is Tensor or type(weight) is np.ndarray:
        return nf.linear(x, weight, bias, activation=activation, residual=residual)
    y = nf.quant.linear(x, weight, bias, activation=activation)
    return y if residual is None else y + residual


class Linear(Module):
    """``x @ weight.T + bias``; weight (out_features, in_features) is Xavier-uniform, bias 0.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    rng : numpy.random.Generator
    """

    def __init__(self, in_features, out_features, *, bias=True, rng, dtype=np.float32):
        need_sizes("Linear", in_features=in_features, out_features=out_features)
        self.weight = init.xavier_uniform(rng, out_features, in_features, dtype=dtype)
        self.bias = init.constant(0, out_features, dtype=dtype) if bias else None

    def __call__(self, x, activation=None, residual=None):
        """`activation` and `residual` as in :func:`numformer.linear`."""
        return project(x, self.weight, self.bias, activation, residual)


class Embedding(Module):
    """Row ``ids`` of weight (count, size), which is Xavier-uniform."""

    def __init__(self, count, size, *, rng, dtype=np.float32):
        need_sizes("Embedding", count=count, size=size)
        self.weight = init.xavier_uniform(rng, count, size, dtype=dtype)

    def __call__(self, ids):
        """`weight` may be quantized."""
        lookup = nf.quant.embedding if type(self.weight) is QuantizedWeight else nf.embedding
        return lookup(ids, self.weight)


class LayerNorm(Module):
    """Layer normalization over the last axis (Ba et al. 2016)."""

    def __init__(self, size, *, bias=True, eps=1e-5, dtype=np.float32):
        need_sizes("LayerNorm", size=size)
        self.weight = init.constant(1, size, dtype=dtype)
        self.bias = init.constant(0, size, dtype=dtype) if bias else None
        self.eps = eps

    def __call__(self, x):
        return nf.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root-mean-square normalization over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, size, *, eps=1e-6, dtype=np.float32):
        need_sizes("RMSNorm", size=size)
        self.weight = init.constant(1, size, dtype=dtype)
        self.eps = eps

    def __call__(self, x):
        return nf.rms_norm(x, self.weight, self.eps)


class Dropout(Module):
    """Zero with probability `p` and the rest divided by 1 - p, in training mode; the identity otherwise.

    Parameters
    ----------
    p : float
    rng : numpy.random.Generator
        Advanced by every call in training mode.
    """

    def __init__(self, p, *, rng):
        if not 0 <= as_number(p, "Dropout", "p") < 1:
            raise ValueError(f"Dropout: p must be in [0, 1), got {p}")
        self.p = p
        self.rng = rng

    def __call__(self, x):
        return nf.dropout(x, self.p, self.rng) if self.training and self.p > 0 else x
