import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import numformer as nf
from numformer import rlhf
from tests.gradients import slope
from tests.models import reference

SHAPES = {
    "dense": {}, "experts": {"n_expert": 4}, "grouped": {"n_kv_head": 1},
    "learned": {"position": "learned", "norm": "layer", "bias": True, "activation": "gelu"},
    "gpt2": {"position": "learned", "init": "gpt2", "norm": "layer", "activation": "gelu_tanh", "tie_embedding": False},
    "pruned": {"layer_heads": [[2, 2], [1, 1]]},
    "alibi": {"position": "alibi", "n_kv_head": 1}, "window": {"window": 4},
    "alibi, pruned": {"position": "alibi", "layer_heads": [[2, 2], [1, 1]], "alibi_heads": [[0, 1], [1]]},
    "alibi, window": {"position": "alibi", "window": 3, "n_expert": 4},
}
every_shape = pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)


def gpt(seed=0, **options):
    shape = {"vocab_size": 30, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16} | options
    model = nf.models.GPT(nf.models.GPTConfig(**shape), rng=np.random.default_rng(seed))
    rng = np.random.default_rng([seed, 1])
    for parameter in model.parameters():        # biases and norms that a test could miss
        if parameter.ndim == 1:
            parameter.data += rng.standard_normal(parameter.shape).astype(parameter.dtype) * 0.1
    return model


def tokens(rows=2, length=9, seed=3, vocab=30):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length))


@every_shape
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_logits_and_gradients_are_those_of_an_independent_torch_model(options, dtype, tolerance):
    torch = pytest.importorskip("torch")
    model, ids = gpt(dtype=dtype, load_balancing=0.0, **options), tokens(length=10)
    expected, leaves = reference.logits(torch, model, ids[:, :-1])
    np.testing.assert_allclose(model(ids[:, :-1]).data, expected.detach().numpy(), rtol=0, atol=tolerance)
    loss = torch.nn.functional.cross_entropy(expected.reshape(-1, 30), torch.as_tensor(ids[:, 1:].reshape(-1)))
    loss.backward()
    ours = model.loss(ids[:, :-1], ids[:, 1:])
    ours.backward()
    np.testing.assert_allclose(ours.item(), loss.item(), atol=tolerance)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, leaves[name].grad.numpy(), rtol=0, atol=tolerance, err_msg=name)


@every_shape
def test_the_loss_falls_as_every_kind_of_parameters_gradient_says(options):
    shape = {"vocab_size": 5, "block_size": 4, "n_head": 2, "n_embd": 4, "n_inner": 4} | options
    model, ids = gpt(dtype="float64", **shape), tokens(1, 4, vocab=5)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    twin = model.as_arrays()
    for name, parameter in model.named_parameters():
        expected = slope(lambda: np.asarray(twin.loss(ids[:, :-1], ids[:, 1:])), parameter.data, np.ones(()))
        np.testing.assert_allclose(parameter.grad, expected, rtol=1e-5, atol=1e-8, err_msg=name)


@every_shape
def test_no_token_sees_what_comes_after_it(options):
    model, ids = gpt(**options), tokens()
    before = model(ids).data
    ids[:, 6:] = (ids[:, 6:] + 1) % 30
    np.testing.assert_array_equal(model(ids).data[:, :6], before[:, :6])
    assert not np.array_equal(model(ids).data[:, 6], before[:, 6])


def test_a_window_bounds_how_far_back_a_token_reaches_through_all_layers():
    model, ids = gpt(window=3), tokens()
    before = model(ids).data
    ids[:, 0] = (ids[:, 0] + 1) % 30
    after = model(ids).data
    np.testing.assert_array_equal(after[:, 5:], before[:, 5:])      # two layers of two tokens back
    assert (after[:, :5] != before[:, :5]).any(axis=(0, 2)).all()


@every_shape
def test_greedy_generation_takes_the_largest_logit_of_the_full_forward(options):
    model = gpt(**options)
    text = model.generate([3, 1, 4, 1], 9, temperature=0)
    logits = model.as_arrays()(np.array([text]))
    assert text[4:] == logits[0, 3:-1].argmax(-1).tolist()
    assert model.generate(nf.Tensor(np.array([[3, 1, 4, 1]])), 9, temperature=0) == [text]


