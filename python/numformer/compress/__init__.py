"""Smaller models: fewer heads, fewer layers, fewer bits.

    scores = compress.head_importance(model, batches)
    small = compress.prune_heads(model, fraction=0.2, importance=scores)
    int4, report = compress.quantize_model(small, nf.quant.QuantSpec(bits=4), "gptq", batches)
"""
from numformer.compress.importance import head_importance as head_importance
from numformer.compress.importance import layer_importance as layer_importance
from numformer.compress.prune import progressive_prune as progressive_prune
from numformer.compress.prune import prune_heads as prune_heads
from numformer.compress.prune import prune_layers as prune_layers
from numformer.compress.quantize import LayerReport as LayerReport
from numformer.compress.quantize import ModelReport as ModelReport
from numformer.compress.quantize import quantize_model as quantize_model
