"""float64 references, written naively and independently of the kernels."""
import math

import numpy as np

_erfc = np.vectorize(math.erfc, otypes=[float])


def gelu(x, approximate="none"):
    x = np.asarray(x, np.float64)
    if approximate == "none":
        return 0.5 * x * _erfc(-x / math.sqrt(2)) if x.size else x
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
