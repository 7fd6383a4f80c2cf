"""GPT written a second time, in torch, from its formulas: what tests compare the model with."""
import math


def logits(torch, model, tokens):
    """Logits (B, S, V) for `tokens` (B, S) with the weights of `model`; and the leaves, by name."""
    c = model.config
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in model.state_dict().items()}

    def norm(x, name):
        weight = leaves[name + ".weight"]
        if c.norm == "rms":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, leaves.get(name + ".bias"), 1e-5)

    def linear(x, name):
        y = x @ leaves[name].T
        return y + leaves[name + "_bias"] if name + "_bias" in leaves else y

    def rotate(x):
        half = x.shape[-1] // 2
        frequency = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(x, name, n_head, n_kv_head, slopes):
        batch, length, width = *x.shape[:2], c.n_embd // c.n_head
        q, k, v = linear(x, name + ".qkv").split([n_head * width, n_kv_head * width, n_kv_head * width], -1)
        q, k, v = (t.reshape(batch, length, -1, width).transpose(1, 2) for t in (q, k, v))
        if c.position == "rotary":
            q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(n_head // n_kv_head, 1) for t in (k, v))
        score = q @ k.transpose(-1, -2) / math.sqrt(width)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        if c.position == "alibi":
            score = score - slopes[:, None, None] * distance
        hidden = (distance < 0) | (distance >= (c.window or length))
        score = score.masked_fill(hidden, -math.inf)
        y = (score.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, n_head * width)
        return linear(y, name + ".out")

    def swiglu(x, up, down):
        gate, value = (x @ up.T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * value @ down.T

    def feed_forward(x, name):
        if c.n_expert:
            weight, chosen = (x @ leaves[name + ".router"].T).softmax(-1).topk(c.top_k, -1)
            weight = weight / weight.sum(-1, keepdim=True)
            y = torch.zeros_like(x)
            for e in range(c.n_expert):
                share = (weight * (chosen == e)).sum(-1, keepdim=True)
                y = y + share * swiglu(x, leaves[name + ".up"][e], leaves[name + ".down"][e])
            return y
        hidden = linear(x, name + ".up")
        if c.activation == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * value
        else:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh" if c.activation == "gelu_tanh" else "none")
        return linear(hidden, name + ".down")

    tokens = torch.as_tensor(tokens)
    x = leaves["embedding.weight"][tokens] * (math.sqrt(c.n_embd) if c.init == "xavier" else 1.0)
    if c.position == "learned":
        x = x + leaves["position.weight"][:tokens.shape[1]]
    for layer in range(c.n_layer):
        n_head, n_kv_head = c.layer_heads[layer] if c.layer_heads else (c.n_head, c.n_kv_head or c.n_head)
        name = f"blocks.{layer}."
        heads = torch.as_tensor(c.alibi_heads[layer] if c.alibi_heads else range(c.n_head), dtype=x.dtype)
        slopes = 2.0 ** (-8 * (heads + 1) / c.n_head)           # of a power of two of heads
        x = x + attention(norm(x, name + "norm_1"), name + "attention", n_head, n_kv_head, slopes)
        x = x + feed_forward(norm(x, name + "norm_2"), name + "mlp")
    return norm(x, "norm") @ leaves.get("head", leaves["embedding.weight"]).T, leaves
