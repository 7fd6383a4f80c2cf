import numpy as np
import pytest

import numformer as nf
from numformer import compress
from tests.compress.small import batches, gpt, padded, silenced


@pytest.mark.parametrize("options", [{}, {"n_expert": 4}, {"n_kv_head": 2}, {"position": "learned", "norm": "layer"}])
def test_a_heads_score_is_the_slope_of_each_rows_loss_when_its_output_shrinks(options):
    model = gpt(dtype="float64", load_balancing=0.0, **options)
    data, step = batches(rows=2), 1e-5
    scores = compress.head_importance(model, data, normalize=False)
    for layer, score in enumerate(scores):
        for head in range(4):
            slopes = []
            for tokens, targets in data:
                for row in range(2):
                    losses = []
                    for factor in (1 + step, 1 - step):
                        twin = silenced(model, {layer: []})
                        twin.blocks[layer].attention.head_gate[head] = factor
                        losses.append(float(twin.loss(tokens[row:row + 1], targets[row:row + 1])))
                    slopes.append(abs(losses[0] - losses[1]) / (2 * step))
            np.testing.assert_allclose(score[head], np.mean(slopes), rtol=1e-6)


def test_a_reward_model_is_scored_by_each_sequence_of_its_pairs():
    model = nf.rlhf.RewardModel.from_gpt(gpt(dtype="float64"), rng=np.random.default_rng(0))
    pairs = [(np.array(chosen), np.array(rejected)) for chosen, rejected in batches(rows=2)]
    scores, step = compress.head_importance(model, pairs, normalize=False), 1e-5
    for layer, head in ((0, 1), (2, 3)):
        slopes = []
        for pair in pairs:
            for row in range(4):
                losses = []
                for factor in (1 + step, 1 - step):
                    twin = model.as_arrays()
                    gate = twin.trunk.blocks[layer].attention.head_gate = np.ones((4, 4))
                    gate[row, head] = factor
                    losses.append(float(twin.loss(*pair)))
                slopes.append(2 * abs(losses[0] - losses[1]) / (2 * step))
        np.testing.assert_allclose(scores[layer][head], np.mean(slopes), rtol=1e-5)


def test_a_quantized_model_has_scores_near_those_of_its_floats():
    model = gpt(n_expert=4)
    quantized, _ = compress.quantize_model(model, nf.quant.QuantSpec(bits=8, group_size=None))
    for ours, floats in zip(compress.head_importance(quantized, batches()), compress.head_importance(model, batches())):
        np.testing.assert_allclose(ours, floats, atol=0.1)


def test_scores_have_norm_one_in_each_layer_and_the_model_stays_as_it_was():
    model = gpt(n_expert=4, dropout=0.1).train()
    model.loss(*batches()[0]).backward()
    gradients = [p.grad.copy() for p in model.parameters()]
    values = [p.data.copy() for p in model.parameters()]
    state, routing = model.rng.bit_generator.state, model.blocks[0].mlp.routing
    scores = compress.head_importance(model, batches())
    compress.layer_importance(model, batches())
    np.testing.assert_allclose([np.linalg.norm(s) for s in scores], 1)
    assert model.training and model.rng.bit_generator.state == state and model.blocks[0].mlp.routing is routing
    for p, gradient, value in zip(model.parameters(), gradients, values):
        np.testing.assert_array_equal(p.grad, gradient)
        np.testing.assert_array_equal(p.data, value)


def test_a_group_of_one_head_scores_as_the_head_and_a_larger_one_no_more_than_its_heads():
    plain, grouped = gpt(), gpt(n_kv_head=2)
    by_group, by_head = (compress.head_importance(plain, batches(), groups=groups) for groups in (True, False))
    for a, b in zip(by_group, by_head):
        np.testing.assert_array_equal(a, b)
    groups = compress.head_importance(grouped, batches(), groups=True, normalize=False)
    heads = compress.head_importance(grouped, batches(), normalize=False)
    for a, b in zip(groups, heads):
        assert a.shape == (2,) and (a <= b.reshape(2, 2).sum(1) * (1 + 1e-6)).all()


