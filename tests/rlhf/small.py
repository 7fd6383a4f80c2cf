"""Small models and prompts for these tests."""
import numpy as np

import numformer as nf
from numformer import rlhf

EOS, LIKED, VOCAB = 1, 7, 24


def gpt(seed=0, **options):
    shape = {"vocab_size": VOCAB, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16} | options
    return nf.models.GPT(nf.models.GPTConfig(**shape), rng=np.random.default_rng(seed))


def prompts(count=12, least=1, most=9, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, rng.integers(least, most + 1)).tolist() for _ in range(count)]


def liked(prompts, completions):
    """The share of one token among eight."""
    return [row.count(LIKED) / 8 for row in completions]


def ppo(seed=0, policy=None, reference=None, reward_fn=liked, pretrain=None, model=None, **options):
    policy = policy or gpt(seed, **(model or {}))
    numbers = {"batch": 16, "minibatch": 8, "epochs": 2, "max_new_tokens": 8, "eos_id": EOS, "lr": 3e-3} | options
    return rlhf.PPO(policy, reference, rlhf.ValueModel.from_gpt(policy, rng=np.random.default_rng(1)), reward_fn,
                    prompts(), rlhf.PPOConfig(**numbers), rng=np.random.default_rng(seed), pretrain=pretrain)