@every_shape
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cached_logits_have_the_bits_of_the_full_forward(options, dtype):
    model, ids = gpt(dtype=dtype, **options).as_arrays(), tokens(3, 12)
    full = model(ids)
    cache = nf.nn.KVCache([block.attention for block in model.blocks], 3, 12, np.dtype(dtype))
    begin = 0
    for end in (5, 6, 7, 11, 12):
        logits = nf.linear(model.hidden(ids[:, begin:end], cache), model.output_weight)
        np.testing.assert_array_equal(logits, full[:, begin:end])
        begin = end


@every_shape
def test_a_rows_bits_depend_on_no_other_row_and_not_on_the_threads(options, threads):
    model, ids = gpt(n_embd=64, **options).as_arrays(), tokens(7, 13)
    threads(1)
    full = model(ids)
    threads(2)
    np.testing.assert_array_equal(model(ids), full)
    for row in range(7):
        np.testing.assert_array_equal(model(ids[row:row + 1]), full[row:row + 1])


def test_recorded_and_unrecorded_logits_have_the_same_bits():
    model, ids = gpt(n_expert=4).eval(), tokens()
    recorded = model(ids)
    with nf.no_grad():
        plain = model(ids)
    assert recorded.requires_grad and type(plain) is nf.Tensor and not plain.requires_grad
    np.testing.assert_array_equal(plain.data, recorded.data)


def test_expert_load_adds_up_to_one_in_each_layer_and_balance_joins_the_loss():
    model, ids = gpt(n_expert=4, load_balancing=0.5), tokens(4, 12)
    loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
    load = model.expert_load()
    assert load.shape == (2, 4) and (load >= 0).all()
    np.testing.assert_allclose(load.sum(1), 1)
    np.testing.assert_allclose(loss, model.cross_entropy + 0.5 * model.balance, rtol=1e-6)
    assert model.balance >= 0.99 and gpt().expert_load().size == 0


def test_padding_behind_the_last_target_does_not_take_part_in_the_balance():
    model, ids = gpt(n_expert=4, load_balancing=0.5, dtype="float64"), tokens(3, 9)
    found = []
    for padding in (0, 5):
        targets = ids[:, 1:].copy()
        targets[:, :2] = -100                   # a prompt is no padding
        padded, targets = (np.pad(x, ((0, 0), (0, padding)), constant_values=value)
                           for x, value in ((ids[:, :-1], 0), (targets, -100)))
        loss = model.loss(padded, targets)
        loss.backward()
        found.append([loss.item(), model.balance, *[p.grad for p in model.parameters()]])
        for p in model.parameters():
            p.grad = None
    for plain, other in zip(*found):
        np.testing.assert_allclose(other, plain, rtol=1e-9, atol=1e-12)


def test_ignored_targets_change_nothing():
    model, ids = gpt(dtype="float64"), tokens(2, 9)
    targets = ids[:, 1:].copy()
    targets[:, 5:] = -100
    np.testing.assert_allclose(model.loss(ids[:, :-1], targets).item(), model.loss(ids[:, :5], ids[:, 1:6]).item())


def test_a_config_is_given_by_position_in_the_order_of_the_public_surface():
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_expert", "top_k",
             "position", "dropout")
    values = 30, 16, 2, 4, 32, 2, 8, 3, "learned", 0.1
    config = nf.models.GPTConfig(*values)
    assert tuple(getattr(config, name) for name in names) == values


def test_residual_projections_are_small_as_the_init_says():
    for init, std in (("gpt2", 0.02), ("xavier", np.sqrt(2 / 512))):
        model = nf.models.GPT(nf.models.GPTConfig(1000, 8, 4, 4, 256, init=init), rng=np.random.default_rng(0))
        out = model.blocks[0].attention.out.data
        np.testing.assert_allclose(out.std(), std / np.sqrt(8), rtol=0.02)


def test_checkpointed_blocks_give_the_same_bits_and_gradients_with_dropout_and_less_memory():
    ids = tokens(8, 65)

    def run(checkpointed):
        model = gpt(n_embd=64, n_layer=6, block_size=64, dropout=0.1, recompute=checkpointed).train()
        nf.empty_cache()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        held = nf.memory_stats()
        loss.backward()
        return loss.item(), [p.grad for p in model.parameters()], held

    loss, gradients, held = run(False)
    again, others, less = run(True)
    assert loss == again
    for a, b in zip(gradients, others):
        np.testing.assert_array_equal(a, b)
    assert less["in_use"] < held["in_use"] / 3


