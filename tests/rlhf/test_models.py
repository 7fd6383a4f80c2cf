"""Sequences, reward and value models."""
import numpy as np
import pytest

import numformer as nf
from numformer import rlhf
from tests.rlhf.small import VOCAB, gpt, prompts

KINDS = {"dense": {}, "experts": {"n_expert": 4}, "grouped, learned": {"n_kv_head": 1, "position": "learned"},
         "untied": {"tie_embedding": False, "norm": "layer", "activation": "gelu", "bias": True}}


def pair(count=7, seed=0):
    return prompts(count, seed=seed), prompts(count, seed=seed + 1)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_entropies_are_those_of_the_full_forward(kind, temperature):
    model, (p, c) = gpt(**KINDS[kind]).eval(), pair()
    sequences = rlhf.Sequences.of(p, c)
    logp, entropy = rlhf.completion_log_probs(model, sequences, temperature=temperature, entropy=True)
    for i, (prompt, completion) in enumerate(zip(p, c)):
        with nf.no_grad():
            expected = log_softmax(model(np.array([prompt + completion]))[0].data / temperature)
        at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        np.testing.assert_allclose(logp.data[i, :len(completion)], expected[at, completion], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entropy.data[i, :len(completion)], -(np.exp(expected) * expected).sum(-1)[at],
                                   rtol=1e-4, atol=1e-5)
        assert not logp.data[i, len(completion):].any() and not entropy.data[i, len(completion):].any()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_have_the_same_bits_in_any_batch_and_on_the_tape(kind):
    model, (p, c) = gpt(**KINDS[kind]).eval(), pair(9)
    sequences = rlhf.Sequences.of(p, c)
    whole = rlhf.completion_log_probs(model, sequences).data
    np.testing.assert_array_equal(rlhf.completion_log_probs(model.as_arrays(), sequences), whole)
    for rows in ([3], [0, 8], [5, 1, 2, 7]):
        some = rlhf.completion_log_probs(model, sequences.rows(np.array(rows)))
        np.testing.assert_array_equal(some.data, whole[rows])


def test_gradients_pass_through_the_gathering():
    model, (p, c) = gpt(dtype="float64", n_layer=1).eval(), pair(4)
    sequences, weight = rlhf.Sequences.of(p, c), np.random.default_rng(5)
    dy = weight.standard_normal(sequences.mask.shape)
    rlhf.completion_log_probs(model, sequences, temperature=0.8).backward(dy)
    for parameter in model.parameters():
        direction = weight.standard_normal(parameter.shape)
        before, sums = parameter.data.copy(), []
        for sign in (1, -1):
            parameter.data[...] = before + sign * 1e-6 * direction
            sums.append((rlhf.completion_log_probs(model.as_arrays(), sequences, temperature=0.8) * dy).sum())
        parameter.data[...] = before
        assert (parameter.grad * direction).sum() == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-5, abs=1e-6)


def test_values_stand_before_each_action():
    model = rlhf.ValueModel.from_gpt(gpt(), rng=np.random.default_rng(0))
    model.head.weight.data[...] = np.random.default_rng(1).standard_normal(model.head.weight.shape)
    p, c = pair()
    values = rlhf.completion_values(model.as_arrays(), rlhf.Sequences.of(p, c))
    for i, (prompt, completion) in enumerate(zip(p, c)):
        every = model(np.array([prompt + completion])).data[0]
        np.testing.assert_allclose(values[i, :len(completion)], every[len(prompt) - 1:-1], rtol=1e-4, atol=1e-5)
        assert not values[i, len(completion):].any()


@pytest.mark.parametrize(("p", "c", "message"), [
    ([[1]], [[2], [3]], "every prompt needs a completion, got 1 and 2"), ([[1], []], [[2], [3]], "prompt 1 is empty"),
    ([[1], [1]], [[], [3]], "completion 0 is empty"), ([], [], "there are none")])
def test_sequences_that_are_none_are_refused(p, c, message):
    with pytest.raises(ValueError, match=message):
        rlhf.Sequences.of(p, c)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_bit_of_a_score(kind):
    model = rlhf.RewardModel.from_gpt(gpt(**KINDS[kind]), rng=np.random.default_rng(1)).eval()
    rows = prompts(6)
    alone = np.array([model(np.array([row])).data[0] for row in rows])
    lengths = np.array([len(row) for row in rows])
    for value in (-1, 0, 5):
        for width in (lengths.max(), 32):
            tokens = np.full((6, width), value)
            for line, row in zip(tokens, rows):
                line[:len(row)] = row
            np.testing.assert_array_equal(model(tokens, lengths).data, alone)
    np.testing.assert_array_equal(model.score(rows, batch=4), alone)
    np.testing.assert_array_equal(model.reward([row[:1] for row in rows], [row[1:] for row in rows]), alone)


def test_a_score_is_the_head_on_the_last_tokens_state():
    model, row = rlhf.RewardModel.from_gpt(gpt(), rng=np.random.default_rng(1)), prompts(1, least=5)[0]
    hidden = model.trunk.hidden(np.array([row])).data[0, -1].astype(float)
    expected = hidden @ model.head.weight.data[0] + model.head.bias.data[0]
    assert model.score([row])[0] == pytest.approx(expected, rel=1e-5)


