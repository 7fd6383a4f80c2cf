"""GeLU in its three forms, with a bias, and SwiGLU, against torch's: from cache and from memory.

    python -m benchmarks.bench_gelu

Ours writes to an array that is given, or for the fused ops to the pool's; torch, whose gelu takes no `out`, to what its
allocator gives (it has kept the last result's memory). Work is counted in elements from cache, in bytes from memory.
"""
import numpy as np

import numformer as nf
from benchmarks.harness import Suite, normal, torch

CACHE, MEMORY = (256, 1024), (8192, 4096)
GOALS = {"none": "1.2x torch", "tanh": "3x torch", "quick": None}


def quick(x):
    return x * torch.sigmoid(1.702 * x)


def peer(form, x):
    if torch is None:
        return None
    x = torch.from_numpy(x)
    f = quick if form == "quick" else lambda x: torch.nn.functional.gelu(x, approximate=form)

    def run():
        with torch.no_grad():
            f(x)
    return run


def functions(form, x, out):
    return {"numformer": lambda: nf.gelu(x, form, out=out), "torch": peer(form, x)}


def main():
    suite = Suite("gelu")
    for shape, where in ((CACHE, "256 K elements from cache"), ((1024, 1024), "1 M elements"), (MEMORY, "from memory")):
        x = normal(*shape)
        out = np.empty_like(x)
        for form, goal in GOALS.items():
            memory = shape == MEMORY
            suite.compare(f"gelu {form}, {where}", x.nbytes * 2 if memory else x.size, "copy" if memory else None,
                          unit=None if memory else "elements", goal=None if memory else goal, **functions(form, x, out))
    for deviation in (3, 20):
        x = deviation * normal(*CACHE)
        out = np.empty_like(x)
        for form in ("none", "tanh"):
            suite.compare(f"gelu {form}, 256 K elements of deviation {deviation} from cache", x.size, None,
                          unit="elements", **functions(form, x, out))
    x, bias, gate = normal(2048, 1024), normal(1024), normal(2048, 1024)
    tx, tb, tg = (torch.from_numpy(a) for a in (x, bias, gate)) if torch else (None,) * 3

    def their_bias():
        with torch.no_grad():
            torch.nn.functional.gelu(tx + tb)

    def their_swiglu():
        with torch.no_grad():
            torch.nn.functional.silu(tg) * tx

    suite.compare("bias_gelu none, 2 M elements", x.size, None, unit="elements",
                  numformer=lambda: nf.bias_gelu(x, bias), torch=torch and their_bias)
    suite.compare("swiglu, 2 M elements", x.size, None, unit="elements",
                  numformer=lambda: nf.swiglu(gate, x), torch=torch and their_swiglu)
    suite.finish()


if __name__ == "__main__":
    main()
