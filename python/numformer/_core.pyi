"""The compiled extension: kernels behind positional arguments. numformer.ops gives them names and documentation."""
from collections.abc import Callable
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
gelu_erf: np.ufunc
gelu_erf_backward: np.ufunc
gelu_tanh: np.ufunc
gelu_tanh_backward: np.ufunc
