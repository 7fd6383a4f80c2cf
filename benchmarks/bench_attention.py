"""scaled_dot_product_attention against torch's: forward, backward, and decode.

    python -m benchmarks.bench_attention [forward] [backward] [features] [decode] [step]

Work is counted as 4 S^2 D operations a head, half of it causal; the backward pass 2.5 times as many. Decode counts
the bytes of the keys and values, each once, over copies that together lie beyond every cache. A feature is compared
with the same attention without it; of a window only the pairs inside count.
"""
import sys

from benchmarks.harness import Suite, normal, torch  # isort: skip

import numpy as np

from numformer import alibi_slopes, paged_attention, scaled_dot_product_attention
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward

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
FEATURES = {
    "ALiBi": ({"alibi_slopes": alibi_slopes(8)}, "95 % of plain"),
    "softcap": ({"softcap": 30.0}, "80 % of plain"),
    "added mask": ({"attn_mask": normal(2048, 2048)}, "85 % of plain"),
    "added mask and its gradient": ({"attn_mask": normal(2048, 2048)}, None),
    "dropout": ({"dropout_p": 0.1}, "75 % of plain"),
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
    _, saved = attention_forward(q, k, v, is_causal=causal)
    dout = normal(*q.shape)
    peer = None
    if torch:
        leaves = [x.clone().requires_grad_() for x in theirs]
        y, gradient = sdpa(*leaves, causal), torch.from_numpy(dout)

        def peer():
            torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    suite.compare(f"backward {name}", 2.5 * work, goal=goals[1], rounds=rounds,
                  numformer=lambda: attention_backward(dout, saved), torch=peer)


def feature(suite, name):
    q, k, v = arrays(1, 8, 8, 2048, 2048, 64)
    keywords, goal = FEATURES[name]
    work, dout = 2 * 8 * 2048 * 2048 * 64, normal(*q.shape)
    rng = np.random.default_rng(0)
    extra = {**keywords, "rng": rng} if name == "dropout" else keywords
    if "gradient" not in name:
        suite.compare(f"forward D64 causal, {name}", work, goal=goal, rounds=7,
                      numformer=lambda: scaled_dot_product_attention(q, k, v, is_causal=True, **extra),
                      plain=lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    _, plain = attention_forward(q, k, v, is_causal=True)
    _, saved = attention_forward(q, k, v, is_causal=True, gradients=("mask",) if "gradient" in name else (), **extra)
    suite.compare(f"backward D64 causal, {name}", 2.5 * work, goal=goal, rounds=7,
                  numformer=lambda: attention_backward(dout, saved), plain=lambda: attention_backward(dout, plain))


def window(suite, length, size):
    q, k, v = arrays(1, 8, 8, length, length, 64)
    work, keywords = 4 * 8 * 64 * (length * (size + 1) - size * (size + 1) / 2), {"window_size": (size, 0)}
    suite.compare(f"forward S{length} D64 window {size}", work, goal="65 %", rounds=5,
                  numformer=lambda: scaled_dot_product_attention(q, k, v, **keywords))
    _, saved = attention_forward(q, k, v, **keywords)
    dout = normal(*q.shape)
    suite.compare(f"backward S{length} D64 window {size}", 2.5 * work, goal="58 %", rounds=5,
                  numformer=lambda: attention_backward(dout, saved))


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


def paged(suite):
    batch, heads, kv_heads, keys, dim = 8, 32, 8, 4096, 128
    q, k, v = arrays(batch, heads, kv_heads, 1, keys, dim)
    table = np.random.default_rng(0).permutation(batch * keys // 16).reshape(batch, -1)
    caches = [np.empty((table.size, 16, kv_heads, dim), np.float32) for _ in range(2)]
    for cache, x in zip(caches, (k, v)):
        cache[table] = x.reshape(batch, kv_heads, -1, 16, dim).transpose(0, 2, 3, 1, 4)
    lengths = np.full(batch, keys)
    suite.compare("decode B8 H32:8 4096 keys D128, blocks of 16", 2 * batch * kv_heads * keys * dim * 4, "read",
                  goal="82 %", rounds=7, numformer=lambda: paged_attention(q, *caches, table, lengths),
                  contiguous=lambda: scaled_dot_product_attention(q, k, v, is_causal=True))


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
    suite.compare(f"step {name}", 1, None, unit="calls", rounds=7,
                  numformer=lambda: scaled_dot_product_attention(q, k, v, is_causal=True), torch=peer)


def main():
    chosen = sys.argv[1:] or ["forward", "backward", "features", "decode", "step"]
    suite = Suite("attention")
    for which in chosen:
        if which == "decode":
            paged(suite)
        if which == "features":
            for name in FEATURES:
                feature(suite, name)
            window(suite, 8192, 512)
            continue
        for name in {"decode": DECODE, "step": STEP}.get(which, SHAPES):
            {"decode": decode, "step": step}[which](suite, name) if which in ("decode", "step") else \
                prefill(suite, name, which)
    suite.finish()


if __name__ == "__main__":
    main()
