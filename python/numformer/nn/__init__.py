"""Layers: modules that hold parameters and call the ops."""
from numformer.nn import init as init
from numformer.nn.attention import MultiHeadAttention as MultiHeadAttention
from numformer.nn.attention import rotary_tables as rotary_tables
from numformer.nn.cache import KVCache as KVCache
from numformer.nn.cache import PagedKVCache as PagedKVCache
from numformer.nn.cache import RollingKVCache as RollingKVCache
from numformer.nn.checkpoint import checkpoint as checkpoint
from numformer.nn.layers import Dropout as Dropout
from numformer.nn.layers import Embedding as Embedding
from numformer.nn.layers import LayerNorm as LayerNorm
from numformer.nn.layers import Linear as Linear
from numformer.nn.layers import RMSNorm as RMSNorm
from numformer.nn.maps import attention_maps as attention_maps
from numformer.nn.mlp import MLP as MLP
from numformer.nn.module import Module as Module
from numformer.nn.moe import MoE as MoE
