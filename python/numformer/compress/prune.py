"""Take heads and layers out of a GPT: the arrays shrink, and its config says so.

Every function returns a new model with memory of its own. With grouped queries a key-value head and the query heads
that it serves go together.
"""
import dataclasses

import numpy as np

from numformer.compress.importance import head_importance, layer_importance, take
from numformer.ops.arguments import as_integer, as_number, need_generator
from numformer.tensor import Tensor

__all__ = ["progressive_prune", "prune_heads", "prune_layers"]


def prune_heads(model, heads=None, *, fraction=None, importance=None, rng=None):
    """Return a model without some attention heads.

    Its outputs are those of the full model with the outputs of these heads set to zero.

    Parameters
    ----------
    model : GPT
    heads : dict of layer to list of heads, or a list of lists, one for each layer
        The heads to take out. Or:
    fraction : float
        Take out so large a share of all heads of the model, rounded: the least important of all layers together, or
        random ones. The last group of a layer always stays.
    importance : list of arrays, one for each layer
        As :func:`head_importance` gives them, by head or by group; a group counts as the sum of its heads.
    rng : numpy.random.Generator
        Choose at random, as something to compare with.

    Returns
    -------
    GPT
        In the mode (training or evaluation) of `model`. ``config.layer_heads`` holds how many are left, and with ALiBi
        ``config.alibi_heads`` which, as each keeps its slope.

    Raises
    ------
    ValueError
        If a layer would have no head left, if a group of heads that share keys and values would be torn apart, if a
        head or layer does not exist, or if it is not said which heads.
    TypeError
        If the model is no GPT of floats, or heads or layers are no integers in lists.
    """
    _check(model, "prune_heads")
    if (heads is None) == (fraction is None) or (fraction is None and (importance is not None or rng is not None)):
        raise ValueError("prune_heads: give either heads, or fraction with importance or rng")
    attentions = [block.attention for block in model.blocks]
    if heads is None:
        groups = _choose_groups(attentions, fraction, importance, rng)
    else:
        groups = _named_groups(attentions, heads)
    keep = [np.setdiff1d(np.arange(a.n_kv_head), gone) for a, gone in zip(attentions, groups)]
    for layer, (a, left) in enumerate(zip(attentions, keep)):
        if not len(left):
            raise ValueError(f"prune_heads: layer {layer} would have none of its {a.n_head} heads left; keep one, or "
                             f"take out the whole layer with prune_layers")
    sizes, queries = [], []
    for a, left in zip(attentions, keep):
        share = a.n_head // a.n_kv_head
        sizes.append([len(left) * share, len(left)])
        queries.append((left[:, None] * share + np.arange(share)).ravel())
    alibi = None
    if model.config.position == "alibi":
        had = model.config.alibi_heads or [range(a.n_head) for a in attentions]
        alibi = [[heads[head] for head in query] for heads, query in zip(had, queries)]
    arrays = model.state_dict()
    for layer, (a, left, query) in enumerate(zip(attentions, keep, queries)):
        name = f"blocks.{layer}.attention."
        rows = _features(np.concatenate([query, a.n_head + left, a.n_head + a.n_kv_head + left]), a.head_dim)
        for part in ("qkv", "qkv_bias"):
            if name + part in arrays:
                arrays[name + part] = arrays[name + part][rows]
        arrays[name + "out"] = arrays[name + "out"][:, _features(query, a.head_dim)]
    return _rebuilt(model, arrays, layer_heads=sizes, alibi_heads=alibi)


