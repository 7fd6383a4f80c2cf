"""How much a model would miss a head or a layer.

    head     I_h = E |Att_h^T dL/dAtt_h|, divided by its layer's norm      Michel et al. 2019, arXiv:1905.10650
    layer    1 - E cos(x_in, x_out)                                        Men et al. 2024, ShortGPT, arXiv:2403.03853

Both look at a twin of the model that shares its memory, in evaluation mode: the model, its gradients and what it
remembers of its last pass stay as they are.
"""
import itertools

import numpy as np

from numformer.models.gpt import real_positions
from numformer.nn import Module, MultiHeadAttention
from numformer.ops.arguments import as_integer
from numformer.tensor import Tensor

__all__ = ["head_importance", "layer_importance", "real_tokens", "take"]


def take(batches, count, op):
    """The batches as a list: the first `count`, or all of what has an end."""
    if count is None and getattr(batches, "endless", False):
        raise ValueError(f"{op}: these batches never end; say how many to take with count=")
    if count is not None and as_integer(count, op, "count") < 1:
        raise ValueError(f"{op}: count must be 1 or more, got {count}")
    batches = list(itertools.islice(batches, count))
    if not batches:
        raise ValueError(f"{op}: there is no batch")
    return batches


def real_tokens(batch):
    """The tokens (B, S) of a batch, and which are no padding, bool (B, S): all, where there are no targets to tell."""
    tokens, *rest = batch
    shape = np.shape(tokens)
    has_targets = len(shape) == 2 and rest and np.shape(rest[0]) == shape
    return tokens, real_positions(np.asarray(rest[0])) if has_targets else np.ones(shape, bool)


def head_importance(model, batches, *, count=None, groups=False, normalize=True):
    """Score every attention head by how fast the loss would change if its output shrank.

    The gradient is that of a factor 1 on the head's output, one factor for each row that passes through it: per row
    |sum over positions of Att_h . dL/dAtt_h|, averaged over all rows.

    Parameters
    ----------
    model : Module with ``loss(*batch)``, whose attention is :class:`numformer.nn.MultiHeadAttention`
    batches : iterable of (tokens, targets), or of what else ``loss`` takes
    count : int, optional
        How many batches to take; all where None.
    groups : bool
        Score the groups of heads that share keys and values (grouped queries) instead: the factor is on all of them.
    normalize : bool
        Divide the scores of a layer by their Euclidean norm, as the paper does (a layer of zeros stays).

    Returns
    -------
    list of float64 ndarray
        One for each layer, (n_head,) or, with `groups`, (n_kv_head,).

    Raises
    ------
    TypeError
        If the model has no MultiHeadAttention, or `count` is no integer.
    ValueError
        If there is no batch, or no end of them and no `count`.
    """
    if not isinstance(model, Module):
        raise TypeError(f"head_importance: model must be a Module, got {type(model).__name__}")
    twin = model.as_arrays()
    attentions = [part for part in twin.modules() if isinstance(part, MultiHeadAttention)]
    if not attentions:
        raise TypeError(f"head_importance: {type(model).__name__} has no MultiHeadAttention")
    totals = [np.zeros(a.n_kv_head if groups else a.n_head) for a in attentions]
    rows = np.zeros(len(attentions))
    gates = [_gates(a) for a in attentions]
    for batch in take(batches, count, "head_importance"):
        for gate in gates:
            gate.clear()
        twin.loss(*batch).backward()
        for i, (a, gate) in enumerate(zip(attentions, gates)):
            slope = np.concatenate([factors.grad for factors in gate.values()], dtype=np.float64)
            slope *= len(batch[0])          # the loss is a mean over the rows
            if groups:
                slope = slope.reshape(len(slope), a.n_kv_head, -1).sum(-1)
            totals[i] += np.abs(slope).sum(0)
            rows[i] += len(slope)
    scores = [total / count for total, count in zip(totals, rows)]
    return [s / (np.linalg.norm(s) or 1.0) for s in scores] if normalize else scores


def _gates(attention):
    """Factors of 1 on the heads of `attention`: a dict that fills with them, by the rows that pass through it."""
    gates, heads = {}, attention.heads
    dtype = getattr(attention.out, "dtype", np.float32)         # quantized weights have none

    def gated(x, *more):
        if len(x) not in gates:
            gates[len(x)] = Tensor(np.ones((len(x), attention.n_head), dtype), requires_grad=True)
        attention.head_gate = gates[len(x)]
        return heads(x, *more)

    attention.heads = gated
    return gates


def layer_importance(model, batches, *, count=None):
    """Score every layer by how far it turns what passes through it (ShortGPT's block influence).

    Parameters
    ----------
    model : GPT
    batches : iterable of (tokens, ...) or (tokens, targets)
        Only the tokens are looked at; what stands behind a row's last target that counts is padding and left out.
    count : int, optional
        How many batches to take; all where None.

    Returns
    -------
    float64 ndarray (n_layer,)
        1 - mean cosine of the stream before and after the layer, over all tokens; from 0, does nothing, to 2.

    Raises
    ------
    TypeError
        If the model has no ``blocks``, or `count` is no integer.
    ValueError
        If there is no batch or no token, or no end of the batches and no `count`.
    """
    if not hasattr(model, "blocks"):
        raise TypeError(f"layer_importance: {type(model).__name__} has no blocks")
    twin = model.as_arrays()
    totals, seen = np.zeros(len(twin.blocks)), 0
    for tokens, real in map(real_tokens, take(batches, count, "layer_importance")):
        x, rotary = twin.enter(tokens)
        for layer, block in enumerate(twin.blocks):
            before, x = x, block(x, rotary, None, layer)
            totals[layer] += _cosines(before[real], x[real]).sum()
        seen += real.sum()
    if not seen:
        raise ValueError("layer_importance: the batches hold no tokens, or nothing but padding")
    return 1 - totals / seen


def _cosines(a, b):
    """Of each row of `a` with the same row of `b`; 1 where both are zero."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    dot, lengths = np.einsum("ij,ij->i", a, b), np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(lengths > 0, dot / np.where(lengths > 0, lengths, 1), (a == b).all(1))
