"""How much of everything a run does.

The numbers come from ``--minutes`` by the table below, so that two runs of the same length, seed and data do the same
steps, however fast or busy their machines are. Between two rows of the table counts lie on the line between them.
"""
from dataclasses import dataclass, fields

from numformer.demo.errors import DemoError

__all__ = ["Plan", "plan_for"]


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes
    ----------
    minutes : int
        What the row is meant to take on two cores.
    vocab_size, block_size, n_layer, n_head, n_embd, n_inner, n_expert : of the GPT
    train_bytes : int
        Text that is read at most.
    batch, steps, warmup : int
        Of pretraining, for each of the two models.
    lr : float
    evaluations, probe_windows, test_windows : int
        Looks at the held-out text during training, windows of each, and windows of the last look.
    sft_steps, sft_batch : int
    pairs, test_pairs, reward_steps : int
        Preferences to learn and to test the reward model with, and its steps (16 pairs each).
    ppo_iterations, ppo_batch, ppo_minibatch, ppo_epochs : int
    test_prompts, best_of : int
        Held-out prompts that rewards are measured on, and samples of each for the best-of-n line.
    header_tokens, body_tokens : int
        The longest prompt and completion.
    calibration : int
        Windows that head importance and GPTQ look at.
    decode_tokens : int
        Tokens generated to measure speed.
    """

    minutes: int
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    n_expert: int
    train_bytes: int
    batch: int
    steps: int
    warmup: int
    lr: float
    evaluations: int
    probe_windows: int
    test_windows: int
    sft_steps: int
    sft_batch: int
    pairs: int
    test_pairs: int
    reward_steps: int
    ppo_iterations: int
    ppo_batch: int
    ppo_minibatch: int
    ppo_epochs: int
    test_prompts: int
    best_of: int
    header_tokens: int
    body_tokens: int
    calibration: int
    decode_tokens: int


_ROWS = [
    # 0: every stage in a few seconds, for tests; the models learn nothing
    Plan(0, vocab_size=1024, block_size=96, n_layer=2, n_head=4, n_embd=16, n_inner=32, n_expert=4,
         train_bytes=2_000_000, batch=4, steps=12, warmup=3, lr=3e-3, evaluations=3, probe_windows=8, test_windows=16,
         sft_steps=8, sft_batch=4, pairs=32, test_pairs=8, reward_steps=6,
         ppo_iterations=3, ppo_batch=8, ppo_minibatch=4, ppo_epochs=1, test_prompts=8, best_of=2,
         header_tokens=32, body_tokens=60, calibration=4, decode_tokens=16),
    Plan(1, vocab_size=2048, block_size=128, n_layer=3, n_head=4, n_embd=96, n_inner=256, n_expert=8,
         train_bytes=4_000_000, batch=8, steps=60, warmup=10, lr=3e-3, evaluations=4, probe_windows=32,
         test_windows=128, sft_steps=40, sft_batch=16, pairs=128, test_pairs=64, reward_steps=8,
         ppo_iterations=3, ppo_batch=32, ppo_minibatch=16, ppo_epochs=1, test_prompts=32, best_of=4,
         header_tokens=24, body_tokens=48, calibration=16, decode_tokens=64),
    Plan(6, vocab_size=4096, block_size=128, n_layer=4, n_head=4, n_embd=128, n_inner=384, n_expert=8,
         train_bytes=16_000_000, batch=8, steps=800, warmup=50, lr=3e-3, evaluations=10, probe_windows=128,
         test_windows=1100, sft_steps=280, sft_batch=16, pairs=512, test_pairs=128, reward_steps=64,
         ppo_iterations=16, ppo_batch=64, ppo_minibatch=32, ppo_epochs=2, test_prompts=96, best_of=8,
         header_tokens=24, body_tokens=48, calibration=64, decode_tokens=100),
    Plan(60, vocab_size=4096, block_size=128, n_layer=4, n_head=4, n_embd=128, n_inner=384, n_expert=8,
         train_bytes=16_000_000, batch=8, steps=4400, warmup=200, lr=3e-3, evaluations=24, probe_windows=128,
         test_windows=1100, sft_steps=900, sft_batch=16, pairs=512, test_pairs=256, reward_steps=160,
         ppo_iterations=20, ppo_batch=256, ppo_minibatch=32, ppo_epochs=2, test_prompts=256, best_of=16,
         header_tokens=24, body_tokens=48, calibration=128, decode_tokens=100),
]
# what is grown with the minutes; everything else is that of the row above
_GROWING = {"steps", "warmup", "evaluations", "sft_steps", "reward_steps", "ppo_iterations", "test_prompts"}


def plan_for(minutes):
    """The plan of a run of `minutes`, a whole number from 0 to 60. DemoError otherwise."""
    if not 0 <= minutes <= _ROWS[-1].minutes:
        raise DemoError(f"--minutes must be from 0 to {_ROWS[-1].minutes}, got {minutes}")
    low = max((row for row in _ROWS if row.minutes <= minutes), key=lambda row: row.minutes)
    high = min((row for row in _ROWS if row.minutes >= minutes), key=lambda row: row.minutes)
    if low is high:
        return low
    share = (minutes - low.minutes) / (high.minutes - low.minutes)
    values = {field.name: getattr(low, field.name) for field in fields(Plan)}
    for name in _GROWING:
        values[name] = round(values[name] + share * (getattr(high, name) - values[name]))
    return Plan(**values | {"minutes": minutes})
