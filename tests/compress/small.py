"""Small models and batches for these tests."""
import numpy as np

import numformer as nf


def gpt(seed=0, **options):
    shape = {"vocab_size": 40, "block_size": 24, "n_layer": 3, "n_head": 4, "n_embd": 32} | options
    return nf.models.GPT(nf.models.GPTConfig(**shape), rng=np.random.default_rng(seed))


def batches(count=2, rows=3, length=12, seed=5):
    rng = np.random.default_rng(seed)
    return [(t[:, :-1], t[:, 1:]) for t in (rng.integers(0, 40, (rows, length + 1)) for _ in range(count))]


def padded(rows=4, seed=6):
    """A batch of unequal rows, as CompletionBatches gives it, and each of them as a batch without its padding."""
    rng = np.random.default_rng(seed)
    pairs = [(rng.integers(0, 40, 3), rng.integers(0, 40, length)) for length in rng.integers(2, 20, rows)]
    return nf.rlhf.CompletionBatches.collate(pairs), [nf.rlhf.CompletionBatches.collate([pair]) for pair in pairs]


def silenced(model, heads):
    """A twin of the model in which these heads, a dict of layer to list, say nothing."""
    twin = model.as_arrays()
    for layer, gone in heads.items():
        attention = twin.blocks[layer].attention
        attention.head_gate = np.ones(attention.n_head, attention.out.dtype)
        attention.head_gate[gone] = 0
    return twin
