"""Models as folders in the layout of Hugging Face: config.json and model.safetensors."""
import dataclasses
import hashlib
import importlib
import json
from pathlib import Path

import numpy as np

from numformer.files import json_text, replace_file
from numformer.quant.weight import QuantizedWeight, QuantSpec

__all__ = ["Pretrained", "load", "need_safetensors", "read_safetensors", "write_safetensors"]

_models = {}        # model_type -> class


def need_safetensors():
    """The library that files are read and written with. ImportError, naming the extra, where it is missing."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError("reading and writing models needs the safetensors package: "
                          "pip install 'numformer[models]'") from None
    return safetensors


_KINDS = {"F": "float", "I": "int", "U": "uint", "C": "complex"}


def read_safetensors(path):
    """The arrays of a file by name. ValueError, in one line, for a file that is broken or holds what NumPy lacks."""
    library = need_safetensors()
    try:
        parts = library.deserialize(Path(path).read_bytes())
    except library.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return {name: np.frombuffer(part["data"], _dtype(part["dtype"], f"{path}: {name}")).reshape(part["shape"])
            for name, part in parts}


def _dtype(name, array):
    """The dtype that the format calls `name`."""
    try:
        if name == "BF16":
            return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return np.dtype("bool" if name == "BOOL" else _KINDS[name[0]] + name[1:])
    except ImportError:
        raise ImportError(f"{array} is bfloat16, which NumPy knows by the package ml_dtypes: install it") from None
    except (KeyError, TypeError):
        raise ValueError(f"{array} is of a dtype that NumPy lacks, {name}; convert it to F32 or BF16") from None


def write_safetensors(path, arrays, config=None):
    """Write the arrays by name, aside first; the text of a config with them."""
    metadata = {"format": "np"} if config is None else {"config": config}      # two would come in any order
    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    replace_file(path, need_safetensors().numpy.save(arrays, metadata=metadata))


def _seal(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config_in(path):
    """The text of the config that a file of weights was saved with, or None."""
    library = need_safetensors()
    try:
        with library.safe_open(path, "np") as file:
            return (file.metadata() or {}).get("config")
    except (library.SafetensorError, OSError):       # reading it all will tell
        return None


def _read_config(folder):
    """What config.json says; or the config in the weights, where a save was cut short between the two files.

    config.json may have been edited since it was saved: that its "saved_as" is that of the weights is enough.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        what = "is not a folder" if not Path(folder).is_dir() else "has no config.json: not a model's folder"
        raise FileNotFoundError(f"{folder} {what}") from None
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} names no model_type")
    seal, text = config.pop("saved_as", None), _config_in(Path(folder) / "model.safetensors")
    return json.loads(text) if seal and text and seal != _seal(text) else config


def load(folder):
    """Open a model's folder, whatever model it is.

    Parameters
    ----------
    folder : str or Path
        With config.json and model.safetensors, as ``save_pretrained`` writes it.

    Returns
    -------
    Module
        Of the class that model_type in config.json names, in evaluation mode.

    Raises
    ------
    ImportError
        If the safetensors package is missing.
    FileNotFoundError
        If the folder, config.json or model.safetensors is missing.
    ValueError
        If one of them is broken, does not fit the other, or the model is of a kind we do not know.
    """
    kind = _read_config(folder)["model_type"]
    if kind not in _models:
        raise ValueError(f"{folder}: no model of type {kind!r}; known are {', '.join(sorted(_models))}")
    return _models[kind].from_pretrained(folder)


def _quantized(config, arrays):
    """The QuantizedWeights that a quantization_config names."""
    try:
        if config["quant_method"] != "numformer":
            raise ValueError(f"quant_method {config['quant_method']!r} is not known; known is 'numformer'")
        specs = {name: QuantSpec(**group["spec"]) for group in config["groups"] for name in group["weights"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"quantization_config is broken: {error}") from None
    parts = ("data", "scales", "zeros", "shape")
    weights = {}
    for name, spec in specs.items():
        own = {part: arrays[f"{name}.{part}"] for part in parts if f"{name}.{part}" in arrays}
        weights[name] = QuantizedWeight.from_arrays(own, spec)
    return weights


class Pretrained:
    """Saving and loading for a Module with ``config``, ``config_class``, ``model_type`` and ``config_dict()``."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _models[cls.model_type] = cls

    def save_pretrained(self, folder):
        """Write model.safetensors and config.json: whoever loads the folder gets what was there, or all that is saved.

        Each file is there whole or not at all, and the weights bring a copy of the config: once they are there the
        model is saved, though a kill may leave another config.json. Quantized weights are saved as their integers,
        scales and zeros, and "quantization_config" names them.
        """
        folder = Path(folder)
        config = {"model_type": self.model_type, **self.config_dict()}
        groups = {}
        for name, weight in self.named_quantized():
            groups.setdefault(weight.spec, []).append(name)
        if groups:
            config["quantization_config"] = {"quant_method": "numformer", "groups": [
                {"spec": dataclasses.asdict(spec), "weights": names} for spec, names in groups.items()]}
        text = json_text(config)
        write_safetensors(folder / "model.safetensors", self.state_dict(), config=text)
        replace_file(folder / "config.json", json_text({**config, "saved_as": _seal(text)}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder):
        """Open what :meth:`save_pretrained` wrote, in evaluation mode. Errors as :func:`load`."""
        options = _read_config(folder)
        kind = options.pop("model_type")
        quantization = options.pop("quantization_config", None)
        if kind != cls.model_type:
            raise ValueError(f"{folder} holds a {kind!r}, not a {cls.model_type!r}")
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors")
        try:
            model = cls(cls.config_class(**options), rng=np.random.default_rng(0))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}/config.json does not describe a {cls.__name__}: {error}") from None
        arrays = read_safetensors(path)
        try:
            if quantization is not None:
                model.set_quantized(_quantized(quantization, arrays))
            model.load_state_dict(arrays)
        except ValueError as error:
            raise ValueError(f"{path} does not fit config.json: {error}") from None
        return model.eval()
