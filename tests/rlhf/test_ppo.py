"""The loop: exact first steps, learning, checkpoints, and what it refuses."""
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import numformer as nf
from numformer import rlhf
from tests.rlhf.small import EOS, LIKED, VOCAB, gpt, liked, ppo, prompts

KINDS = {"dense": {}, "experts": {"n_expert": 4}, "dropout": {"dropout": 0.3},
         "untied": {"tie_embedding": False, "position": "learned", "n_kv_head": 1}}
METRICS = {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
           "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg",
           "loss/value_avg", "val/ratio", "val/ratio_var", "val/clipfrac_avg", "val/num_eos_tokens", "kl_coef",
           "explained_variance", "lr", "episode", "length", "norm/policy", "norm/value"}


@pytest.mark.parametrize(("batch", "minibatch"), [(1, 1), (4, 2), (12, 12), (33, 11)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_kl_is_exactly_0_and_the_first_ratio_exactly_1(kind, temperature, batch, minibatch):
    loop = ppo(model=KINDS[kind], batch=batch, minibatch=minibatch, temperature=temperature, epochs=1)
    rollout = loop.rollout()
    np.testing.assert_array_equal(rollout.logp, rollout.ref_logp)
    assert rollout.metrics["objective/kl"] == 0.0 == rollout.metrics["objective/non_score_reward"]
    seen = []
    loop._check_first_ratio = lambda logp, old: seen.append(np.exp(logp - old))     # what the check compares
    loop.step(rollout)
    loop.step()
    loop.policy.train()                     # somebody trained it in between
    loop.step()
    assert len(seen) == 3 and all((ratio == 1).all() for ratio in seen)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_log_probs_of_a_rollout_are_those_of_the_cached_steps_that_sampled_it(kind, monkeypatch):
    """No old log-probability depends on the batch or on the cache: the bits of decoding are those of training."""
    steps, sample = [], nf.models.gpt.sample

    def record(logits, **options):
        chosen = sample(logits, **options)
        steps.append((nf.token_log_probs(logits, chosen, temperature=options["temperature"]), chosen))
        return chosen

    monkeypatch.setattr(nf.models.gpt, "sample", record)
    loop = ppo(model=KINDS[kind], temperature=0.7, batch=12, minibatch=3, eos_id=None)
    loop.prompts = [row[:1] * 4 for row in loop.prompts]            # of one length, so every step samples every row
    rollout = loop.rollout()
    np.testing.assert_array_equal(rollout.sequences.actions, np.stack([chosen for _, chosen in steps], 1))
    np.testing.assert_array_equal(rollout.logp, np.stack([logp for logp, _ in steps], 1))


def test_a_policy_that_changed_after_its_rollout_is_an_error():
    loop = ppo()
    rollout = loop.rollout()
    loop.policy.norm.weight.data *= 1.001
    with pytest.raises(RuntimeError, match="first ratio is not exactly 1: log-probabilities differ by up to"):
        loop.step(rollout)
    loop = ppo()
    rollout = loop.rollout()
    loop.step(rollout)
    with pytest.raises(ValueError, match="sampled in iteration 0, the policy is in 1"):
        loop.step(rollout)


def test_equal_weights_with_another_forward_pass_are_an_error():
    reference = gpt(rope_theta=100.0)
    with pytest.raises(RuntimeError, match="has the weights of the reference, but a first KL is not exactly 0"):
        ppo(reference=reference).rollout()
    ppo(reference=gpt(5)).rollout()         # another reference has a KL, and that is right


def test_rewards_advantages_and_returns_by_their_definitions():
    loop = ppo(reference=gpt(5), kl_init=0.3, missing_eos_penalty=0.5, gamma=0.9, lam=0.8)
    r = loop.rollout()
    mask = r.sequences.mask
    rewards = np.where(mask, -0.3 * (r.logp - r.ref_logp), 0)
    for i, row in enumerate(r.completions):
        assert r.ended[i] == (row[-1] == EOS) and r.scores[i] == row.count(LIKED) / 8
        rewards[i, len(row) - 1] += r.scores[i] - (0 if r.ended[i] else 0.5)
    np.testing.assert_allclose(r.rewards, rewards, rtol=1e-5, atol=1e-6)
    advantages, returns = rlhf.gae(r.rewards, r.values, mask, gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(r.returns, returns)               # before whitening
    np.testing.assert_array_equal(r.advantages, rlhf.masked_whiten(advantages, mask))
    assert r.metrics["objective/kl"] == pytest.approx((r.logp - r.ref_logp).sum(1).mean(), rel=1e-5)
    assert r.metrics["objective/non_score_reward"] == pytest.approx(-0.3 * r.metrics["objective/kl"], rel=1e-4)
    assert r.metrics["objective/rlhf_reward"] == pytest.approx(
        r.metrics["objective/scores"] + r.metrics["objective/non_score_reward"], rel=1e-6)
    assert r.metrics["val/num_eos_tokens"] == r.ended.sum() > 0
    plain = ppo(reference=gpt(5), whiten_advantages=False, whiten_rewards=True).rollout()
    assert plain.rewards[mask].std() == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(plain.advantages + np.where(mask, plain.values, 0), plain.returns)


def test_a_missing_end_subtracts_from_the_score_or_replaces_it():
    for form, punished in (("subtract", [1.0, 5.0]), ("replace", [1.0, -2.0])):
        loop = ppo(missing_eos=form, missing_eos_penalty=2.0)
        np.testing.assert_array_equal(loop._shaped(np.array([1.0, 7.0]), np.array([True, False])), punished)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_liked_token_is_learned_while_the_kl_stays_bounded(kind):
    loop = ppo(model=KINDS[kind], batch=32, minibatch=16, lr=5e-3, kl_init=0.02, kl_target=6.0, kl_horizon=500)
    seen = [loop.step() for _ in range(12)]
    assert set(seen[0]) == METRICS
    assert np.mean([m["objective/scores"] for m in seen[-3:]]) > seen[0]["objective/scores"] + 0.3
    assert max(m["objective/kl"] for m in seen) < 12
    assert seen[-1]["kl_coef"] != 0.02 and seen[-1]["episode"] == 12 * 32
    assert all(np.isfinite(list(m.values())).all() for m in seen)


def test_a_penalty_holds_the_policy_to_the_reference():
    def kl(coefficient):
        loop = ppo(batch=32, minibatch=16, lr=5e-3, kl_init=coefficient)
        return [loop.step() for _ in range(8)][-1]["objective/kl"]
    assert kl(1.0) < 0.3 * kl(0.0)


def test_options_take_part():
    pretrain = [rlhf.CompletionBatches([(p, [5, 6]) for p in prompts(8)], 4) for _ in range(2)]
    expert = {"n_expert": 4}
    changes = [({}, {"entropy_coef": 0.1}), ({"model": expert}, {"model": expert, "load_balancing": 0.5}),
               ({}, {"dual_clip": 1.01, "clip": 0.001}), ({}, {"adam": "tensorflow", "eps": 1e-3}),
               ({}, {"ptx_coef": 1.0, "pretrain": pretrain[0]}), ({}, {"value_clip": None, "value_lr": 1e-3}),
               ({}, {"weight_decay": 0.1}), ({}, {"max_norm": 0.01}), ({}, {"kl_form": "k3", "kl_init": 1.0})]
    for before, after in changes:
        a, b = ppo(**before), ppo(**after)
        for _ in range(2):
            last = a.step(), b.step()
        equal = [np.array_equal(p.data, q.data) for part in ("policy", "value")
                 for p, q in zip(getattr(a, part).parameters(), getattr(b, part).parameters())]
        assert not all(equal), after
        assert ("loss/ptx_avg" in last[1]) == ("ptx_coef" in after)


def test_padding_of_rollouts_does_not_take_part_in_the_balance(monkeypatch):
    loop, loss, seen = ppo(model={"n_expert": 4}, load_balancing=0.5), nf.moe.load_balancing_loss, []

    def record(routing, *, token_mask):
        seen.append(token_mask.sum())
        return loss(routing, token_mask=token_mask)

    monkeypatch.setattr(nf.moe, "load_balancing_loss", record)
    rollout = loop.rollout()
    loop.step(rollout)
    lengths = [rollout.sequences.lengths[rows].sum() for order in rollout.order for rows in order.reshape(-1, 8)]
    assert seen == [length for length in lengths for _ in loop.policy.blocks]


def test_tensorflows_adam_adds_eps_to_the_plain_root():
    eps, lr, gradients = 1e-2, 3e-3, []
    loop = ppo(adam="tensorflow", eps=eps, lr=lr, betas=(0.9, 0.999), max_norm=None)
    parameter, first = loop.policy.norm.weight, loop.policy.norm.weight.data.astype(float)
    step = loop.policy_optimizer.step

    def record(max_norm):
        gradients.append(parameter.grad.astype(float))
        return step(max_norm)

    loop.policy_optimizer.step = record
    loop.step()
    m = v = 0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        first = first - lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + eps)
    np.testing.assert_allclose(parameter.data, first, rtol=1e-5)


def test_the_running_mean_follows_the_policy():
    loop = ppo(ema_decay=0.9)
    expected = {name: x.copy() for name, x in loop.policy.state_dict().items()}
    for _ in range(2):
        loop.step()
        expected = {n: 0.9 * x + 0.1 * loop.policy.state_dict()[n] for n, x in expected.items()}
    for name, x in expected.items():
        np.testing.assert_allclose(loop.ema[name], x, rtol=1e-5, atol=1e-7)


def test_the_target_is_of_a_completion_or_of_a_token():
    for measure in ("sequence", "token"):
        loop = ppo(reference=gpt(5), kl_measure=measure, kl_target=0.4, kl_horizon=100, kl_init=0.1)
        r = loop.rollout()
        loop.step(r)
        kl = [(row[m].sum() if measure == "sequence" else row[m].mean())
              for row, m in zip(r.logp - r.ref_logp, r.sequences.mask)]
        assert loop.kl.value == pytest.approx(rlhf.AdaptiveKL(0.1, 0.4, 100).update(np.mean(kl), 16), rel=1e-5)


def test_an_epoch_takes_every_prompt_once():
    seen = []
    loop = ppo(batch=4, minibatch=4, reward_fn=lambda p, c: seen.extend(p) or [0.0] * len(c))
    for _ in range(6):
        loop.rollout()
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(prompts()) and seen[:12] != seen[12:]


def test_samples_that_are_not_the_policys_give_a_warning_with_the_cause():
    loop, rng = ppo(reference=gpt(0)), np.random.default_rng(0)
    loop.policy.norm.weight.data *= 3                   # a sharper policy, and then samples from none
    loop.policy.generate = lambda rows, n, **_: [[*row, *rng.integers(2, VOCAB, n)] for row in rows]
    with pytest.warns(UserWarning, match=r"mean KL .* is -.* clearly below 0.*temperature, top-k or top-p.*dropout"):
        loop.rollout()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppo(reference=gpt(5)).rollout()


# Checkpoints


def long_run(folder=None):
    pretrain = rlhf.CompletionBatches([(p, [5, 6]) for p in prompts(8)], 4)
    return ppo(model={"n_expert": 4, "dropout": 0.1}, ptx_coef=0.5, pretrain=pretrain, ema_decay=0.9, kl_target=2.0,
               kl_horizon=200, batch=8, minibatch=4)


_RUN = """
import os, sys
from tests.rlhf.test_ppo import long_run
long_run().run(4, checkpoint=sys.argv[1], callbacks=[lambda i, _: os.kill(os.getpid(), 9) if i == 2 else None])
"""


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    pytest.importorskip("safetensors")
    straight = long_run()
    expected = straight.run(4)
    code = subprocess.run([sys.executable, "-c", _RUN, str(tmp_path / "run")], timeout=120,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}).returncode
    assert code == -9 and [p.name for p in tmp_path.iterdir()] == ["run"]
    again, seen = long_run(), []
    metrics = again.run(4, checkpoint=tmp_path / "run", callbacks=[lambda i, _: seen.append(i)])
    assert seen == [2, 3] and metrics == expected
    ours = again.state_dict()
    for name, array in straight.state_dict().items():
        np.testing.assert_array_equal(ours[name], array)


def test_callbacks_are_called_after_every_iteration_from_any_iterable():
    seen, loop = [], ppo(batch=8)
    loop.run(2, callbacks=iter([lambda i, _: seen.append(i)]))
    assert seen == [0, 1]
    with pytest.raises(TypeError, match=r"PPO\.run: callbacks must be a list of functions .*, got <built-in function"):
        loop.run(3, callbacks=print)


def test_what_a_checkpoint_needs_is_said_before_the_first_iteration(tmp_path):
    pytest.importorskip("safetensors")
    loop = ppo(ptx_coef=0.5, pretrain=iter([]))
    with pytest.raises(TypeError, match=r"pretrain must have state\(\) and restore\(state\).*, got list_iterator"):
        loop.run(1, checkpoint=tmp_path / "run")


def test_iterations_between_checkpoints_that_are_none_are_named_before_the_first(tmp_path):
    loop = ppo(reward_fn=lambda p, c: pytest.fail("an iteration was done"))
    for every, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=rf"PPO\.run: every must be .*, got {every}"):
            loop.run(1, checkpoint=tmp_path / "run", every=every)


