"""What the tape itself costs: a recorded op and its way back, beside the arithmetic that it does."""
from benchmarks.harness import Suite, normal, torch
from numformer import Tensor
from numformer.tensor import apply

OPS = 1000


def _forward(a, b):
    return a, None


def _backward(dy, saved):
    return dy, None


def _chain(x):
    y = x
    for _ in range(OPS):
        y = apply(_forward, _backward, y, x)
    return y


def main():
    suite = Suite("tape")
    x, one = Tensor(normal(4), requires_grad=True), normal(4)

    def both():
        x.grad = None
        _chain(x).backward(one)

    def add():
        y = x
        for _ in range(OPS):
            y = y + x

    suite.compare("1000 empty ops, recorded", OPS, None, unit="ops", goal="0.4 M ops/s (2.5 us)",
                  numformer=lambda: _chain(x))
    suite.compare("1000 empty ops, recorded and walked back", OPS, None, unit="ops", numformer=both)
    theirs = None
    if torch is not None:
        t = torch.ones(4, requires_grad=True)

        def theirs():
            y = t
            for _ in range(OPS):
                y = y + t

    suite.compare("1000 additions of 4 numbers, recorded", OPS, None, unit="ops", numformer=add, torch=theirs)
    suite.finish()


if __name__ == "__main__":
    main()