def test_the_losses_of_checkpointed_experts_have_the_same_bits_and_gradients():
    ids = tokens(4, 17)

    def run(checkpointed):
        model = gpt(n_expert=4, n_layer=3, dropout=0.1, load_balancing=0.5, recompute=checkpointed).train()
        losses = []
        for _ in range(2):          # the second finds the routing of the first
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            for routing in model.routings():
                loss = loss + (routing.weight * routing.weight).sum() * 0.25
            loss.backward()
            losses.append(loss.item())
        return losses, {name: p.grad for name, p in model.named_parameters()}, model.expert_load()

    (losses, gradients, load), (again, others, same) = run(False), run(True)
    assert losses == again
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(others[name], gradient, err_msg=name)
    np.testing.assert_array_equal(load, same)


def test_experts_checkpointed_without_their_routing_are_refused_by_the_loss():
    model, ids = gpt(n_expert=4).train(), tokens(4, 16)
    block = model.blocks[0]
    x, rotary = model.enter(ids)
    nf.checkpoint(lambda x: block(x, rotary, None, 0), x, rng=model.rng)
    with pytest.raises(RuntimeError, match=r"load_balancing_loss: .* nf\.nn\.checkpoint does so with the routing"):
        nf.moe.load_balancing_loss(block.mlp.routing)


def test_recomputing_changes_nothing_where_nothing_is_recorded():
    model, ids = gpt(n_expert=4, recompute=True), tokens(2, 9)
    assert model.generate([1, 2, 3], 5, temperature=0) == gpt(n_expert=4).generate([1, 2, 3], 5, temperature=0)
    with nf.no_grad():
        np.testing.assert_array_equal(model.eval()(ids).data, gpt(n_expert=4).eval()(ids).data)


def test_generation_may_keep_its_keys_in_float16():
    model = gpt()
    exact = model.generate([[1, 2, 3], [4, 5]], 9, temperature=0)
    assert model.generate([[1, 2, 3], [4, 5]], 9, temperature=0, cache_dtype=np.float16) == exact
    with pytest.raises(TypeError, match="KVCache: dtype must be"):
        model.generate([1], 2, temperature=0, cache_dtype=np.int8)


def test_training_with_dropout_is_reproducible():
    def train(seed):
        model, ids = gpt(5, dropout=0.2).train(), tokens(4, 12)
        model.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        optimizer = nf.train.AdamW(model.parameters(), 1e-2)
        losses = []
        for _ in range(5):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
    first = train(1)
    assert train(1) == first != train(2) and first[-1] < first[0]


@pytest.mark.parametrize(("change", "message"), [
    ({"n_layer": 0}, "n_layer must be 1 or more, got 0"), ({"n_head": 3}, "multiple of n_head, got 16 and 3"),
    ({"n_head": 16}, "even head size, got 1"), ({"position": "none"}, "position must be one of rotary, learned, alibi"),
    ({"window": 0}, "window must be 1 or more, or None, got 0"),
    ({"layer_heads": [[2, 2], [0, 0]]}, r"pairs \(n_head, n_kv_head\) of 1 or more, got \[0, 0\]"),
    ({"layer_heads": [[2, 2], [2]]}, r"pairs \(n_head, n_kv_head\) .* got \[2\]"),
    ({"layer_heads": [[2, 2]]}, "an entry for each of 2 layers, got 1"),
    ({"position": "alibi", "layer_heads": [[2, 2], [1, 1]]}, r"alibi_heads must .*: \[2, 1\], got None"),
    ({"alibi_heads": [[0], [1]]}, r"and only there: .*: None, got \[1, 1\]"),
    ({"position": "alibi", "layer_heads": [[2, 2], [1, 1]], "alibi_heads": [[0, 1], [2]]}, r"0\.\.1, got \[2\]"),
    ({"norm": "batch"}, "norm must be one of"), ({"init": "zeros"}, "init must be one of"),
    ({"dtype": "float16"}, "dtype must be one of"), ({"activation": "relu"}, "activation must be one of"),
    ({"n_expert": 2, "activation": "gelu"}, "experts are SwiGLU"), ({"n_expert": 1}, "top_k must be at most n_expert"),
    ({"dropout": 1.0}, r"GPTConfig: dropout must be in \[0, 1\), got 1.0"), ({"dropout": -0.1}, "dropout must be in"),
    ({"n_kv_head": 0}, "n_kv_head must be 1 or more, or None, got 0"), ({"n_inner": 0}, "n_inner must be 1 or more"),
    ({"n_expert": 2, "n_inner": 1}, "n_inner must be at least top_k, .* got 1 and 2"),
    ({"n_expert": -1}, "n_expert must be 0 or more, got -1"),
    ({"load_balancing": -1}, "load_balancing must be finite and 0 or more, got -1"),
    ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0"), ({"rope_theta": np.nan}, "rope_theta must .* got nan")])
def test_a_shape_that_makes_no_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gpt(**change)


def test_the_hidden_features_follow_what_a_config_is_changed_to_unless_they_were_given():
    free, given = gpt().config, gpt(n_inner=20).config
    assert free.n_inner == 48 and dataclasses.replace(free, n_embd=32).n_inner == 96
    assert dataclasses.replace(dataclasses.replace(free, activation="gelu"), n_embd=32).n_inner == 128
    assert dataclasses.replace(free, n_inner=50).n_inner == dataclasses.replace(given, n_embd=32).n_inner + 30 == 50
    assert json.dumps(dataclasses.asdict(free)["n_inner"]) == "48" and pickle.loads(pickle.dumps(free)) == free


@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_inner",
                                  "window", "n_expert", "top_k"])