def prune_layers(model, layers=None, *, fraction=None, importance=None, rng=None):
    """Return a model without some layers.

    Parameters
    ----------
    model : GPT
    layers : list of int
        The layers to take out. Or:
    fraction : float
        Take out so large a share of the layers, rounded: the least important, or random ones.
    importance : array (n_layer,)
        As :func:`layer_importance` gives it.
    rng : numpy.random.Generator

    Returns
    -------
    GPT
        In the mode (training or evaluation) of `model`.

    Raises
    ------
    ValueError
        If no layer would be left, one does not exist, or it is not said which.
    TypeError
        If the model is no GPT of floats, or heads or layers are no integers in lists.
    """
    _check(model, "prune_layers")
    total = len(model.blocks)
    if (layers is None) == (fraction is None) or (fraction is None and (importance is not None or rng is not None)):
        raise ValueError("prune_layers: give either layers, or fraction with importance or rng")
    if layers is None:
        scores = _scores("prune_layers", [total], fraction, None if importance is None else [importance], rng)[0]
        layers = np.argsort(scores, kind="stable")[:round(fraction * total)]
    gone = _indices("prune_layers", "layer", layers, total)
    keep = [layer for layer in range(total) if layer not in gone]
    if not keep:
        raise ValueError(f"prune_layers: none of the {total} layers would be left")
    arrays = {}
    for name, array in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            layer, _, rest = rest.partition(".")
            if int(layer) in gone:
                continue
            name = f"blocks.{keep.index(int(layer))}.{rest}"
        arrays[name] = array
    sizes, alibi = ([list(heads[layer]) for layer in keep] if heads else None
                    for heads in (model.config.layer_heads, model.config.alibi_heads))
    return _rebuilt(model, arrays, n_layer=len(keep), layer_heads=sizes, alibi_heads=alibi)


def progressive_prune(model, batches, fraction, *, kind="heads", step=0.1, tune=None, count=None):
    """Prune in steps: the importance is computed anew before each, the model tuned after it.

    Parameters
    ----------
    model : GPT
    batches : iterable of (tokens, targets)
        What importance is computed on, the same in every step.
    fraction : float
        The share of the heads (or layers) that `model` has which is to go in the end.
    kind : {"heads", "layers"}
    step : float
        The share of them that goes in one step.
    tune : callable, optional
        ``tune(model)`` after each step: trains the smaller model in place and returns None, or returns another.
    count : int, optional
        How many batches to take; all where None.

    Returns
    -------
    GPT

    Raises
    ------
    ValueError, TypeError
        As :func:`prune_heads` and :func:`prune_layers`; TypeError where `tune` returns anything else.
    """
    if kind not in ("heads", "layers"):
        raise ValueError(f'progressive_prune: kind must be "heads" or "layers", got {kind!r}')
    if not 0 < as_number(step, "progressive_prune", "step") <= 1:
        raise ValueError(f"progressive_prune: step must be in (0, 1], got {step}")
    _check_fraction("progressive_prune", fraction)
    _check(model, "progressive_prune")
    batches = take(batches, count, "progressive_prune")

    def units(model):
        return sum(block.attention.n_head for block in model.blocks) if kind == "heads" else len(model.blocks)

    given, whole, done = model, units(model), 0.0
    while done < fraction - 1e-9:
        done = min(done + step, fraction)
        now = units(model)
        share = (now - round((1 - done) * whole)) / now
        if share <= 0:
            continue
        if kind == "heads":
            model = prune_heads(model, fraction=share, importance=head_importance(model, batches))
        else:
            model = prune_layers(model, fraction=share, importance=layer_importance(model, batches))
        if tune is not None and (tuned := tune(model)) is not None:
            if not hasattr(tuned, "blocks"):
                raise TypeError("progressive_prune: tune must return a GPT, or None where it changed the one that it "
                                f"was given, got {type(tuned).__name__}")
            model = tuned
    return _rebuilt(model, model.state_dict()) if model is given else model


def _check(model, op):
    if not hasattr(model, "blocks") or not hasattr(getattr(model, "config", None), "layer_heads"):
        raise TypeError(f"{op}: model must be a GPT, got {type(model).__name__}")
    if any(type(block.attention.qkv) is not Tensor for block in model.blocks):
        raise TypeError(f"{op}: the model's weights must be floats; prune first, then quantize")