def test_pretraining_batches_that_end_are_said_with_the_iteration():
    batches = rlhf.CompletionBatches([(p, [5, 6]) for p in prompts(8)], 4)
    loop = ppo(ptx_coef=0.5, pretrain=iter([next(batches)]))
    with pytest.raises(ValueError, match="PPO: the batches of pretrain ended in iteration 0, counted from 0"):
        loop.run(1)


def test_a_generator_whose_state_holds_arrays_goes_into_a_checkpoint(tmp_path):
    pytest.importorskip("safetensors")
    first, again = ppo(), ppo()
    first.rng, again.rng = (np.random.Generator(np.random.Philox(seed)) for seed in (1, 2))
    first.run(1, checkpoint=tmp_path / "run")
    again.resume(tmp_path / "run")
    assert again.rng.random() == first.rng.random()


def test_a_checkpoint_of_before_each_parameter_had_a_count_of_steps_is_taken():
    first, again = ppo(), ppo()
    first.run(1)
    arrays = {name: np.array(x) for name, x in first.state_dict().items() if not name.endswith("optimizer.counts")}
    again.load_state_dict(arrays)
    expected = first.state_dict()
    for name, x in again.state_dict().items():
        np.testing.assert_array_equal(x, expected[name])


def test_a_broken_or_foreign_checkpoint_is_one_clear_line_and_changes_nothing(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "run"
    loop = ppo()
    loop.run(1, checkpoint=path)
    whole = path.read_bytes()
    others = [(ppo(reference=gpt(9)), "it was made with another reference or other prompts"),
              (ppo(model={"n_layer": 1}, reference=gpt(0)), "its policy has other parameters"),
              (ppo(ema_decay=0.5), "its ema has other parameters")]
    others[1][0]._given = loop._given
    for other, message in others:
        before = {name: np.array(x) for name, x in other.state_dict().items()}
        with pytest.raises(ValueError, match=f"not a checkpoint of this run: {message}") as caught:
            other.resume(path)
        assert "\n" not in str(caught.value)
        for name, x in other.state_dict().items():
            np.testing.assert_array_equal(x, before[name])
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"^[^:]* is not a whole safetensors file"):
        ppo().resume(path)


