"""Norms, softmaxes, cross-entropy, rotary, embedding and dropout against torch in eager mode.

    python -m benchmarks.bench_rowwise [OP ...]

All are bound by memory, so work is counted in bytes: each array that must be read or written, once in each direction;
that is the roof of a copy, which what lies in cache can pass. Backward is timed with the forward before it, on the tape
of each; cross-entropy and dropout count what they need not store as nothing.
"""
import sys

import numpy as np

import numformer as nf
from benchmarks.harness import Suite, normal, torch

SMALL, SQUARE, VOCABULARY = (2048, 768), (4096, 4096), (2048, 8192)
HEADS = {"B4 H12 S512 D64": (4, 12, 512, 64), "B2 H32 S2048 D128": (2, 32, 2048, 128)}
TABLES = {"2048 of 8192 x 768": (2048, 8192, 768), "8192 of 32000 x 1024": (8192, 32000, 1024)}
F = torch and torch.nn.functional


def compare(suite, name, ours, theirs, leaves, constants=(), *, forward, backward):
    """Two rows: `ours` and `theirs` take the arrays (as Tensors of each) and give y; bytes are of one direction."""
    def called(function, tensor, leaves):
        given = [tensor(x) for x in constants]

        def run():
            return function(*leaves, *given)
        return run

    def there_and_back(function, tensor, make):
        tensors = [make(x) for x in leaves]
        run = called(function, tensor, tensors)
        dy = tensor(np.ones(tuple(run().shape), np.float32))

        def both():
            for t in tensors:
                t.grad = None
            run().backward(dy)
        return both

    def quietly(run):
        def function():
            with torch.no_grad():
                run()
        return function

    def numpy(x):
        return x

    suite.compare(name, forward, "copy", rounds=7, numformer=called(ours, numpy, leaves),
                  torch=torch and quietly(called(theirs, torch.from_numpy, [torch.from_numpy(x) for x in leaves])))
    suite.compare(f"{name}, and backward", forward + backward, "copy", rounds=7,
                  numformer=there_and_back(ours, numpy, lambda x: nf.Tensor(x, requires_grad=True)),
                  torch=torch and there_and_back(theirs, torch.from_numpy,
                                                 lambda x: torch.from_numpy(x).requires_grad_()))


def title(op, shape):
    return f"{op} {' x '.join(map(str, shape))}"


def layer_norm(suite):
    for shape in (SMALL, SQUARE):
        x, w, b = normal(*shape), normal(shape[-1]), normal(shape[-1])
        compare(suite, title("layer_norm", shape), nf.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b),
                [x, w, b], forward=2 * x.nbytes, backward=3 * x.nbytes)


def rms_norm(suite):
    for shape in (SMALL, SQUARE):
        x, w = normal(*shape), normal(shape[-1])
        compare(suite, title("rms_norm", shape), nf.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, w],
                forward=2 * x.nbytes, backward=3 * x.nbytes)


def softmax(suite):
    for shape in (SMALL, SQUARE, VOCABULARY):
        x = normal(*shape)
        compare(suite, title("softmax", shape), nf.softmax, lambda x: F.softmax(x, -1), [x], forward=2 * x.nbytes,
                backward=3 * x.nbytes)


def log_softmax(suite):
    for shape in (SMALL, VOCABULARY):
        x = normal(*shape)
        compare(suite, title("log_softmax", shape), nf.log_softmax, lambda x: F.log_softmax(x, -1), [x],
                forward=2 * x.nbytes, backward=3 * x.nbytes)


def cross_entropy(suite):
    for shape in (SMALL, VOCABULARY):
        x, targets = normal(*shape), np.random.default_rng(0).integers(0, shape[1], shape[0])
        compare(suite, title("cross_entropy", shape), nf.cross_entropy, lambda x, t: F.cross_entropy(x, t), [x],
                [targets], forward=x.nbytes, backward=2 * x.nbytes)


def rotary(suite):
    def theirs(x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    for name, shape in HEADS.items():
        x, angles = normal(*shape), normal(shape[2], shape[3] // 2)
        tables = [np.tile(f(angles), 2) for f in (np.cos, np.sin)]
        compare(suite, f"rotary {name}", nf.rotary_embedding, theirs, [x], tables, forward=2 * x.nbytes,
                backward=2 * x.nbytes)


def embedding(suite):
    for name, (count, rows, size) in TABLES.items():
        weight, ids = normal(rows, size), np.random.default_rng(0).integers(0, rows, count)
        compare(suite, f"embedding {name}", lambda w, ids: nf.embedding(ids, w), lambda w, ids: F.embedding(ids, w),
                [weight], [ids], forward=2 * 4 * count * size, backward=4 * count * size + weight.nbytes)


def dropout(suite):
    rng = np.random.default_rng(0)
    for shape in (SMALL, SQUARE):
        x = normal(*shape)
        compare(suite, title("dropout", shape), lambda x: nf.dropout(x, 0.1, rng), lambda x: F.dropout(x, 0.1), [x],
                forward=2 * x.nbytes, backward=2 * x.nbytes)


def main():
    suite = Suite("rowwise")
    ops = (layer_norm, rms_norm, softmax, log_softmax, cross_entropy, rotary, embedding, dropout)
    ops = {f.__name__: f for f in ops}
    for op in sys.argv[1:] or ops:
        ops[op](suite)
    suite.finish()


if __name__ == "__main__":
    main()