def _check_fraction(op, fraction):
    if not 0 <= as_number(fraction, op, "fraction") < 1:
        raise ValueError(f"{op}: fraction must be in [0, 1), got {fraction}")


def _index(op, what, number, total):
    if not 0 <= as_integer(number, op, what) < total:
        raise ValueError(f"{op}: {what} must be 0..{total - 1}, got {number}")
    return int(number)


def _indices(op, what, numbers, total):
    if not np.iterable(numbers):
        raise TypeError(f"{op}: {what}s must be given as a list of integers, got {numbers!r}")
    return {_index(op, what, number, total) for number in numbers}


def _named_groups(attentions, heads):
    """The key-value heads to take out of each layer, from the query heads."""
    if not isinstance(heads, dict):
        if not hasattr(heads, "__len__"):
            raise TypeError("prune_heads: heads must be a dict of layer to list of heads, or a list of lists, got "
                            f"{heads!r}")
        if len(heads) != len(attentions):
            raise ValueError(f"prune_heads: heads must have a list for each of {len(attentions)} layers, "
                             f"got {len(heads)}")
        heads = dict(enumerate(heads))
    groups = [[] for _ in attentions]
    for layer, gone in heads.items():
        a = attentions[_index("prune_heads", "layer", layer, len(attentions))]
        gone, share = _indices("prune_heads", "head", gone, a.n_head), a.n_head // a.n_kv_head
        groups[layer] = sorted({head // share for head in gone})
        torn = [h for g in groups[layer] for h in range(g * share, (g + 1) * share) if h not in gone]
        if torn:
            raise ValueError(f"prune_heads: {share} heads share keys and values and go together: in layer {layer} "
                             f"take out {torn} too")
    return groups


def _choose_groups(attentions, fraction, importance, rng):
    counts = [a.n_kv_head for a in attentions]
    if importance is not None and len(importance) == len(attentions):
        importance = [np.asarray(s, np.float64) for s in importance]
        importance = [s.reshape(a.n_kv_head, -1).sum(1) if s.shape == (a.n_head,) else s
                      for s, a in zip(importance, attentions)]
    scores = _scores("prune_heads", counts, fraction, importance, rng)
    # in each layer the best group cannot go
    order = sorted((score, layer, group) for layer, s in enumerate(scores) for group, score in enumerate(s)
                   if group != int(np.argmax(s)))
    shares = [a.n_head // a.n_kv_head for a in attentions]
    wanted = round(fraction * sum(a.n_head for a in attentions))
    groups, gone = [[] for _ in attentions], 0
    for _, layer, group in order:
        if gone + shares[layer] / 2 > wanted:       # the nearest number of whole groups
            break
        groups[layer].append(group)
        gone += shares[layer]
    else:
        if gone < wanted:
            raise ValueError(f"prune_heads: a fraction of {fraction} is {wanted} heads, but only {gone} can go when "
                             f"each layer keeps a group")
    return groups


def _scores(op, counts, fraction, importance, rng):
    _check_fraction(op, fraction)
    if (importance is None) == (rng is None):
        raise ValueError(f"{op}: with fraction give either importance or rng")
    if importance is None:
        need_generator(rng, op)
        return [rng.random(count) for count in counts]
    scores = [np.asarray(s, np.float64) for s in importance]
    if [s.shape for s in scores] != [(count,) for count in counts]:
        raise ValueError(f"{op}: importance must have {counts} scores, got shapes {[s.shape for s in scores]}")
    if not all(np.isfinite(s).all() for s in scores):
        raise ValueError(f"{op}: importance must be finite")
    return scores


def _features(heads, size):
    """The rows of a projection that belong to these heads."""
    return (heads[:, None] * size + np.arange(size)).ravel()


def _rebuilt(model, arrays, **changes):
    """A model of the changed config that holds copies of `arrays`."""
    new = type(model)(dataclasses.replace(model.config, **changes), rng=np.random.default_rng(0))
    new.load_state_dict(arrays)
    return new.train(model.training)
