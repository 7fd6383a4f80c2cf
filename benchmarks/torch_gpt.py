"""numformer.models.GPT in torch, eager: the peer of the training step and of decoding. It takes the weights of ours."""
import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["TorchGPT"]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.size = config.n_head, config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rotary, cache, position):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3 * self.heads, self.size).transpose(1, 2).chunk(3, dim=1)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            keys, values = cache
            end = position + length
            keys[:, :, position:end], values[:, :, position:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Dense(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 2 * config.n_inner, bias=False)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """As Hugging Face runs them on a CPU where no grouped product applies: a loop over the experts that are hit."""

    def __init__(self, config):
        super().__init__()
        inner, self.top_k = config.n_inner // config.top_k, config.top_k
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.up = nn.Parameter(torch.empty(config.n_expert, 2 * inner, config.n_embd))
        self.down = nn.Parameter(torch.empty(config.n_expert, config.n_embd, inner))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(tokens).softmax(-1).topk(self.top_k, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for e in chosen.unique().tolist():
            token, slot = (chosen == e).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[token], self.up[e]).chunk(2, dim=-1)
            y.index_add_(0, token, F.linear(F.silu(gate) * up, self.down[e]) * weight[token, slot, None])
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attention = Attention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = Experts(config) if config.n_expert else Dense(config)

    def forward(self, x, rotary, cache, position):
        x = x + self.attention(self.norm_1(x), rotary, cache, position)
        return x + self.mlp(self.norm_2(x))


class TorchGPT(nn.Module):
    """The twin of `model` (rotary, RMSNorm, SwiGLU, tied embedding, no biases), with its weights."""

    def __init__(self, model):
        super().__init__()
        config = self.config = model.config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.rotary = [torch.from_numpy(table) for table in model.rotary]
        names = dict(self.named_parameters())
        with torch.no_grad():
            for name, array in model.state_dict().items():
                target = names.get(name, names.get(f"{name}.weight"))
                target.copy_(torch.from_numpy(array))

    def cache(self, batch, length):
        config = self.config
        shape = (batch, config.n_head, length, config.n_embd // config.n_head)
        return [(torch.empty(shape), torch.empty(shape)) for _ in self.blocks]

    def forward(self, tokens, caches=None, position=0):
        """Logits of every position; with caches, of the positions from `position` on."""
        x = self.embedding(tokens) * math.sqrt(self.config.n_embd)
        rotary = [table[position:position + tokens.shape[1]] for table in self.rotary]
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, caches[i] if caches else None, position)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens, targets):
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