def test_a_head_that_reaches_nothing_scores_zero():
    model = gpt()
    model.blocks[1].attention.out.data[:, 8:16] = 0
    scores = compress.head_importance(model, batches())
    assert scores[1][1] == 0 and (np.delete(scores[1], 1) > 0).all()


def test_a_layer_that_does_nothing_scores_zero_and_one_that_turns_the_stream_around_two():
    model = gpt(dtype="float64")
    for name, factor in (("attention.out", 0), ("mlp.down", 0)):
        part, parameter = name.split(".")
        getattr(getattr(model.blocks[1], part), parameter).data *= factor
    scores = compress.layer_importance(model, batches())
    assert scores.shape == (3,) and abs(scores[1]) < 1e-12 and (np.delete(scores, 1) > 1e-3).all()


def test_layer_importance_is_one_minus_the_mean_cosine_over_tokens():
    model, data = gpt(), batches()
    cosines = [[] for _ in model.blocks]
    for tokens, _ in data:
        x, rotary = model.as_arrays().enter(tokens)
        for layer, block in enumerate(model.as_arrays().blocks):
            y = block(x, rotary, None, layer)
            for a, b in zip(x.reshape(-1, 32), y.reshape(-1, 32)):
                cosines[layer].append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            x = y
    np.testing.assert_allclose(compress.layer_importance(model, data), 1 - np.mean(cosines, axis=1), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"n_expert": 4}])
def test_padding_is_not_scored(options):
    batch, rows = padded()
    model = gpt(dtype="float64", **options)
    np.testing.assert_allclose(compress.layer_importance(model, [batch]), compress.layer_importance(model, rows))
    changed = np.where(np.arange(batch[0].shape[1]) < [[len(t[0])] for t, _ in rows], batch[0], 7), batch[1]
    for a, b in zip(compress.head_importance(model, [batch]), compress.head_importance(model, [changed])):
        np.testing.assert_allclose(a, b)


def test_batches_without_a_token_or_without_a_batch_around_it_are_refused():
    (tokens, targets), *_ = batches()
    for nothing in ((tokens, np.full_like(targets, -100)), (tokens[:0], targets[:0])):
        with pytest.raises(ValueError, match="layer_importance: the batches hold no tokens, or nothing but padding"):
            compress.layer_importance(gpt(), [nothing])
    for bare in ([tokens], (tokens, targets)):
        with pytest.raises(ValueError, match=r"tokens must have shape \(B, S\), got \(12,\)"):
            compress.layer_importance(gpt(), bare)


def test_batches_without_end_need_a_count(tmp_path, monkeypatch):
    nf.data.write_shard(tmp_path / "a.npy", np.arange(40).repeat(4))
    endless = nf.data.Batches(tmp_path, 2, 8)
    examples = nf.rlhf.CompletionBatches([([1, 2], [3])], 2)
    monkeypatch.setattr(examples, "collate", lambda _: pytest.fail("a batch was taken"))
    for score in (compress.head_importance, compress.layer_importance):
        for without_end in (endless, examples):
            with pytest.raises(ValueError, match="never end; say how many"):
                score(gpt(), without_end)
        with pytest.raises(ValueError, match="no batch"):
            score(gpt(), [])
        with pytest.raises(ValueError, match="1 or more, got 0"):
            score(gpt(), endless, count=0)
        with pytest.raises(TypeError, match=r"count must be an integer, got 1\.5"):
            score(gpt(), endless, count=1.5)
        assert len(score(gpt(), endless, count=2)) == 3


def test_a_model_without_the_parts_to_score_is_refused():
    with pytest.raises(TypeError, match="Linear has no MultiHeadAttention"):
        compress.head_importance(nf.nn.Linear(2, 2, rng=np.random.default_rng(0)), batches())
    with pytest.raises(TypeError, match="head_importance: model must be a Module, got str"):
        compress.head_importance("model", batches())
    with pytest.raises(TypeError, match="Linear has no blocks"):
        compress.layer_importance(nf.nn.Linear(2, 2, rng=np.random.default_rng(0)), batches())
