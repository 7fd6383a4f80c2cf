import collections
import copy

import numpy as np
import pytest

import numformer as nf
from numformer import nn


class Pair(nn.Module):
    def __init__(self, rng):
        self.first = nn.Linear(2, 3, rng=rng)
        self.rest = [nn.Linear(3, 3, bias=False, rng=rng), nn.RMSNorm(3)]
        self.tied = self.first.weight
        self.table = np.ones(4)
        self.drop = nn.Dropout(0.5, rng=rng)


def pair(seed=0):
    return Pair(np.random.default_rng(seed))


def test_parameters_are_found_in_attributes_and_lists_once():
    names = [name for name, _ in pair().named_parameters()]
    assert sorted(names) == ["first.bias", "rest.0.weight", "rest.1.weight", "tied"]
    assert len(pair().parameters()) == 4


def test_parameters_are_found_in_lists_of_lists_and_in_dicts():
    class Nested(nn.Module):
        def __init__(self, rng):
            self.blocks = [(nn.RMSNorm(3), [nn.Linear(3, 3, bias=False, rng=rng)]) for _ in range(2)]
            self.heads = {"a": nn.Linear(3, 1, rng=rng), "scale": nf.Tensor(np.ones(1, np.float32), requires_grad=True)}

        def __call__(self, x):
            for norm, layers in self.blocks:
                x = layers[0](norm(x))
            return self.heads["a"](x) * self.heads["scale"]

    model, other = (Nested(np.random.default_rng(seed)) for seed in range(2))
    assert list(model.state_dict()) == ["heads.scale", "blocks.0.0.weight", "blocks.0.1.0.weight", "blocks.1.0.weight",
                                        "blocks.1.1.0.weight", "heads.a.weight", "heads.a.bias"]
    x = np.ones((2, 3), np.float32)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    other.load_state_dict(model.state_dict())
    y = other.as_arrays()(x)
    assert type(y) is np.ndarray and np.array_equal(y, model(x).data)
    assert not model.eval().heads["a"].training


def test_what_a_call_leaves_on_its_module_is_no_parameter():
    model, x = pair(), np.ones((4, 2), np.float32)
    names = list(model.state_dict())
    model.loss, model.seen = model.first(x).mean(), model.first(x).detach()
    assert list(model.state_dict()) == names
    with nf.no_grad():
        model.loss = model.first(x).mean()
    nf.checkpoint(lambda: setattr(model, "seen", model.first(x)) or model.seen * 2.0)
    assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
    for p in model.parameters():
        p.requires_grad = False             # frozen
    model.loss = model.first(x).mean()
    assert list(model.state_dict()) == names


def test_a_leaf_that_an_op_computed_is_a_parameter():
    model = nn.Module()
    model.weight = nf.Tensor(np.ones(3)) * 2.0
    model.weight.requires_grad = True
    assert model.parameters() == [model.weight]
    model.weight.requires_grad = False      # frozen
    for same in (model, copy.deepcopy(model)):
        assert list(same.state_dict()) == ["weight"]
    with pytest.raises(TypeError, match="only floats have gradients, got int64"):
        nf.Tensor(np.arange(3)).requires_grad = True


def test_a_state_dict_goes_back():
    a, b = pair(0), pair(1)
    b.load_state_dict(a.state_dict())
    for name, array in a.state_dict().items():
        np.testing.assert_array_equal(b.state_dict()[name], array)
        assert not np.shares_memory(b.state_dict()[name], array)
    c = pair(2)
    c.load_state_dict(dict(a.named_parameters()))       # Tensors
    assert all((c.state_dict()[name] == array).all() for name, array in a.state_dict().items())
    for wrong in (None, list(a.state_dict())):
        with pytest.raises(TypeError, match="load_state_dict: arrays must be a dict of arrays by name, got"):
            c.load_state_dict(wrong)


def test_parameters_change_places_by_their_own_state_dict():
    model = nn.Module()
    model.layers = [nn.Linear(3, 3, rng=np.random.default_rng(seed)) for seed in range(3)]
    before = {name: array.copy() for name, array in model.state_dict().items()}
    moved = {name: f"layers.{2 - int(name[7])}{name[8:]}" for name in before}
    model.load_state_dict({moved[name]: array for name, array in model.state_dict().items()})
    for name, array in before.items():
        np.testing.assert_array_equal(model.state_dict()[moved[name]], array)


def test_what_does_not_fit_is_named_and_nothing_is_changed():
    model, before = pair(), {n: a.copy() for n, a in pair().state_dict().items()}
    arrays = pair(1).state_dict()
    del arrays["first.bias"]
    arrays["more"] = np.ones(1)
    arrays["rest.0.weight"] = np.ones((3, 4))
    message = r"missing first.bias; unexpected more; rest.0.weight must have shape \(3, 3\), got \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(arrays)
    arrays = pair(1).state_dict() | {"rest.1.weight": np.ones(3, complex)}
    with pytest.raises(ValueError, match=r"rest.1.weight must be of real numbers, got complex128"):
        model.load_state_dict(arrays)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_train_and_eval_reach_every_module():
    model = pair().eval()
    assert not model.drop.training and not model.rest[1].training
    assert model.train().drop.training


