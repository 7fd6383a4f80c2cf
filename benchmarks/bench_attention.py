"""scaled_dot_product_attention against torch's: forward, backward, and decode.

    python -m benchmarks.bench_attention [forward] [backward] [features] [storage] [decode] [paged] [step]

Work is counted as 4 S^2 D operations a head, half of it causal; the backward pass 2.5 times as many. Decode counts
the bytes of the keys and values, each once, over copies that together lie beyond every cache. A feature is compared
with the same attention without it; of a window only the pairs inside count.
"""
import functools
import sys

from benchmarks.harness import Suite, normal, torch  # isort: skip

import numpy as np

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

from numformer import alibi_slopes, paged_attention, scaled_dot_product_attention
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward

# name: (B, H, Hkv, S, D, causal), goals of forward and backward
SHAPES = {
    "B1 H8 S2048 D128 full": ((1, 8, 8, 2048, 128, False), "88 %, 1.3x torch", "82 %, 1.3x torch"),
    "B1 H8 S2048 D128 causal": ((1, 8, 8, 2048, 128, True), "84 %, 1.5x torch", "79 %, 1.45x torch"),
    "B1 H8 S2048 D64 full": ((1, 8, 8, 2048, 64, False), "84 %, 1.3x torch", "80 %, 1.3x torch"),
    "B1 H8 S2048 D64 causal": ((1, 8, 8, 2048, 64, True), "80 %, 1.5x torch", "76 %, 1.5x torch"),
    "B4 H12 S1024 D64 causal": ((4, 12, 12, 1024, 64, True), "78 %, 1.75x torch", "70 %, 1.7x torch"),
    "B1 H32:8 S1024 D128 causal": ((1, 32, 8, 1024, 128, True), "82 %, 1.7x torch", "74 %, 1.6x torch"),
    "B8 H6 S256 D64 causal": ((8, 6, 6, 256, 64, True), None, None),
    "B8 H4 S128 D32 causal": ((8, 4, 4, 128, 32, True), None, None),
}
DECODE = {
    "B8 H32:8 4096 keys D128": ((8, 32, 8, 4096, 128), "88 %, 2.5x torch"),
    "B1 H32:8 32768 keys D128": ((1, 32, 8, 32768, 128), "85 %"),
    "B1 H32:1 32768 keys D128": ((1, 32, 1, 32768, 128), None),
    "B8 H12 1024 keys D64": ((8, 12, 12, 1024, 64), None),
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


def window(suite, length, size, goals):
    """A causal window of `size` keys and its own, beside as many dense scores."""
    q, k, v = arrays(1, 8, 8, length, length, 64)
    work, keywords = 4 * 8 * 64 * (length * (size + 1) - size * (size + 1) / 2), {"window_size": (size, 0)}
    few = [x[:, :, :size + 1] for x in (k, v)]
    suite.compare(f"forward S{length} D64 window {size}", work, goal=goals[0], rounds=5,
                  numformer=lambda: scaled_dot_product_attention(q, k, v, **keywords),
                  dense=lambda: scaled_dot_product_attention(q, *few))
    _, saved = attention_forward(q, k, v, **keywords)
    _, dense = attention_forward(q, *few)
    dout = normal(*q.shape)
    suite.compare(f"backward S{length} D64 window {size}", 2.5 * work, goal=goals[1], rounds=5,
                  numformer=lambda: attention_backward(dout, saved), dense=lambda: attention_backward(dout, dense))


def decode(suite, name):
    (batch, heads, kv_heads, keys, dim), goal = DECODE[name]
    size = 2 * batch * kv_heads * keys * dim * 4
    sets = [arrays(batch, heads, kv_heads, 1, keys, dim) for _ in range(max(1, (160 << 20) // size))]
    theirs = torch and [[torch.from_numpy(x) for x in s] for s in sets]
    peer = None
    if torch:
        def peer():
            with torch.no_grad():
                for s in theirs:
                    sdpa(*s, False)
    suite.compare(f"decode {name}", size * len(sets), "read", goal=goal, rounds=7,
                  numformer=lambda: [scaled_dot_product_attention(*s, is_causal=True) for s in sets], torch=peer)


def storage(suite, name):
    """bfloat16 against the same in float32."""
    if ml_dtypes is None:
        return
    batch, heads, kv_heads, length, dim, causal = SHAPES[name][0]
    plain = arrays(batch, heads, kv_heads, length, length, dim)
    short = [x.astype(ml_dtypes.bfloat16) for x in plain]
    work = 4 * batch * heads * length * length * dim * (0.5 if causal else 1)
    suite.compare(f"forward {name}, bfloat16", work, goal="90 % of float32", rounds=5,
                  numformer=lambda: scaled_dot_product_attention(*short, is_causal=causal),
                  float32=lambda: scaled_dot_product_attention(*plain, is_causal=causal))


def paged(suite, dtype, goal, other=None):
    """A step on a cache of blocks of 16; `other` is the dtype of a cache of the same numbers to compare with."""
    batch, heads, kv_heads, keys, dim = 8, 32, 8, 4096, 128
    q, k, v = arrays(batch, heads, kv_heads, 1, keys, dim)
    table, lengths = np.random.default_rng(0).permutation(batch * keys // 16).reshape(batch, -1), np.full(batch, keys)
    calls = {}
    for kind in filter(None, (dtype, other)):
        caches = [np.empty((table.size, 16, kv_heads, dim), kind) for _ in range(2)]
        scale = np.full((table.size, 16), 1 / 32, np.float32)
        for cache, x in zip(caches, (k, v)):
            x = np.rint(x * 32).clip(-127, 127) if kind == "int8" else x
            cache[table] = x.reshape(batch, kv_heads, -1, 16, dim).transpose(0, 2, 3, 1, 4).astype(kind)
        scales = {"key_scale": scale, "value_scale": scale} if kind == "int8" else {}
        calls[kind] = functools.partial(paged_attention, q, *caches, table, lengths, **scales)
    if other is None:
        calls["contiguous"] = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    size = 2 * batch * kv_heads * keys * dim * np.dtype(dtype).itemsize
    calls = {"numformer": calls.pop(dtype), **calls}
    suite.compare(f"decode B8 H32:8 4096 keys D128, blocks of 16, {dtype}", size, "read", goal=goal, rounds=7, **calls)


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
    chosen = sys.argv[1:] or ["forward", "backward", "features", "storage", "decode", "paged", "step"]
    suite = Suite("attention")
    for which in chosen:
        if which == "paged":
            paged(suite, "float32", "82 %")
            paged(suite, "float16", None, "float32")
            paged(suite, "int8", "1.7x float16", "float16")
            continue
        if which == "storage":
            storage(suite, "B1 H8 S2048 D128 full")
            storage(suite, "B1 H8 S2048 D64 causal")
            continue
        if which == "features":
            for name in FEATURES:
                feature(suite, name)
            window(suite, 8192, 512, ("65 %", "58 %"))
            window(suite, 65536, 1024, ("0.77x dense", "0.77x dense"))
            continue
        for name in {"decode": DECODE, "step": STEP}.get(which, SHAPES):
            {"decode": decode, "step": step}[which](suite, name) if which in ("decode", "step") else \
                prefill(suite, name, which)
    suite.finish()


if __name__ == "__main__":
    main()
