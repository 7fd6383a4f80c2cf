"""A whole GPT against the same model in torch, eager: the training step, and cached decoding.

    python -m benchmarks.bench_gpt [train] [decode]

A training step is the forward pass, the loss, the backward pass, the gradient's norm and clipping, and AdamW (torch:
fused). Its work is 6 operations a parameter and token (the embedding counts as the last layer's weight), and
6 L S d a token for causal attention. Decoding takes the demo's model; its work is one token for each row.
"""
import sys

import numpy as np

from benchmarks.harness import Suite, torch
from numformer import no_grad
from numformer.models import GPT, GPTConfig
from numformer.train import AdamW

# name: (config, batch, goal)
TRAINING = {
    "GPT V8192 d384 L6 S256 B8": (GPTConfig(8192, 256, 6, 6, 384), 8, "1.25x torch"),
    "GPT V8192 d256 L4 S256 B8": (GPTConfig(8192, 256, 4, 4, 256), 8, None),
    "the demo's GPT, V4096 d128 L4 S128 B8": (GPTConfig(4096, 128, 4, 4, 128), 8, None),
    "the demo's GPT with 8 experts": (GPTConfig(4096, 128, 4, 4, 128, n_expert=8), 8, None),
}
DECODING = {
    "the demo's GPT, 1 row": (GPTConfig(4096, 128, 4, 4, 128), 1, "3x torch"),
    "the demo's GPT, 16 rows": (GPTConfig(4096, 128, 4, 4, 128), 16, None),
    "the demo's GPT with 8 experts, 1 row": (GPTConfig(4096, 128, 4, 4, 128, n_expert=8), 1, "3x torch"),
}


def operations(model, batch):
    """Of one training step."""
    c = model.config
    active = sum(p.size for name, p in model.named_parameters() if p.ndim == 2)
    active += sum(p.size for p in model.parameters() if p.ndim == 3) * c.top_k // max(c.n_expert, 1)
    return batch * c.block_size * (6 * active + 12 * c.n_layer * c.block_size * c.n_embd // 2)


def peer(model):
    if torch is None:
        return None
    from benchmarks.torch_gpt import TorchGPT
    theirs = TorchGPT(model)
    tokens = np.arange(2 * 16).reshape(2, 16)
    with torch.no_grad(), no_grad():
        np.testing.assert_allclose(model(tokens).numpy(), theirs(torch.from_numpy(tokens)).numpy(), atol=1e-3)
    return theirs


def train(suite, name):
    config, batch, goal = TRAINING[name]
    rng = np.random.default_rng(0)
    model = GPT(config, rng=rng)
    theirs = peer(model)
    optimizer = AdamW(model.parameters(), 1e-4)
    tokens = rng.integers(0, config.vocab_size, (batch, config.block_size + 1))

    def step():
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step(1.0)
        optimizer.zero_grad()

    their_step = None
    if theirs is not None:
        their_optimizer = torch.optim.AdamW(theirs.parameters(), 1e-4, betas=(0.9, 0.98), fused=True)
        t = torch.from_numpy(tokens)

        def their_step():
            theirs.loss(t[:, :-1], t[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            their_optimizer.step()
            their_optimizer.zero_grad()

    suite.compare(f"training step, {name}", operations(model, batch), goal=goal, rounds=7, numformer=step,
                  torch=their_step)


def decode(suite, name, prompt=16, new=96):
    config, batch, goal = DECODING[name]
    rng = np.random.default_rng(0)
    model = GPT(config, rng=rng)
    theirs = peer(model)
    start = rng.integers(0, config.vocab_size, (batch, prompt))

    def ours():
        model.generate(start, new, rng=np.random.default_rng(1))

    their_decode = None
    if theirs is not None:
        def their_decode():
            with torch.inference_mode():
                caches, tokens, position = theirs.cache(batch, prompt + new), torch.from_numpy(start), 0
                for _ in range(new):
                    logits = theirs(tokens, caches, position)[:, -1]
                    position += tokens.shape[1]
                    tokens = torch.multinomial(logits.softmax(-1), 1)

    suite.compare(f"decoding, {name}", new * batch, None, unit="tokens", goal=goal, rounds=7, numformer=ours,
                  torch=their_decode)


def main():
    suite = Suite("gpt")
    for which in sys.argv[1:] or ["train", "decode"]:
        for name in TRAINING if which == "train" else DECODING:
            (train if which == "train" else decode)(suite, name)
    suite.finish()


if __name__ == "__main__":
    main()
