"""Checkpointing of modules, with what their experts leave behind for the losses."""
import copy

import numformer as nf
from numformer.nn.moe import MoE
from numformer.tensor import Tensor

__all__ = ["checkpoint"]


def checkpoint(module, *inputs, rng=None):
    """Call ``module(*inputs)`` and keep only its inputs; its inside is computed again when the gradient is wanted.

    As :func:`numformer.checkpoint`, and the ``routing`` of every :class:`MoE` in `module` can be used in losses
    afterwards: its ``weight`` and ``probabilities`` are carried out of the call with their gradients.

    Parameters
    ----------
    module : Module
        Its call returns a Tensor or a tuple of Tensors.
    *inputs : Tensor or anything else
    rng : numpy.random.Generator, or a sequence of them, optional
        What it draws from itself; those of dropout need not be given.

    Returns
    -------
    Tensor, or a tuple of them
    """
    experts = [part for part in module.modules() if isinstance(part, MoE)]
    first = []          # whether the first run gave one Tensor, and its routings

    def run(*inputs):
        before = [moe.routing for moe in experts]
        ys = module(*inputs)
        made = [(moe, moe.routing) for moe, old in zip(experts, before) if moe.routing is not old]
        for moe, old in zip(experts, before):
            moe.routing = old
        if not first:
            first.append((type(ys) is Tensor, made))
        return (*([ys] if type(ys) is Tensor else ys), *[t for _, r in made for t in (r.weight, r.probabilities)])

    outputs = list(nf.checkpoint(run, *inputs, rng=rng))
    single, made = first[0]
    for moe, routing in reversed(made):
        moe.routing = copy.copy(routing)
        moe.routing.probabilities, moe.routing.weight = outputs.pop(), outputs.pop()
    return outputs[0] if single else tuple(outputs)
