"""Transformer kernels for NumPy: attention, mixture of experts, quantization, with gradients."""
from numformer._core import empty_cache, get_num_threads, memory_stats, set_num_threads
from numformer.ops.gelu import gelu
from numformer.tensor import Tensor, checkpoint, no_grad

__all__ = ["Tensor", "checkpoint", "empty_cache", "gelu", "get_num_threads", "memory_stats", "no_grad",
           "set_num_threads"]
