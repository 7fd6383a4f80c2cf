"""Quantized weights: INT8 and 4 bits by group, products with them, GPTQ.

    weight = quant.quantize(w, quant.QuantSpec(bits=4, group_size=128))         # round to nearest
    weight, report = quant.gptq(w, activations, quant.QuantSpec())              # or by what the layer really sees
    y = quant.linear(x, weight, bias)
"""
from numformer.ops.quant import embedding as embedding
from numformer.ops.quant import int8_matmul as int8_matmul
from numformer.ops.quant import linear as linear
from numformer.ops.quant import moe_mlp as moe_mlp
from numformer.quant.gptq import gptq as gptq
from numformer.quant.report import Report as Report
from numformer.quant.report import rtn as rtn
from numformer.quant.weight import QuantizedWeight as QuantizedWeight
from numformer.quant.weight import QuantSpec as QuantSpec
from numformer.quant.weight import quantize as quantize
