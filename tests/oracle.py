"""float64 references, written naively and independently of the kernels."""
import math

import numpy as np

_erfc = np.vectorize(math.erfc, otypes=[float])


def gated(x, z):
    """x / (1 + exp(-z)); its left tail too, where exp(-z) overflows and the result is not yet 0."""
    x, half = np.asarray(x, np.float64), np.exp(np.minimum(z, 0) / 2)
    return np.where(np.isneginf(x), 0, x * half / (1 + np.exp(-np.abs(z))) * half)


def gelu(x, approximate="none"):
    x = np.asarray(x, np.float64)
    if approximate == "none":
        return np.where(np.isneginf(x), 0, 0.5 * x * _erfc(-x / math.sqrt(2))) if x.size else x
    if approximate == "quick":
        return gated(x, 1.702 * x)
    return gated(x, 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def moe_route(logits, top_k, score="softmax", normalize=True, bias=None, num_groups=1, top_groups=1, scale=1.0):
    """(weight, expert_index, scores), token by token."""
    z = np.asarray(logits, np.float64)
    nothing = np.isneginf(z).all(1, keepdims=True)
    scores = np.where(nothing, 0, softmax(z)) if score == "softmax" else 1 / (1 + np.exp(-z))
    weight, index = np.zeros((len(z), top_k)), np.zeros((len(z), top_k), int)
    for t, s in enumerate(scores):
        choice = s if bias is None else s + bias
        groups = choice.reshape(num_groups, -1)
        best = np.sort(groups, axis=1)[:, ::-1][:, : 1 if score == "softmax" else 2].sum(1)
        allowed = np.zeros(groups.shape, bool)
        allowed[np.argsort(-best, kind="stable")[:top_groups]] = True
        index[t] = np.argsort(np.where(allowed.ravel(), -choice, np.inf), kind="stable")[:top_k]
        weight[t] = s[index[t]]
        if normalize:
            weight[t] /= weight[t].sum() + (1e-20 if score == "sigmoid" else 0) or 1
    return weight * scale, index, scores


def moe_mlp(x, weight, index, gate_up, down, kept=None):
    """Every token through its experts, one at a time. kept (T, k): False where a slot was dropped."""
    y = np.zeros((len(x), down.shape[1]))
    for t in range(len(x)):
        for j, e in enumerate(index[t]):
            if e >= 0 and (kept is None or kept[t, j]):
                gate, up = np.split(gate_up[e].astype(np.float64) @ x[t], 2)
                y[t] += weight[t, j] * (down[e].astype(np.float64) @ (gated(gate, gate) * up))
    return y


def ulps(got, want):
    """The error of `got` in units of the last place of `want`, a float64 array of more precise values. What is
    beyond the largest number must be inf."""
    got, want, info = np.asarray(got), np.asarray(want, np.float64), np.finfo(np.asarray(got).dtype)
    with np.errstate(over="ignore"):
        rounded = want.astype(got.dtype)
    finite = np.isfinite(got) & np.isfinite(rounded)
    exponent = np.frexp(np.where(finite, want, 1))[1] - 1
    unit = np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)
    with np.errstate(invalid="ignore"):
        error = np.abs(np.where(finite, got, 0).astype(np.float64) - np.where(finite, want, 0)) / unit
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(finite, error, np.where(same, 0, np.inf))


