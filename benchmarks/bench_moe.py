"""nf.moe.mlp against torch: its grouped product, or a loop over the experts, whichever is faster there.

Work is 6 d I operations a row and expert forward (gate, up, down), three times as many with the backward pass.
"""
import numpy as np

from benchmarks.harness import Suite, normal, seconds, torch
from numformer import Tensor, moe

# name: (tokens, d, I, experts, top_k, skew of the router, goals forward and with backward)
SHAPES = {
    "E8 d512 I1792 T4096 top-2": (4096, 512, 1792, 8, 2, 0.0, "1.1x torch", "1.0x torch"),
    "the same, a skewed router": (4096, 512, 1792, 8, 2, 1.0, None, None),
    "E64 d512 I256 T4096 top-2": (4096, 512, 256, 64, 2, 0.0, None, None),
    "E8 d128 I192 T1024 top-2": (1024, 128, 192, 8, 2, 0.0, None, None),
}


def loop(x, gate_up, down, ends):
    out = []
    begin = 0
    for e, end in enumerate(ends):
        gate, up = torch.nn.functional.linear(x[begin:end], gate_up[e]).chunk(2, dim=-1)
        out.append(torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[e]))
        begin = end
    return torch.cat(out)


def grouped(x, gate_up, down, ends):
    offsets = torch.tensor(ends, dtype=torch.int32)
    gate, up = torch._grouped_mm(x, gate_up.transpose(1, 2), offsets).chunk(2, dim=-1)
    return torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offsets)


def peer(routing, x, gate_up, down):
    """forward(), both(): torch's way, from tokens to tokens, by the faster of its products."""
    source = torch.from_numpy(routing.source)
    kept = routing.row >= 0
    order = np.empty(len(source), np.int64)
    order[routing.row[kept]] = np.flatnonzero(kept)
    weight = torch.from_numpy(routing.weight.reshape(-1)[order][:, None])
    ends = routing.offsets[1:].tolist()
    arrays = [torch.from_numpy(a).requires_grad_() for a in (x, gate_up, down)]
    dy = torch.ones(x.shape)

    def run(experts):
        rows = experts(arrays[0][source], *arrays[1:], ends)
        return torch.zeros_like(arrays[0]).index_add(0, source, rows * weight)

    def forward(experts):
        with torch.no_grad():
            return run(experts)

    def both(experts):
        torch.autograd.grad(run(experts), arrays, dy)

    forms = [loop]
    try:
        np.testing.assert_allclose(forward(grouped).numpy(), forward(loop).numpy(), atol=1e-3)
        forms.append(grouped)
    except (RuntimeError, AttributeError):
        pass            # this torch has none for float32 on a CPU

    def best(function):
        return min(forms, key=lambda form: min(seconds(lambda: function(form)) for _ in range(3)))

    first, second = best(forward), best(both)
    return lambda: forward(first), lambda: both(second)


def compare(suite, name):
    tokens, d, inner, experts, top_k, skew, *goals = SHAPES[name]
    x, gate_up, down = normal(tokens, d), normal(experts, 2 * inner, d) / d**0.5, normal(experts, d, inner) / d**0.5
    routing = moe.route(normal(tokens, experts) - skew * np.arange(experts, dtype=np.float32), top_k)
    dy = np.ones((tokens, d), np.float32)
    tensors = [Tensor(a, requires_grad=True) for a in (x, gate_up, down)]

    def both():
        moe.mlp(tensors[0], routing, *tensors[1:]).backward(dy)
        for t in tensors:
            t.grad = None

    theirs = peer(routing, x, gate_up, down) if torch else (None, None)
    work = 6 * d * inner * tokens * top_k
    suite.compare(f"forward {name}", work, goal=goals[0], rounds=5,
                  numformer=lambda: moe.mlp(x, routing, gate_up, down), torch=theirs[0])
    suite.compare(f"forward and backward {name}", 3 * work, goal=goals[1], rounds=5, numformer=both,
                  torch=theirs[1])


def main():
    suite = Suite("moe")
    for name in SHAPES:
        compare(suite, name)
    suite.finish()


if __name__ == "__main__":
    main()
