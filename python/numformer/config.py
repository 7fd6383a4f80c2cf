"""What is in use on this machine, and why not something better."""
import os
import platform

import numpy as np

import numformer
from numformer import _core

__all__ = ["show_config"]


def show_config(mode="print"):
    """Tell which kernels and threads are in use and, where something is off, why.

    Parameters
    ----------
    mode : {"print", "dict"}
        Print the lines, or return them as a dict.

    Returns
    -------
    dict of str to str, or None where `mode` is "print"

    Raises
    ------
    ValueError
        If `mode` is neither of these.
    """
    if mode not in ("print", "dict"):
        raise ValueError(f'show_config: mode must be "print" or "dict", got {mode!r}')
    isa, best = _core.get_isa(), _core.cpu_isa
    why = "" if isa == best else f" (the processor has {best}: NUMFORMER_ISA={os.environ.get('NUMFORMER_ISA', '')})"
    stats = _core.memory_stats()
    lines = {
        "numformer": f"{numformer.__version__}, NumPy {np.__version__}, Python {platform.python_version()}",
        "kernels": isa + why,
        "threads": _threads(),
        "matrix products": "numformer's own; NumPy's BLAS for GPTQ's calibration and attention maps alone",
        "memory pool": f"{stats['in_use'] / 2**20:.0f} MiB in use, {stats['kept'] / 2**20:.0f} MiB kept "
                       f"of at most {stats['kept_limit'] / 2**20:.0f} MiB",
        "GPU": "none: this build has no CUDA kernels",
    }
    if mode == "dict":
        return lines
    for name, text in lines.items():
        print(f"{name + ':':<17}{text}")
    return None


def _threads():
    count, cores = _core.get_num_threads(), os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS")
    why = f", OMP_NUM_THREADS={asked}" if asked else ""
    return f"{count} of {cores} cores{why}"