# Numbers


def test_presets_have_the_numbers_of_their_sources():
    table = {
        "openai2019": {"clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "gamma": 1, "lam": 0.95, "kl_init": 0.15,
                       "kl_target": 6, "kl_horizon": 10000, "epochs": 4, "lr": 1e-5, "schedule": "linear", "eps": 1e-5,
                       "adam": "tensorflow", "temperature": 0.7, "whiten_rewards": True},
        "instructgpt": {"clip": 0.2, "value_clip": 0.2, "kl_init": 0.02, "kl_target": None, "episodes": 256000,
                        "batch": 512, "minibatch": 64, "epochs": 1, "warmup": 10, "ema_decay": 0.992, "ptx_coef": 27.8},
        "trl": {"clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "gamma": 1, "lam": 0.95, "kl_init": 0.05,
                "kl_target": None, "epochs": 4, "lr": 3e-6, "temperature": 0.7},
        "verl": {"clip": 0.2, "value_clip": 0.5, "kl_init": 0.001, "kl_target": 0.1, "kl_horizon": 10000,
                 "dual_clip": 3.0, "epochs": 1, "gamma": 1, "lam": 1, "lr": 1e-6, "value_lr": 1e-5,
                 "weight_decay": 0.01, "temperature": 1},
    }
    for name, numbers in table.items():
        preset = getattr(rlhf.PPOConfig, name)()
        assert {key: getattr(preset, key) for key in numbers} == numbers
        changed = getattr(rlhf.PPOConfig, name)(batch=8, minibatch=4, lr=1e-3)
        assert (changed.batch, changed.minibatch, changed.lr, changed.clip) == (8, 4, 1e-3, 0.2)


