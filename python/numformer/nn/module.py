"""Module: a tree of named parameters.

A Tensor in an attribute is a parameter, unless an op made it: what a call leaves there, a loss or weights to look at,
is none. A Module there is a part. Both are found in lists, tuples and dicts too, at any depth. A QuantizedWeight in an
attribute, or in a list there, is no parameter (nothing trains it), but saved with them. Anything else (numbers,
ndarrays of constants, generators) belongs to the module alone and is not saved.
"""
import copy
import operator

import numpy as np

from numformer.quant.weight import QuantizedWeight
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

    def named_quantized(self):
        """Yield (name, QuantizedWeight), names as ``"blocks.0.attention.qkv"`` or ``"blocks.0.mlp.up.3"`` in a list."""
        for name, value in vars(self).items():
            for key, item in held(name, value):
                if type(item) is QuantizedWeight:
                    yield key, item
        for name, part in self._parts():
            for key, item in part.named_quantized():
                yield f"{name}.{key}", item

    def set_quantized(self, weights):
        """Put QuantizedWeights, by the names of :meth:`named_quantized`, in the place of what is there.

        Raises
        ------
        ValueError
            For a name where no weight is, another shape, or a list that is not whole; nothing is changed then.
        """
        places, new = dict(self._weights("")), {}       # name -> (module, attribute, shape)
        for name, weight in weights.items():
            whole, _, index = name.rpartition(".")
            if name in places and len(places[name][2]) == 2:
                new[name] = weight
            elif index.isdecimal() and whole in places and len(places[whole][2]) == 3:
                new.setdefault(whole, {})[int(index)] = weight
                name = whole
            else:
                raise ValueError(f"set_quantized: there is no weight {name}")
            if weight.shape != places[name][2][-2:]:
                raise ValueError(f"set_quantized: {name} must have shape {places[name][2][-2:]}, got {weight.shape}")
        for name, weight in new.items():
            if isinstance(weight, dict):
                count = places[name][2][0]
                if sorted(weight) != list(range(count)):
                    raise ValueError(f"set_quantized: {name} has {count} experts, got weights for {sorted(weight)}")
                new[name] = [weight[e] for e in range(count)]
        for name, weight in new.items():
            setattr(*places[name][:2], weight)

    def _weights(self, prefix):
        for name, value in vars(self).items():
            if _is_parameter(value) or type(value) is QuantizedWeight:
                yield prefix + name, (self, name, value.shape)
            elif isinstance(value, list) and value and type(value[0]) is QuantizedWeight:
                yield prefix + name, (self, name, (len(value), *value[0].shape))
        for name, part in self._parts():
            yield from part._weights(f"{prefix}{name}.")

    def modules(self):
        """Yield this module and every module in it."""
        yield self
        for _, part in self._parts():
            yield from part.modules()

    def _parts(self):
        for name, value in vars(self).items():
            for key, item in held(name, value):
                if isinstance(item, Module):
                    yield key, item

    def _walk(self, prefix):
        for name, value in vars(self).items():
            for key, item in held(name, value):
                if _is_parameter(item):
                    yield prefix + key, item
        for name, part in self._parts():
            yield from part._walk(f"{prefix}{name}.")

    def state_dict(self):
        """The parameters' values by name, and the arrays of quantized weights: the arrays themselves, no copies."""
        arrays = {name: parameter.data for name, parameter in self.named_parameters()}
        for name, weight in self.named_quantized():
            arrays |= {f"{name}.{part}": array for part, array in weight.arrays().items()}
        return arrays

    def load_state_dict(self, arrays):
        """Copy `arrays` (by name; Tensors too) into the parameters; nothing is changed unless all fit.

        Raises
        ------
        ValueError
            Names that are missing or unexpected, shapes that differ, and values that are no real numbers, all in one
            message.
        """
        if not hasattr(arrays, "items"):
            raise TypeError(f"load_state_dict: arrays must be a dict of arrays by name, got {type(arrays).__name__}")
        arrays = {name: x.data if type(x) is Tensor else x for name, x in arrays.items()}
        own, state = dict(self.named_parameters()), self.state_dict()
        wrong = [f"missing {name}" for name in state if name not in arrays]
        wrong += [f"unexpected {name}" for name in arrays if name not in state]
        wrong += [f"{name} must have shape {state[name].shape}, got {np.shape(arrays[name])}"
                  for name in state if name in arrays and np.shape(arrays[name]) != state[name].shape]
        dtypes = {name: np.asarray(arrays[name]).dtype for name in own if name in arrays}
        wrong += [f"{name} must be of real numbers, got {dtype}" for name, dtype in dtypes.items()
                  if not np.can_cast(dtype, np.float32, "same_kind")]
        if wrong:
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"load_state_dict: {'; '.join(wrong[:8])}{more}")
        self.set_quantized({name: QuantizedWeight.from_arrays({part: arrays[f"{name}.{part}"]
                                                               for part in weight.arrays()}, weight.spec)
                            for name, weight in self.named_quantized()})
        names = {id(parameter.data): name for name, parameter in own.items()}
        for name in own:
            if names.get(id(arrays[name]), name) != name:       # another parameter's, which may be written to first
                arrays[name] = arrays[name].copy()
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
        return _copied(self, lambda tensor: tensor.data).eval()

    def shared(self):
        """A module of the same parts and parameters: what is set in it is not set here, the parameters are the same."""
        return _copied(self, lambda tensor: tensor)

    def __repr__(self):
        count = sum(p.size for p in self.parameters())
        return f"{type(self).__name__}({count} parameters)"


def _is_parameter(value):
    return type(value) is Tensor and not value.is_made


def _copied(value, leaf):
    """`value` with the modules, lists and dicts in it copied, and ``leaf(tensor)`` for every Tensor."""
    if type(value) is Tensor:
        return leaf(value)
    if isinstance(value, Module):
        twin = copy.copy(value)
        for name, attribute in vars(value).items():
            if isinstance(attribute, (Tensor, Module, list, tuple, dict)):
                setattr(twin, name, _copied(attribute, leaf))
        return twin
    if isinstance(value, (list, dict)):
        twin = copy.copy(value)         # of its own class
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            twin[key] = _copied(item, leaf)
        return twin
    if isinstance(value, tuple):
        items = [_copied(item, leaf) for item in value]
        return value if all(map(operator.is_, items, value)) else getattr(value, "_make", type(value))(items)
    return value


def held(name, value):
    """(name, item) of what an attribute holds: itself, or what is in its lists, tuples and dicts."""
    if not isinstance(value, (list, tuple, dict)):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from held(f"{name}.{key}", item)
