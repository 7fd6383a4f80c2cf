"""Module: a tree of named parameters.

A Tensor in an attribute is a parameter; a Module in an attribute, or in a list or tuple there, is a part. Anything
else (numbers, ndarrays of constants, generators) belongs to the module alone and is not saved.
"""
import copy

import numpy as np

from numformer.tensor import Tensor

__all__ = ["Module"]


class Module:
    """The base of all layers and models: find, save, load and freeze parameters by name."""

    training = True

    def named_parameters(self):
        """Yield (name, Tensor), names as ``"blocks.0.norm.weight"``; a parameter in two places comes once."""
        seen = set()
        for name, parameter in self._walk(""):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self):
        """The parameters as a list of Tensors."""
        return [parameter for _, parameter in self.named_parameters()]

    def modules(self):
        """Yield this module and every module in it."""
        yield self
        for _, part in self._parts():
            yield from part.modules()

    def _parts(self):
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, tuple)):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{i}", item

    def _walk(self, prefix):
        for name, value in vars(self).items():
            if type(value) is Tensor:
                yield prefix + name, value
        for name, part in self._parts():
            yield from part._walk(f"{prefix}{name}.")

    def state_dict(self):
        """The parameters' values by name: the arrays themselves, no copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, arrays):
        """Copy `arrays` (by name) into the parameters; nothing is changed unless all fit.

        Raises
        ------
        ValueError
            Names that are missing or unexpected, and shapes that differ, all in one message.
        """
        own = dict(self.named_parameters())
        wrong = [f"missing {name}" for name in own if name not in arrays]
        wrong += [f"unexpected {name}" for name in arrays if name not in own]
        wrong += [f"{name} must have shape {own[name].shape}, got {np.shape(arrays[name])}"
                  for name in own if name in arrays and np.shape(arrays[name]) != own[name].shape]
        if wrong:
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"load_state_dict: {'; '.join(wrong[:8])}{more}")
        for name, parameter in own.items():
            np.copyto(parameter.data, arrays[name], casting="same_kind")

    def train(self, mode=True):
        """Set training mode (dropout on) in every module; return self."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        """Set evaluation mode (dropout off) in every module; return self."""
        return self.train(False)

    def as_arrays(self):
        """This module with plain arrays (the same memory) in place of the parameters, in evaluation mode.

        It takes arrays and gives arrays, and nothing on the way is wrapped or recorded: for decoding.
        """
        return _as_arrays(self)

    def __repr__(self):
        count = sum(p.size for p in self.parameters())
        return f"{type(self).__name__}({count} parameters)"


def _as_arrays(value):
    if type(value) is Tensor:
        return value.data
    if isinstance(value, Module):
        twin = copy.copy(value)
        for name, attribute in vars(value).items():
            if isinstance(attribute, (Tensor, Module, list, tuple)):
                setattr(twin, name, _as_arrays(attribute))
        twin.training = False
        return twin
    if type(value) in (list, tuple):
        return type(value)([_as_arrays(item) for item in value])
    return value