def test_rates_rise_from_a_tenth_and_fall_to_nothing():
    config = rlhf.PPOConfig(lr=1.0, warmup=10)
    np.testing.assert_allclose([config.learning_rate(i) for i in (0, 5, 10, 99)], [0.1, 0.55, 1, 1])
    config = rlhf.PPOConfig(lr=1.0, schedule="linear", episodes=640, batch=64)
    np.testing.assert_allclose([config.learning_rate(i) for i in (0, 5, 9, 10, 11)], [1, 0.5, 0.1, 0, 0], atol=1e-12)
    assert config.learning_rate(5, 0.2) == pytest.approx(0.1)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch": 10, "minibatch": 4}, "multiple of minibatch, got 10 and 4"), ({"epochs": 0}, "epochs must be 1 or more"),
    ({"temperature": 0}, "a greedy policy does not explore"), ({"schedule": "cosine"}, "one of constant, linear, got"),
    ({"schedule": "linear"}, "needs episodes"), ({"kl_form": "k4"}, "one of k1, k2, k3, got 'k4'"),
    ({"missing_eos_penalty": 1.0}, "needs eos_id"), ({"ema_decay": 1.0}, r"in \[0, 1\), got 1.0"),
    ({"adam": "jax"}, "one of torch, tensorflow"), ({"kl_measure": "batch"}, "one of sequence, token"),
    ({"missing_eos": "add"}, "one of subtract, replace"),
    ({"kl_target": 6.0, "kl_horizon": 12, "batch": 64, "minibatch": 64}, "below 5 kl_horizon, .* got 64 and 12")])
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rlhf.PPOConfig(**options)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"lr": "1e-3"}, TypeError, "lr must be a real number, got '1e-3'"),
    ({"max_norm": "1"}, TypeError, "max_norm must be a real number"),
    ({"clip": None}, TypeError, "clip must be a real number, got None"),
    ({"batch": 8.0}, TypeError, r"batch must be an integer, got 8\.0"),
    ({"eos_id": "<end>"}, TypeError, "eos_id must be an integer, got '<end>'"),
    ({"max_norm": -1}, ValueError, "max_norm must be 0 or more, got -1"),
    ({"kl_init": -1}, ValueError, "kl_init must be 0 or more, got -1"),
    ({"kl_target": 0}, ValueError, "kl_target must be above 0, got 0"),
    ({"clip": 0}, ValueError, "clip must be above 0, got 0"),
    ({"dual_clip": 1}, ValueError, "dual_clip must be above 1, got 1"),
    ({"gamma": 2}, ValueError, r"gamma must be within 0 \.\. 1"),
    ({"schedule": "linear", "episodes": 0}, ValueError, "episodes must be 1 or more, got 0"),
    ({"warmup": -1}, ValueError, "warmup must be 0 or more, got -1")])
