"""scaled_dot_product_attention against torch's: forward, backward, and decode.

    python -m benchmarks.bench_attention [forward] [backward] [decode] [step]

Work is counted as 4 S^2 D operations a head, half of it causal; the backward pass 2.5 times as many. Decode counts
the bytes of the keys and values, each once, over copies that together lie beyond every cache.
"""
import sys

from benchmarks.harness import Suite, normal, torch
from numformer import scaled_dot_product_attention
from numformer.ops.attention import attention_backward, attention_forward

# name: (B, H, Hkv, S, D, causal), goals of forward and backward
SHAPES = {
    "B1 H8 S2048 D128 full": ((1, 8, 8, 2048, 128, False), "1.2x torch", "1.2x torch"),
    "B1 H8 S2048 D128 causal": ((1, 8, 8, 2048, 128, True), "1.4x torch", "1.35x torch"),
    "B4 H12 S1024 D64 causal": ((4, 12, 12, 1024, 64, True), "1.6x torch", "1.5x torch"),
    "B1 H32:8 S1024 D128 causal": ((1, 32, 8, 1024, 128, True), None, None),
    "B8 H6 S256 D64 causal": ((8, 6, 6, 256, 64, True), None, None),
    "B8 H4 S128 D32 causal": ((8, 4, 4, 128, 32, True), None, None),
}
DECODE = {
    "B8 H32:8 4096 keys D128": (8, 32, 8, 4096, 128),
    "B8 H12 1024 keys D64": (8, 12, 12, 1024, 64),
}
STEP = {"B1 H4 100 keys D32": (1, 4, 4, 100, 32), "B1 H4 300 keys D32": (1, 4, 4, 300, 32)}


def sdpa(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal,
                                                            enable_gqa=q.shape[1] != k.shape[1])


def arrays(batch, heads, kv_heads, sq, sk, dim):
    return normal(batch, heads, sq, dim), normal(batch, kv_heads, sk, dim), normal(batch, kv_heads, sk, dim)


def prefill(suite, name, which):
    (batch, heads, kv_heads, length, dim, causal), *goals = SHAPES[name]
    q, k, v = arrays(batch, heads, kv_heads, length, length, dim)
    work = 4 * batch * heads * length * length * dim * (0.5 if causal else 1)
    theirs = torch and [torch.from_numpy(x) for x in (q, k, v)]
    rounds = 5 if length >= 1024 else 9
    if which == "forward":
        peer = None
        if torch:
            def peer():
                with torch.no_grad():
                    sdpa(*theirs, causal)
        suite.compare(f"forward {name}", work, goal=goals[0], rounds=rounds,
                      numformer=lambda: scaled_dot_product_attention(q, k, v, is_causal=causal), torch=peer)
        return
    _, saved = attention_forward(q, k, v, None, int(causal))
    dout = normal(*q.shape)
    peer = None
    if torch:
        leaves = [x.clone().requires_grad_() for x in theirs]
        y, gradient = sdpa(*leaves, causal), torch.from_numpy(dout)

        def peer():
            torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    suite.compare(f"backward {name}", 2.5 * work, goal=goals[1], rounds=rounds,
                  numformer=lambda: attention_backward(dout, saved), torch=peer)


def decode(suite, name):
    batch, heads, kv_heads, keys, dim = DECODE[name]
    size = 2 * batch * kv_heads * keys * dim * 4
    sets = [arrays(batch, heads, kv_heads, 1, keys, dim) for _ in range(max(1, (160 << 20) // size))]
    theirs = torch and [[torch.from_numpy(x) for x in s] for s in sets]
    peer = None
    if torch:
        def peer():
            with torch.no_grad():
                for s in theirs:
                    sdpa(*s, False)
    suite.compare(f"decode {name}", size * len(sets), "read", goal="88 %", rounds=7,
                  numformer=lambda: [scaled_dot_product_attention(*s, is_causal=True) for s in sets], torch=peer)


def step(suite, name):
    batch, heads, kv_heads, keys, dim = STEP[name]
    q, k, v = arrays(batch, heads, kv_heads, 1, keys, dim)
    caches = [normal(batch, kv_heads, 512, dim) for _ in range(2)]
    k, v = (x[:, :, :keys] for x in caches)
    peer = None
    if torch:
        theirs = [torch.from_numpy(x) for x in (q, k, v)]

        def peer():
            with torch.no_grad():
                sdpa(*theirs, False)
    suite.compare(f"step {name}, calls/s", 1e9, None, rounds=7,
                  numformer=lambda: scaled_dot_product_attention(q, k, v, is_causal=True), torch=peer)


def main():
    chosen = sys.argv[1:] or ["forward", "backward", "decode", "step"]
    suite = Suite("attention")
    for which in chosen:
        for name in {"decode": DECODE, "step": STEP}.get(which, SHAPES):
            {"decode": decode, "step": step}[which](suite, name) if which in ("decode", "step") else \
                prefill(suite, name, which)
    suite.finish()


if __name__ == "__main__":
    main()
