"""Linear layers against NumPy's BLAS and torch: the three products of training, the fused epilogue, one row.

    python -m benchmarks.bench_linear [forward] [backward] [fused] [row]

Work is 2 M N K operations. One row counts the bytes of the weights, over weights that together lie beyond every cache.
"""
import sys

import numpy as np

from benchmarks.harness import Suite, normal, torch
from numformer import _core, linear

# name: (M, N, K)
SHAPES = {
    "2048 x 2048 x 2048": (2048, 2048, 2048),
    "T2048 384 -> 1536": (2048, 1536, 384),
    "T2048 1536 -> 384": (2048, 384, 1536),
    "T2048 768 -> 3072": (2048, 3072, 768),
    "T2048 384 -> 8192": (2048, 8192, 384),
    "T1024 128 -> 384": (1024, 384, 128),
}
ROWS = {"1 row, 4096 -> 4096": (1, 4096, 4096), "1 row, 384 -> 8192": (1, 8192, 384),
        "4 rows, 4096 -> 4096": (4, 4096, 4096)}


def forward(suite, name):
    m, n, k = SHAPES[name]
    x, w, out = normal(m, k), normal(n, k), np.empty((m, n), np.float32)
    t = torch and [torch.from_numpy(a) for a in (x, w, out)]
    suite.compare(f"forward {name}", 2 * m * n * k, goal="1.02x NumPy", numformer=lambda: linear(x, w, out=out),
                  numpy=lambda: np.matmul(x, w.T, out=out), torch=t and (lambda: torch.mm(t[0], t[1].T, out=t[2])))


def backward(suite, name):
    m, n, k = SHAPES[name]
    x, w, dy = normal(m, k), normal(n, k), normal(m, n)
    dx, dw = np.empty_like(x), np.empty_like(w)
    t = torch and [torch.from_numpy(a) for a in (x, w, dy, dx, dw)]
    suite.compare(f"dx {name}", 2 * m * n * k, goal="1.02x NumPy", numformer=lambda: _core.product(dy, w, dx, False),
                  numpy=lambda: np.matmul(dy, w, out=dx), torch=t and (lambda: torch.mm(t[2], t[1], out=t[3])))
    suite.compare(f"dw {name}", 2 * m * n * k, goal="1.02x NumPy", numformer=lambda: _core.product(dy.T, x, dw, False),
                  numpy=lambda: np.matmul(dy.T, x, out=dw), torch=t and (lambda: torch.mm(t[2].T, t[0], out=t[4])))


def fused(suite, name):
    m, n, k = SHAPES[name]
    x, w, bias = normal(m, k), normal(n, k) / np.float32(k**0.5), normal(n)   # outputs near 1, as a layer begins
    peer = None
    if torch:
        t = [torch.from_numpy(a) for a in (x, w, bias)]

        def peer():
            with torch.no_grad():
                torch.nn.functional.gelu(torch.nn.functional.linear(*t))
    suite.compare(f"bias + GeLU {name}", 2 * m * n * k, goal="1.15x torch",
                  numformer=lambda: linear(x, w, bias, activation="gelu"), torch=peer)


def row(suite, name):
    m, n, k = ROWS[name]
    count = max(1, (160 << 20) // (4 * n * k))
    x, weights = normal(m, k), [normal(n, k) for _ in range(count)]
    peer = None
    if torch:
        theirs, t = [torch.from_numpy(w) for w in weights], torch.from_numpy(x)

        def peer():
            with torch.no_grad():
                for w in theirs:
                    torch.nn.functional.linear(t, w)
    suite.compare(name, 4 * n * k * count, "read", goal="85 %" if m == 1 else None, rounds=7,
                  numformer=lambda: [linear(x, w) for w in weights], numpy=lambda: [x @ w.T for w in weights],
                  torch=peer)


def main():
    kinds = {"forward": (forward, SHAPES), "backward": (backward, SHAPES), "fused": (fused, SHAPES), "row": (row, ROWS)}
    suite = Suite("linear")
    for which in sys.argv[1:] or kinds:
        function, names = kinds[which]
        for name in names:
            function(suite, name)
    suite.finish()


if __name__ == "__main__":
    main()
