"""The compiled extension: kernels behind positional arguments. numformer.ops gives them names and documentation."""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

cpu_isa: str

# memory
def pooled(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...
def memory_stats() -> dict[str, int]: ...
def empty_cache() -> None: ...

# threads and instruction sets
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def get_isa() -> str: ...
def cap_isa(name: str, /) -> str: ...

# elementwise
exp: np.ufunc
expm1: np.ufunc
log: np.ufunc
tanh: np.ufunc
sigmoid: np.ufunc
relu: np.ufunc
relu_backward: np.ufunc
silu: np.ufunc
silu_backward: np.ufunc
gelu_erf: np.ufunc
gelu_erf_backward: np.ufunc
gelu_tanh: np.ufunc
gelu_tanh_backward: np.ufunc
gelu_quick: np.ufunc
gelu_quick_backward: np.ufunc
geglu_quick: np.ufunc
geglu_tanh: np.ufunc
geglu_erf: np.ufunc
swiglu: np.ufunc
bias_gelu_quick: np.ufunc
bias_gelu_quick_backward: np.ufunc
bias_gelu_tanh: np.ufunc
bias_gelu_tanh_backward: np.ufunc
bias_gelu_erf: np.ufunc
bias_gelu_erf_backward: np.ufunc

# mixture of experts; order: (offsets, source, row)
_Order = tuple[np.ndarray, np.ndarray, np.ndarray]
def moe_route(logits: np.ndarray, top_k: int, groups: int, top_groups: int, sigmoid: bool, normalize: bool,
              scale: float, bias: np.ndarray | None, token_mask: np.ndarray | None, capacity: int | None, /
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, ...]]: ...
def moe_route_backward(probabilities: np.ndarray, top_k: int, groups: int, top_groups: int, sigmoid: bool,
                       normalize: bool, scale: float, expert_index: np.ndarray, dweight: np.ndarray | None,
                       dprobabilities: np.ndarray | None, /) -> np.ndarray: ...
def moe_sort(expert_index: np.ndarray, experts: int, capacity: int, /) -> tuple[np.ndarray, ...]: ...
def moe_dispatch(x: np.ndarray, order: _Order, /) -> np.ndarray: ...
def moe_dispatch_backward(dy: np.ndarray, order: _Order, /) -> np.ndarray: ...
def moe_combine(y: np.ndarray, weight: np.ndarray, order: _Order, /) -> np.ndarray: ...
def moe_combine_backward(dy: np.ndarray, y: np.ndarray, weight: np.ndarray, order: _Order, /
                         ) -> tuple[np.ndarray, np.ndarray]: ...

# attention
def attention_forward(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, scale: float | None, causal: int,
    out: np.ndarray | None, want: int, /,
) -> Any: ...
def attention_backward(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, scale: float | None, causal: int,
    out: np.ndarray, stats: np.ndarray, dout: np.ndarray | None, dlse: np.ndarray | None, packed: bool, /,
) -> Any: ...

# the machine's limits, for benchmarks: each does work on all threads and returns how much
def roof_fma(rounds: int, /) -> float: ...
def roof_dot(rounds: int, /) -> float: ...
def roof_read(x: np.ndarray, /) -> float: ...
def roof_copy(x: np.ndarray, out: np.ndarray, /) -> float: ...

# optimizer
def adamw_step(params: Sequence[np.ndarray], grads: Sequence[np.ndarray], m: Sequence[np.ndarray],
               v: Sequence[np.ndarray], decays: Sequence[float], lr: float, beta1: float, beta2: float, eps: float,
               count: float, scale: float, /) -> None: ...
def global_norm(arrays: Sequence[np.ndarray], /) -> float: ...

# rows: gated units, GeLU after a bias
def gated(form: int, gate: np.ndarray, up: np.ndarray, /) -> np.ndarray: ...
def gated_backward(form: int, gate: np.ndarray, up: np.ndarray, dy: np.ndarray,
                   /) -> tuple[np.ndarray, np.ndarray]: ...
def bias_gelu(form: int, x: np.ndarray, bias: np.ndarray, /) -> np.ndarray: ...
def bias_gelu_backward(form: int, x: np.ndarray, bias: np.ndarray, dy: np.ndarray,
                       /) -> tuple[np.ndarray, np.ndarray]: ...

# random numbers
def dropout(x: np.ndarray, p: float, key: int, /) -> np.ndarray: ...
