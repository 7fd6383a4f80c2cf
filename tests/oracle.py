"""float64 references, written naively and independently of the kernels."""
import math

import numpy as np

_erfc = np.vectorize(math.erfc, otypes=[float])


def gelu(x, approximate="none"):
    x = np.asarray(x, np.float64)
    if approximate == "none":
        return 0.5 * x * _erfc(-x / math.sqrt(2)) if x.size else x
    if approximate == "quick":
        return x / (1 + np.exp(-1.702 * x))
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def moe_route(logits, top_k, score="softmax", normalize=True, bias=None, num_groups=1, top_groups=1, scale=1.0):
    """(weight, expert_index, scores), token by token."""
    z = np.asarray(logits, np.float64)
    scores = softmax(z) if score == "softmax" else 1 / (1 + np.exp(-z))
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
            weight[t] /= weight[t].sum() + (1e-20 if score == "sigmoid" else 0)
    return weight * scale, index, scores


def moe_mlp(x, weight, index, gate_up, down, kept=None):
    """Every token through its experts, one at a time. kept (T, k): False where a slot was dropped."""
    y = np.zeros((len(x), down.shape[1]))
    for t in range(len(x)):
        for j, e in enumerate(index[t]):
            if e >= 0 and (kept is None or kept[t, j]):
                gate, up = np.split(gate_up[e].astype(np.float64) @ x[t], 2)
                y[t] += weight[t, j] * (down[e].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
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


def attention(q, k, v, mask=None, causal=None, scale=None):
    """(out, lse); `mask` boolean or added, `causal` None, "bottom_right" or "top_left". Masked slots are not read."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, heads, sq, dim), group, sk = q.shape, q.shape[1] // k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    seen = np.ones((batch, heads, sq, sk), bool)
    added = np.zeros((batch, heads, sq, sk))
    if mask is not None and mask.dtype == bool:
        seen &= mask
    elif mask is not None:
        seen &= mask > -np.inf
        added += mask
    if causal:
        seen &= np.tril(np.ones((sq, sk), bool), sk - sq if causal == "bottom_right" else 0)
    out, lse = np.zeros((batch, heads, sq, v.shape[3])), np.full((batch, heads, sq), -np.inf)
    for b, h, i in np.ndindex(batch, heads, sq):
        keys = np.flatnonzero(seen[b, h, i])
        if keys.size:
            s = scale * k[b, h // group, keys] @ q[b, h, i] + added[b, h, i, keys]
            p = np.exp(s - s.max())
            out[b, h, i] = p @ v[b, h // group, keys] / p.sum()
            lse[b, h, i] = s.max() + math.log(p.sum())
    return out, lse
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
    """Pairs as complex numbers, times exp(i angle)."""
    x, half, turn = np.asarray(x, np.float64), x.shape[-1] // 2, cos.astype(float) + 1j * sin
    if interleaved:
        z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)
