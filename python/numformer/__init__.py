"""Transformer kernels for NumPy: attention, mixture of experts, quantization, with gradients."""
from numformer._core import empty_cache as empty_cache
from numformer._core import get_num_threads as get_num_threads
from numformer._core import memory_stats as memory_stats
from numformer._core import set_num_threads as set_num_threads
from numformer.config import show_config as show_config
from numformer.ops.gelu import gelu as gelu
from numformer.tensor import Tensor as Tensor
from numformer.tensor import checkpoint as checkpoint
from numformer.tensor import no_grad as no_grad
