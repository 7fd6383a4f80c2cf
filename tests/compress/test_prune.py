import numpy as np
import pytest

import numformer as nf
from numformer import compress
from tests.compress.small import batches, gpt, silenced

TOKENS = batches()[0][0]


@pytest.mark.parametrize("options", [{}, {"bias": True, "norm": "layer", "position": "learned"}, {"n_expert": 4},
                                     {"dtype": "float64"}, {"position": "alibi"}])
def test_a_pruned_model_is_the_full_one_with_those_heads_silent(options):
    model = gpt(**options)
    if options.get("bias"):
        for block in model.blocks:
            block.attention.qkv_bias.data[...] = np.random.default_rng(1).standard_normal(96)
    gone = {0: [1], 2: [0, 3]}
    small = compress.prune_heads(model, gone)
    assert [(b.attention.n_head, b.attention.qkv.shape, b.attention.out.shape) for b in small.blocks] == [
        (3, (72, 32), (32, 24)), (4, (96, 32), (32, 32)), (2, (48, 32), (32, 16))]
    error = np.abs(small.as_arrays()(TOKENS) - silenced(model, gone)(TOKENS)).max()
    assert error <= (1e-6 if model.config.dtype == "float32" else 1e-14)
    assert not np.shares_memory(small.embedding.weight.data, model.embedding.weight.data)


def test_groups_of_heads_go_whole():
    model = gpt(n_kv_head=2)
    small = compress.prune_heads(model, [[], [2, 3], [0, 1]])
    assert [list(sizes) for sizes in small.config.layer_heads] == [[4, 2], [2, 1], [2, 1]]
    np.testing.assert_allclose(small.as_arrays()(TOKENS), silenced(model, {1: [2, 3], 2: [0, 1]})(TOKENS), atol=1e-6)
    with pytest.raises(ValueError, match=r"2 heads share keys and values.* in layer 1 take out \[3\] too"):
        compress.prune_heads(model, {1: [2]})


def test_with_alibi_each_head_keeps_its_slope_through_pruning_twice_saving_and_loading(tmp_path):
    pytest.importorskip("safetensors")
    model = gpt(position="alibi", n_head=8, n_kv_head=4)
    small = compress.prune_heads(model, {0: [2, 3], 2: [0, 1, 6, 7]})
    assert small.config.alibi_heads == [[0, 1, 4, 5, 6, 7], list(range(8)), [2, 3, 4, 5]]
    compress.prune_layers(compress.prune_heads(small, {0: [2, 3]}), [1]).save_pretrained(tmp_path)
    again = nf.models.load(tmp_path)
    assert again.config.alibi_heads == [[0, 1, 6, 7], [2, 3, 4, 5]]
    twin = silenced(model, {0: [2, 3, 4, 5], 2: [0, 1, 6, 7]})
    twin.blocks = [twin.blocks[0], twin.blocks[2]]
    np.testing.assert_allclose(again.as_arrays()(TOKENS), twin(TOKENS), atol=1e-6)
    row = again.generate([1, 2, 3], 8, temperature=0)
    for length in range(3, 11):
        assert row[length] == again.as_arrays()(np.array([row[:length]]))[0, -1].argmax()


def test_a_fraction_takes_the_least_important_of_all_layers_but_never_the_last_of_one():
    model = gpt()
    scores = [np.array([.9, .1, .8, .7]), np.array([.01, .02, .03, .04]), np.array([.5, .6, .05, .9])]
    small = compress.prune_heads(model, fraction=5 / 12, importance=scores)
    expected = compress.prune_heads(model, {0: [1], 1: [0, 1, 2], 2: [2]})
    assert small.config == expected.config
    for a, b in zip(small.parameters(), expected.parameters()):
        np.testing.assert_array_equal(a.data, b.data)
    with pytest.raises(ValueError, match="11 heads, but only 9 can go"):
        compress.prune_heads(model, fraction=0.9, importance=scores)