def test_from_gpt_copies_and_heads_begin_as_documented():
    trunk = gpt(tie_embedding=False, n_embd=64)
    reward = rlhf.RewardModel.from_gpt(trunk, rng=np.random.default_rng(1))
    value = rlhf.ValueModel.from_gpt(trunk, rng=np.random.default_rng(1))
    for name, array in reward.trunk.state_dict().items():
        np.testing.assert_array_equal(array, trunk.state_dict()[name])
        assert array is not trunk.state_dict()[name] and not np.shares_memory(array, value.trunk.state_dict()[name])
    assert not value.head.weight.data.any() and not value.head.bias.data.any()
    assert reward.head.weight.data.std() == pytest.approx(65**-0.5, rel=0.3)
    again = rlhf.ValueModel.from_reward(reward, rng=np.random.default_rng(2))
    np.testing.assert_array_equal(again.head.weight.data, reward.head.weight.data)
    with pytest.raises(TypeError, match="ValueModel: gpt is quantized, and nothing trains its weights"):
        rlhf.ValueModel.from_gpt(nf.compress.quantize_model(gpt())[0], rng=np.random.default_rng(1))


@pytest.mark.parametrize("kind", [rlhf.RewardModel, rlhf.ValueModel])
@pytest.mark.parametrize("options", [{}, {"layer_heads": [[2, 2], [1, 1]]}, {"n_expert": 4, "dtype": "float64"}])
def test_a_saved_scorer_is_opened_by_load(tmp_path, kind, options):
    pytest.importorskip("safetensors")
    model = kind.from_gpt(gpt(**options), rng=np.random.default_rng(1))
    model.save_pretrained(tmp_path)
    again = nf.models.load(tmp_path)
    assert type(again) is kind
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)


def test_a_normalized_model_scores_with_mean_0_and_deviation_1():
    model, rows = rlhf.RewardModel.from_gpt(gpt(), rng=np.random.default_rng(1)), prompts(20)
    model.normalize(rows)
    scores = model.score(rows)
    assert scores.mean() == pytest.approx(0, abs=1e-5) and scores.std() == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match="scores of these 2 sequences do not vary"):
        model.normalize([rows[0], rows[0]])


def test_the_loss_is_that_of_the_scores_and_learns_a_preference(tmp_path):
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(0)
    pairs = [([*p, 5, *rng.integers(2, 5, 2)], [*p, 6, *rng.integers(2, 5, 3)]) for p in prompts(40)]
    model = rlhf.RewardModel.from_gpt(gpt(), rng=rng)
    batches = rlhf.PairBatches(pairs, 8)
    chosen, rejected = next(batches)
    loss = model.loss(chosen, rejected).item()
    a, b = model(chosen).data, model(rejected).data
    assert loss == pytest.approx(rlhf.reward_model_loss(a, b), rel=1e-5)
    assert model.accuracy == rlhf.reward_accuracy(a, b)
    loop = nf.train.Trainer(model, batches, nf.train.AdamW(model.parameters(), 3e-3), 20, checkpoint=tmp_path / "c")
    assert loop.run()["loss"] < 0.2
    assert model.pair_accuracy(*zip(*pairs)) > 0.95


@pytest.mark.parametrize(("tokens", "lengths", "message"), [
    ([[1, -1, 2]], None, r"row 0 .* padding behind them, got \[1, -1, 2\] of length 2"),
    ([[1, 2], [-1, -1]], None, "row 1 must hold 1 to 2 tokens"), ([[1, 2]], [3], "of length 3"),
    ([[1, 2]], [1, 1], r"lengths must have shape \(1,\), got \(2,\)"), ([1, 2], None, r"\(B, S\), got int64 \(2,\)"),
    ([[1.0]], None, "must be integers")])
def test_bad_tokens_of_a_reward_model_are_named(tokens, lengths, message):
    model = rlhf.RewardModel.from_gpt(gpt(), rng=np.random.default_rng(1))
    with pytest.raises(ValueError, match=message):
        model(np.array(tokens), lengths)


@pytest.mark.parametrize("row", ["12", [1.5], ["1"], 1])
def test_sequences_that_are_no_integers_are_named(row):
    model = rlhf.RewardModel.from_gpt(gpt(), rng=np.random.default_rng(1))
    with pytest.raises(TypeError, match="RewardModel: sequences must be lists of integers, the ids of tokens, got"):
        model.score([[1], row])
    if row != 1:
        with pytest.raises(TypeError, match="Sequences: completions must be lists of integers"):
            rlhf.Sequences.of([[1]], [row])


def test_vocabulary_is_checked():
    model = rlhf.RewardModel.from_gpt(gpt(), rng=np.random.default_rng(1))
    with pytest.raises(ValueError, match=rf"ids must be within 0 \.\. {VOCAB - 1}, got {VOCAB}"):
        model.score([[VOCAB]])