def philox(key, counter):
    """The four words of counters of four words, arrays that broadcast: Salmon et al. 2011, Philox 4x32-10."""
    x, k, low = [np.asarray(c, np.uint64) for c in counter], [key & 0xFFFFFFFF, key >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> 32) ^ x[1] ^ np.uint64(k[0]), b & low, (a >> 32) ^ x[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def _attention_rows(q, k, mask=None, causal=None, scale=None, *, align="bottom_right", window=(-1, -1), softcap=0.0,
                    slopes=None, kv_lengths=None, dropout=0.0, dropout_key=0):
    """(b, h, i, the keys that the row sees, how far they stand ahead, scores before the softcap, scores, factors of the
    dropout) of each row."""
    (batch, heads, sq, dim), group = q.shape, q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    full = None if mask is None else np.broadcast_to(mask, (batch, heads, sq, k.shape[2]))
    for b, h, i in np.ndindex(batch, heads, sq):
        length = k.shape[2] if kv_lengths is None else kv_lengths[b]
        position = i + (0 if "top_left" in (causal, align) else length - sq)
        j = np.arange(length)
        seen = np.ones(length, bool)
        if causal:
            seen &= j <= position
        if window[0] >= 0:
            seen &= j >= position - window[0]
        if window[1] >= 0:
            seen &= j <= position + window[1]
        if mask is not None:
            seen &= full[b, h, i, :length] if mask.dtype == bool else full[b, h, i, :length] != -np.inf
        keys = np.flatnonzero(seen)
        raw = scale * k[b, h // group, keys].astype(np.float64) @ (q[b, h, i].astype(np.float64) if keys.size else
                                                                   np.zeros(dim))
        s = softcap * np.tanh(raw / softcap) if softcap else raw
        if slopes is not None:
            s = s + np.broadcast_to(slopes, (batch, heads))[b, h] * (keys - position)
        if mask is not None and mask.dtype != bool:
            s = s + full[b, h, i, keys]
        factor = np.ones(keys.size)
        if dropout:
            words = np.stack(philox(dropout_key, (position & 0xFFFFFFFF, keys // 4, b * heads + h, 0 * keys)))
            factor = (words[keys % 4, np.arange(keys.size)] >= int(dropout * 2**32)) / (1 - dropout)
        yield b, h, i, keys, keys - position, raw, s, factor


def attention(q, k, v, mask=None, causal=None, scale=None, *, sinks=None, **features):
    """(out, lse); `mask` boolean or added, `causal` None, "bottom_right" or "top_left". Masked slots are not read, and
    a score of -inf masks."""
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for b, h, i, keys, _, _, s, factor in _attention_rows(q, k, mask, causal, scale, **features):
        if sinks is not None:
            s = np.append(s, sinks[h])
        if s.max(initial=-np.inf) != -np.inf:
            p = np.exp(s - s.max())
            weight = p[:keys.size] * factor
            taken = weight != 0
            out[b, h, i] = weight[taken] @ v[b, h // group, keys[taken]].astype(np.float64) / p.sum()
            lse[b, h, i] = s.max() + math.log(p.sum())
    return out, lse


def attention_gradients(q, k, v, dout, dlse=None, mask=None, causal=None, scale=None, *, sinks=None, **features):
    """The gradients by name: q, k, v, mask (the whole (B, H, Sq, Sk)), slopes (B, H), sinks (H,)."""
    (batch, heads, sq, dim), group = q.shape, q.shape[1] // k.shape[1]
    scale, softcap = 1 / math.sqrt(dim) if scale is None else scale, features.get("softcap", 0.0)
    g = {"q": np.zeros(q.shape), "k": np.zeros(k.shape), "v": np.zeros(v.shape),
         "mask": np.zeros((batch, heads, sq, k.shape[2])), "slopes": np.zeros((batch, heads)), "sinks": np.zeros(heads)}
    for b, h, i, keys, ahead, raw, s, factor in _attention_rows(q, k, mask, causal, scale, **features):
        if sinks is not None:
            s = np.append(s, sinks[h])
        if not s.size:
            continue
        p = np.exp(s - s.max())
        p /= p.sum()
        dy = dout[b, h, i].astype(np.float64) if keys.size else np.zeros(v.shape[3])
        dp = np.where(factor == 0, 0, factor * (v[b, h // group, keys].astype(np.float64) @ dy))
        dp = np.append(dp, [0] * (s.size - keys.size))
        ds = p * (dp - p @ dp + (0 if dlse is None else dlse[b, h, i]))
        g["sinks"][h] += ds[keys.size:].sum()
        ds = ds[:keys.size]
        kept = factor != 0
        g["v"][b, h // group, keys[kept]] += np.outer((p[:keys.size] * factor)[kept], dy)
        g["mask"][b, h, i, keys] = ds
        g["slopes"][b, h] += ds @ ahead
        if softcap:
            ds = ds * (1 - np.tanh(raw / softcap) ** 2)
        if keys.size:
            g["q"][b, h, i] = scale * ds @ k[b, h // group, keys].astype(np.float64)
            g["k"][b, h // group, keys] += scale * np.outer(ds, q[b, h, i].astype(np.float64))
    return g


def log_softmax(x):
    x = np.asarray(x, np.float64)
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def layer_norm(x, weight, bias, eps=1e-5):
    x = np.asarray(x, np.float64)
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x, weight, eps=1e-6):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    losses = []
    for x, t in zip(np.asarray(logits, np.float64), targets):
        logp = log_softmax(x)
        lse = x[0] - logp[0]
        losses.append(-(1 - label_smoothing) * logp[t] - label_smoothing * logp.mean() + z_loss * lse**2
                      if t != -100 else 0.0)
    if reduction == "none":
        return np.array(losses)
    return sum(losses) / (max(sum(targets != -100), 1) if reduction == "mean" else 1)


def rotary(x, cos, sin, interleaved):
    """Pairs (a, b) turned: (a cos - b sin, b cos + a sin)."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = a * cos - b * sin, b * cos + a * sin
    return np.stack(turned, -1).reshape(x.shape) if interleaved else np.concatenate(turned, -1)