def test_what_no_run_could_use_is_named_before_it(options, error, message):
    with pytest.raises(error, match=f"^PPOConfig: {message}"):
        rlhf.PPOConfig(**options)


def test_parts_that_do_not_fit_are_named():
    policy = gpt()
    value = rlhf.ValueModel.from_gpt(policy, rng=np.random.default_rng(1))

    def build(reference=None, value=value, rows=((1, 2),), **options):
        return rlhf.PPO(policy, reference, value, liked, rows, rlhf.PPOConfig(**{"max_new_tokens": 8, **options}),
                        rng=np.random.default_rng(0))

    with pytest.raises(ValueError, match="reference is the policy itself"):
        build(policy)
    shared = rlhf.ValueModel.from_gpt(policy, rng=np.random.default_rng(1))
    shared.trunk = policy
    with pytest.raises(ValueError, match="value shares parameters with the policy"):
        build(value=shared)
    with pytest.raises(ValueError, match=r"ptx_coef is 27.8, which needs pretrain"):
        build(ptx_coef=27.8)
    quantized, _ = nf.compress.quantize_model(policy)
    with pytest.raises(TypeError, match="policy is quantized, and nothing trains its weights"):
        rlhf.PPO(quantized, None, value, liked, [[1]], rlhf.PPOConfig(), rng=np.random.default_rng(0))
    shared.trunk = quantized
    with pytest.raises(TypeError, match="value is quantized"):
        build(value=shared)
    with pytest.raises(ValueError, match="PPO: reference must have the policy's vocabulary of 24, got 40"):
        build(gpt(vocab_size=40))
    with pytest.raises(TypeError, match="PPO: value must be of the policy's float32, got float64"):
        build(value=rlhf.ValueModel.from_gpt(gpt(dtype="float64"), rng=np.random.default_rng(1)))
    for rows, message in (([], "there are no prompts"), ([[1], []], "at least one token id"),
                          ([[1] * 30], "up to 38 positions, block_size of policy is 32")):
        with pytest.raises(ValueError, match=message):
            build(rows=rows)