def test_a_size_that_is_no_integer_is_refused(name):
    with pytest.raises(TypeError, match=f"GPTConfig: {name} must be an integer, got 2.0"):
        gpt(**{name: 2.0})


@pytest.mark.parametrize("name", ["dropout", "rope_theta", "load_balancing"])
def test_an_option_that_is_no_number_is_refused(name):
    with pytest.raises(TypeError, match=f"GPTConfig: {name} must be a real number, got '0.5'"):
        gpt(**{name: "0.5"})


@pytest.mark.parametrize("name", ["bias", "tie_embedding", "recompute"])
def test_a_switch_that_is_no_bool_is_refused(name):
    with pytest.raises(TypeError, match=f"GPTConfig: {name} must be True or False, got 'no'"):
        gpt(**{name: "no"})
    with pytest.raises(TypeError, match=f"GPTConfig: {name} must be True or False, got array"):
        gpt(**{name: np.ones(2)})


@pytest.mark.parametrize("model", [nf.models.GPT, rlhf.RewardModel, rlhf.ValueModel])
def test_what_is_no_config_is_refused(model):
    with pytest.raises(TypeError, match=rf"{model.__name__}: config must be a GPTConfig, got dict; .*\(\*\*config\)"):
        model({"n_layer": 2}, rng=np.random.default_rng(0))


def test_tokens_that_do_not_fit_are_refused():
    model = gpt()
    with pytest.raises(TypeError, match="tokens must be integers, got float64"):
        model(np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"shape \(B, S\), got \(3,\)"):
        model(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="17 positions are more than block_size 16"):
        model(np.zeros((1, 17), int))
    with pytest.raises(ValueError, match=r"ids must be within 0 \.\. 29, got 30"):
        model(np.array([[30]]))
    with pytest.raises(ValueError, match=r"targets must have the shape of tokens, \(2, 3\), got \(3, 2\)"):
        model.loss(np.ones((2, 3), int), np.ones((3, 2), int))


@pytest.mark.parametrize("options", [{}, {"n_expert": 4}, {"position": "learned", "dropout": 0.1}, {"recompute": True}])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_have_no_logits_a_loss_of_0_and_gradients_of_0(shape, options):
    model, nothing = gpt(**options), np.zeros(shape, int)
    loss = model.loss(nothing, nothing)
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert model(nothing).shape == model.eval()(nothing).shape == (*shape, model.config.vocab_size)
    with nf.no_grad():
        assert model(nothing).shape == (*shape, model.config.vocab_size)


@pytest.mark.parametrize("recompute", [False, True])
def test_threads_with_a_shared_model_each_add_up_their_gradients(recompute):
    model, parts = gpt(n_expert=4, dtype="float64", recompute=recompute), [tokens(seed=seed) for seed in range(8)]

    def walk(part):
        model.shared().loss(part, part).backward()

    for part in parts:
        walk(part)
    expected = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(walk, parts))
    for p, gradient in zip(model.parameters(), expected):
        np.testing.assert_allclose(p.grad, gradient, atol=1e-12)