def test_importance_by_head_and_by_group_choose_groups():
    model = gpt(n_kv_head=2)
    by_group = [np.array([1, 2.]), np.array([3., 4]), np.array([.5, 6])]
    by_head = [np.repeat(s / 2, 2) for s in by_group]
    for scores in (by_group, by_head):
        small = compress.prune_heads(model, fraction=1 / 3, importance=scores)
        assert [list(s) for s in small.config.layer_heads] == [[2, 1], [4, 2], [2, 1]]


def test_random_heads_come_from_the_generator():
    model = gpt()
    a, b, c = (compress.prune_heads(model, fraction=0.25, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert sum(b.attention.n_head for b in a.blocks) == 9
    np.testing.assert_array_equal(a.as_arrays()(TOKENS), b.as_arrays()(TOKENS))
    assert not np.array_equal(a.as_arrays()(TOKENS), c.as_arrays()(TOKENS))


def test_a_pruned_model_is_saved_loaded_decoded_and_trained(tmp_path):
    pytest.importorskip("safetensors")
    small = compress.prune_heads(gpt(), {0: [1], 2: [0, 3]})
    small.save_pretrained(tmp_path)
    again = nf.models.load(tmp_path)
    np.testing.assert_array_equal(again.as_arrays()(TOKENS), small.as_arrays()(TOKENS))
    row = again.generate([1, 2, 3], 8, temperature=0)
    for length in range(3, 11):
        assert row[length] == again.as_arrays()(np.array([row[:length]]))[0, -1].argmax()
    twice = compress.prune_heads(again, {1: [0]})
    assert [b.attention.n_head for b in twice.blocks] == [3, 3, 2]
    twice.train().loss(*batches()[0]).backward()
    assert all(p.grad is not None for p in twice.parameters())


def test_layers_go_and_the_rest_stay_in_order():
    model = gpt(layer_heads=[[4, 4], [2, 2], [3, 3]])
    small = compress.prune_layers(model, [1])
    assert small.config.n_layer == 2 and small.config.layer_heads == [[4, 4], [3, 3]]
    twin = model.as_arrays()
    twin.blocks = [twin.blocks[0], twin.blocks[2]]
    np.testing.assert_array_equal(small.as_arrays()(TOKENS), twin(TOKENS))
    least = compress.prune_layers(model, fraction=0.34, importance=[.2, .1, .3])
    np.testing.assert_array_equal(least.as_arrays()(TOKENS), small.as_arrays()(TOKENS))
    assert compress.prune_layers(model, fraction=0.34, rng=np.random.default_rng(0)).config.n_layer == 2


def test_progressive_pruning_tunes_each_smaller_model(monkeypatch):
    sizes = []

    def tune(model):
        sizes.append(sum(b.attention.n_head for b in model.blocks))
        model.embedding.weight.data *= 1.01
    model = gpt()
    small = compress.progressive_prune(model, batches(), 0.5, step=0.25, tune=tune)
    assert sizes == [9, 6] and sum(b.attention.n_head for b in small.blocks) == 6
    np.testing.assert_allclose(small.embedding.weight.data, model.embedding.weight.data * 1.01**2, rtol=1e-6)
    first = compress.prune_heads(model, fraction=0.25, importance=compress.head_importance(model, batches()))
    tune(first)
    second = compress.prune_heads(first, fraction=3 / 9, importance=compress.head_importance(first, batches()))
    assert second.config == small.config
    assert compress.progressive_prune(model, iter(batches()), 0.67, kind="layers", step=0.34).config.n_layer == 1
    other = gpt(7)
    assert compress.progressive_prune(model, batches(), 0.1, tune=lambda model: other) is other
    with pytest.raises(TypeError, match=r"tune must return a GPT, or None .*, got dict"):
        compress.progressive_prune(model, batches(), 0.1, tune=lambda model: {"loss": 1.0})


def test_a_model_from_which_nothing_went_has_memory_of_its_own():
    model = gpt()
    for fraction in (0, 0.01):
        same = compress.progressive_prune(model, batches(), fraction)
        for name, array in model.state_dict().items():
            assert (same.state_dict()[name] == array).all() and not np.shares_memory(same.state_dict()[name], array)


def test_bad_requests_are_refused():
    model = gpt()
    with pytest.raises(ValueError, match="layer 1 would have none of its 4 heads left"):
        compress.prune_heads(model, {1: [0, 1, 2, 3]})
    with pytest.raises(ValueError, match=r"head must be 0\.\.3, got 4"):
        compress.prune_heads(model, {1: [4]})
    with pytest.raises(ValueError, match=r"layer must be 0\.\.2, got -1"):
        compress.prune_heads(model, {-1: [0]})
    with pytest.raises(TypeError, match=r"prune_heads: head must be an integer, got 1\.5"):
        compress.prune_heads(model, {1: [1.5]})
    for heads in ([0, 1, 2], {1: 0}):
        with pytest.raises(TypeError, match="prune_heads: heads must be given as a list of integers, got 0"):
            compress.prune_heads(model, heads)
    with pytest.raises(TypeError, match=r"heads must be a dict of layer to list of heads, .*, got 3"):
        compress.prune_heads(model, 3)
    with pytest.raises(TypeError, match="prune_layers: layers must be given as a list of integers, got 1"):
        compress.prune_layers(model, 1)
    with pytest.raises(TypeError, match=r"prune_layers: layer must be an integer, got 1\.5"):
        compress.prune_layers(model, [1.5])
    with pytest.raises(TypeError, match=r"prune_heads: fraction must be a real number, got '0\.5'"):
        compress.prune_heads(model, fraction="0.5", rng=np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"prune_heads: rng must be a numpy\.random\.Generator, got int"):
        compress.prune_heads(model, fraction=0.5, rng=3)
    with pytest.raises(ValueError, match="each of 3 layers, got 1"):
        compress.prune_heads(model, [[0]])
    for options in ({}, {"heads": {0: [0]}, "fraction": 0.5}):
        with pytest.raises(ValueError, match="either heads, or fraction"):
            compress.prune_heads(model, **options)
    for options in ({}, {"importance": [np.ones(4)] * 3, "rng": np.random.default_rng(0)}):
        with pytest.raises(ValueError, match="either importance or rng"):
            compress.prune_heads(model, fraction=0.5, **options)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1"):
        compress.prune_heads(model, fraction=1, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\[4, 4, 4\] scores"):
        compress.prune_heads(model, fraction=0.5, importance=[np.ones(4)] * 2)
    with pytest.raises(ValueError, match="must be finite"):
        compress.prune_heads(model, fraction=0.5, importance=[np.full(4, np.nan)] * 3)
    with pytest.raises(TypeError, match="must be a GPT, got Linear"):
        compress.prune_heads(nf.nn.Linear(2, 2, rng=np.random.default_rng(0)), {})
    with pytest.raises(ValueError, match="none of the 3 layers"):
        compress.prune_layers(model, [0, 1, 2])
    with pytest.raises(ValueError, match=r"layer must be 0\.\.2, got 3"):
        compress.prune_layers(model, [3])
    with pytest.raises(ValueError, match="either layers, or fraction"):
        compress.prune_layers(model)
    with pytest.raises(ValueError, match='"heads" or "layers"'):
        compress.progressive_prune(model, batches(), 0.5, kind="experts")
    with pytest.raises(ValueError, match=r"step must be in \(0, 1\]"):
        compress.progressive_prune(model, batches(), 0.5, step=0)


@pytest.mark.parametrize("how", [{"importance": []}, {"rng": np.random.default_rng(0)}])
def test_a_choice_beside_what_is_named_is_refused(how):
    with pytest.raises(ValueError, match="prune_heads: give either heads, or fraction with importance or rng"):
        compress.prune_heads(gpt(), {0: [1]}, **how)
    with pytest.raises(ValueError, match="prune_layers: give either layers, or fraction with importance or rng"):
        compress.prune_layers(gpt(), [1], **how)
