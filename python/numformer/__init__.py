"""Transformer kernels for NumPy: attention, mixture of experts, quantization, with gradients."""
__version__ = "0.1.0"

from numformer import _threads as _threads  # first: before libgomp is loaded
from numformer import moe as moe
from numformer._core import empty_cache as empty_cache
from numformer._core import get_num_threads as get_num_threads
from numformer._core import memory_stats as memory_stats
from numformer._core import set_num_threads as set_num_threads
from numformer.config import show_config as show_config
from numformer.ops.arithmetic import clip as clip
from numformer.ops.arithmetic import concatenate as concatenate
from numformer.ops.arithmetic import exp as exp
from numformer.ops.arithmetic import log as log
from numformer.ops.arithmetic import log_sigmoid as log_sigmoid
from numformer.ops.arithmetic import maximum as maximum
from numformer.ops.arithmetic import minimum as minimum
from numformer.ops.arithmetic import sigmoid as sigmoid
from numformer.ops.arithmetic import sqrt as sqrt
from numformer.ops.arithmetic import stack as stack
from numformer.ops.arithmetic import take_along_axis as take_along_axis
from numformer.ops.arithmetic import tanh as tanh
from numformer.ops.arithmetic import where as where
from numformer.ops.attention import alibi_slopes as alibi_slopes
from numformer.ops.attention import merge_attention as merge_attention
from numformer.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from numformer.ops.cross_entropy import cross_entropy as cross_entropy
from numformer.ops.cross_entropy import softmax_entropy as softmax_entropy
from numformer.ops.cross_entropy import token_log_probs as token_log_probs
from numformer.ops.dropout import dropout as dropout
from numformer.ops.embedding import embedding as embedding
from numformer.ops.gated import geglu as geglu
from numformer.ops.gated import silu as silu
from numformer.ops.gated import swiglu as swiglu
from numformer.ops.gelu import bias_gelu as bias_gelu
from numformer.ops.gelu import gelu as gelu
from numformer.ops.linear import grouped_linear as grouped_linear
from numformer.ops.linear import linear as linear
from numformer.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from numformer.ops.norm import add_layer_norm as add_layer_norm
from numformer.ops.norm import add_rms_norm as add_rms_norm
from numformer.ops.norm import layer_norm as layer_norm
from numformer.ops.norm import rms_norm as rms_norm
from numformer.ops.rotary import rotary_embedding as rotary_embedding
from numformer.ops.softmax import log_softmax as log_softmax
from numformer.ops.softmax import softmax as softmax
from numformer.ops.varlen import attention_varlen as attention_varlen
from numformer.ops.varlen import paged_attention as paged_attention
from numformer.tensor import Tensor as Tensor
from numformer.tensor import checkpoint as checkpoint
from numformer.tensor import no_grad as no_grad

# after the ops, which they are made of
from numformer import quant as quant  # isort: skip
from numformer import nn as nn  # isort: skip
from numformer import models as models  # isort: skip
from numformer import data as data  # isort: skip
from numformer import train as train  # isort: skip
from numformer import rlhf as rlhf  # isort: skip
from numformer import compress as compress  # isort: skip