def test_what_is_no_config_no_function_or_no_generator_is_named():
    policy = gpt()
    value = rlhf.ValueModel.from_gpt(policy, rng=np.random.default_rng(1))
    for change, message in (({"config": {"batch": 4}}, "config must be a PPOConfig, got dict"),
                            ({"reward_fn": None}, "reward_fn must be a function of prompts and completions"),
                            ({"rng": 0}, "rng must be a numpy.random.Generator, got int"),
                            ({"policy": "folder"}, "policy must be a GPT, got str"),
                            ({"value": None}, "value must be a ValueModel, got NoneType")):
        parts = {"policy": policy, "value": value, "reward_fn": liked, "config": rlhf.PPOConfig(),
                 "rng": np.random.default_rng(0)} | change
        with pytest.raises(TypeError, match=f"PPO: {message}"):
            rlhf.PPO(reference=None, prompts=[[1]], **parts)


def test_a_value_model_that_is_another_is_an_error_and_not_a_number():
    loop = ppo()
    for other, shape in ((gpt(3), f"16, .*, {VOCAB}"), (rlhf.RewardModel.from_gpt(gpt(), rng=loop.rng), "16,")):
        sequences = rlhf.Sequences.of(*zip(*[([2, 3], [4, 5])] * 16))
        with pytest.raises(ValueError, match=rf"one number for each of the tokens \(16, 4\), .* got \({shape}\) of a"):
            rlhf.completion_values(other, sequences)


@pytest.mark.parametrize(("scores", "message"), [
    (lambda p, c: [0.0], r"must give 16 scores, got an array of shape \(1,\)"),
    (lambda p, c: [0.0] * 15 + [np.nan], "score 15 that reward_fn gave is nan")])
def test_bad_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        ppo(reward_fn=scores).rollout()


def test_a_loss_that_is_not_finite_ends_the_run_before_an_update():
    loop = ppo()
    rollout = loop.rollout()
    rollout.returns[rollout.sequences.mask] = np.inf
    before = [p.data.copy() for p in loop.policy.parameters()]
    with pytest.raises(RuntimeError, match=r"in iteration 0 the policy's loss is .* and the value's inf; nothing"):
        loop.step(rollout)
    for p, x in zip(loop.policy.parameters(), before):
        np.testing.assert_array_equal(p.data, x)


def test_gradients_from_before_take_no_part():
    plain, other = ppo(), ppo()
    for model in (other.policy, other.value):
        for p in model.parameters():
            p.grad = np.ones_like(p.data)
    assert plain.step() == other.step()