def test_as_arrays_shares_memory_and_leaves_the_module_alone():
    model = pair()
    twin = model.as_arrays()
    assert type(twin.first.weight) is np.ndarray and twin.rest[0].weight is model.rest[0].weight.data
    assert not twin.drop.training and model.drop.training and len(model.parameters()) == 4


@pytest.mark.parametrize("hold", [
    lambda parts: collections.OrderedDict(enumerate(parts)), lambda parts: collections.namedtuple("Two", "a b")(*parts),
    type("Stack", (list,), {})])
def test_twins_have_parts_of_their_own_in_containers_of_any_class(hold):
    rng = np.random.default_rng(0)
    model = nn.Module()
    model.parts = hold([nn.Linear(2, 3, rng=rng), nn.Dropout(0.5, rng=rng)])
    model.seen = collections.Counter("aab")
    twins = model.as_arrays(), model.shared().eval()
    assert all(part.training for part in model.modules())
    assert all(type(twin.parts) is type(model.parts) and not any(p.training for p in twin.modules()) for twin in twins)
    assert not twins[0].parameters() and twins[1].parameters() == model.parameters()
    assert all(twin.seen == model.seen and twin.seen is not model.seen for twin in twins)


def test_xavier_uniform_fills_its_bound():
    weight = nn.Linear(300, 200, rng=np.random.default_rng(0)).weight.data
    bound = np.sqrt(6 / 500)
    assert weight.dtype == np.float32 and 0.99 * bound < np.abs(weight).max() <= bound


def test_a_seed_in_place_of_a_generator_is_refused():
    for make in (lambda: nn.Linear(3, 2, rng=0), lambda: nn.init.normal(None, 3, 2)):
        with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator, got .*; make one with"):
            make()


def test_heads_that_do_not_divide_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="multiple of n_head"):
        nn.MultiHeadAttention(10, 3, rng=rng)
    with pytest.raises(ValueError, match="n_kv_head"):
        nn.MultiHeadAttention(12, 6, 4, rng=rng)
    for shape, message in (((8, 0), "n_head must be 1 or more, got 0"), ((8, -2), "n_head must be 1 or more, got -2"),
                           ((8, 2, 0), "n_kv_head must be 1 or more, got 0"), ((0, 2), "n_embd must be 1 or more")):
        with pytest.raises(ValueError, match=f"MultiHeadAttention: {message}"):
            nn.MultiHeadAttention(*shape, rng=rng)
    with pytest.raises(ValueError, match="head_dim must be 1 or more, got 0"):
        nn.MultiHeadAttention(8, 2, head_dim=0, rng=rng)
    with pytest.raises(TypeError, match=r"n_head must be an integer, got 2\.0"):
        nn.MultiHeadAttention(8, 2.0, rng=rng)
    with pytest.raises(TypeError, match="MultiHeadAttention: each side of window_size must be an integer, got None"):
        nn.MultiHeadAttention(8, 2, window_size=(None, 0), rng=rng)
    with pytest.raises(ValueError, match="activation"):
        nn.MLP(4, 8, activation="relu", rng=rng)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        nn.Dropout(1.0, rng=rng)


SIZED = {"Linear": ("in_features", "out_features"), "Embedding": ("count", "size"), "LayerNorm": ("size",),
         "RMSNorm": ("size",), "MLP": ("n_embd", "hidden"), "MoE": ("n_embd", "hidden", "n_expert", "top_k")}


@pytest.mark.parametrize(("layer", "name"), [(layer, name) for layer, names in SIZED.items() for name in names])
def test_a_size_that_no_layer_has_is_named(layer, name):
    rest = {} if layer.endswith("Norm") else {"rng": np.random.default_rng(0)}
    sizes = dict.fromkeys(SIZED[layer], 4)
    for wrong, error, says in ((0, ValueError, "1 or more, got 0"), (-3, ValueError, "1 or more, got -3"),
                               (2.0, TypeError, "an integer, got 2.0")):
        with pytest.raises(error, match=f"^{layer}: {name} must be {says}"):
            getattr(nn, layer)(**{**sizes, name: wrong}, **rest)
    getattr(nn, layer)(**{**sizes, name: np.int64(4)}, **rest)


def test_rotary_tables_of_half_a_pair_are_refused():
    for size in (3, 0, -2):
        with pytest.raises(ValueError, match=f"rotary_tables: head_dim must be even and 2 or more, got {size}"):
            nn.rotary_tables(4, size)
    with pytest.raises(ValueError, match="rotary_tables: length must be 0 or more, got -1"):
        nn.rotary_tables(-1, 4)
