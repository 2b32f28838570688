"""Reads the weights of one layer from a file that Keras 3 wrote: `.weights.h5` or `.keras`.

Both hold a tree of HDF5 groups. The variables of a layer are the datasets 0, 1, … of its group `vars`, whose attribute
`name` is the layer's name; those of its parts are in groups beside `vars`: `cell` of a recurrent layer,
`forward_layer` and `backward_layer` of a Bidirectional. A `.keras` file is a zip archive of such a file and of the
model's configuration.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

R = TypeVar("R")

_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile)

_CONFIGURED = {"activation": "tanh", "recurrent_activation": "sigmoid", "merge_mode": "concat"}
"""What the layer in the file has to be configured with, if it says: this library has nothing else."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """The weights of a layer in a file."""

    name: str
    """The layer's in Keras."""
    path: str
    """Of its group in the file."""
    arrays: list[np.ndarray]


def read_layer(path: str, layer: str | None, split: Callable[[list[np.ndarray]], R]) -> R:
    """Return what `split` makes of the arrays of one layer of a file.

    Args:
        path: of the file.
        layer: name or path of the layer; None takes the only one whose arrays `split` accepts.
        split: takes a layer's arrays and raises ValueError or TypeError if they do not fit.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: h5py is missing.
        ValueError: the file is damaged or not Keras's, or has no such layer, or several; or what `split` raises.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ModuleNotFoundError as error:
        raise ImportError(f"{path}: reading it needs h5py: pip install 'novolstm-triton[keras]'") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected a .weights.h5 or .keras file, found none")
    try:
        stored, configuration = _contents(h5py, path)
    except _DAMAGE as error:
        raise ValueError(f"{path}: damaged, or no .weights.h5 or .keras file: {error}") from error
    if stored is None:
        raise ValueError(f"{path}: a legacy HDF5 file; save the model in Keras 3 as .weights.h5 or .keras")
    chosen = _chosen(path, stored, layer, split)
    _check_configuration(configuration, chosen.name, path)
    return split(chosen.arrays)


def _contents(h5py: Any, path: str) -> tuple[list[Stored] | None, Any]:
    """Return the layers of a file, None if Keras 3 would not write it so, and the model's configuration or None."""
    configuration = None
    with contextlib.ExitStack() as stack:
        source: Any = path
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            source = io.BytesIO(archive.read("model.weights.h5"))
            configuration = json.loads(archive.read("config.json"))
        file = stack.enter_context(h5py.File(source, "r"))
        if "layer_names" in file.attrs or "model_weights" in file:
            return None, None
        return list(_layers(file, "", "")), configuration


def _layers(group: Any, key: str, path: str) -> Iterator[Stored]:
    """Yield every layer with weights in a group, outer ones first."""
    parts = {k: part for k, part in group.items() if k != "vars" and hasattr(part, "items")}
    if {"forward_layer", "backward_layer"} <= parts.keys():
        taken = ["forward_layer", "backward_layer"]
        arrays = [array for part in taken for array in _cell_arrays(parts[part].get("cell", parts[part]))]
    elif "cell" in parts:
        taken, arrays = ["cell"], _cell_arrays(parts["cell"])
    else:
        taken, arrays = [], _cell_arrays(group) if _variables(group) else []
    if arrays:
        name = group["vars"].attrs.get("name", key) if "vars" in group else key
        yield Stored(str(name), path, arrays)
    for part_key, part in parts.items():
        # The optimizer's variables have the shapes of weights.
        if part_key not in taken and (path or part_key != "optimizer"):
            yield from _layers(part, part_key, f"{path}/{part_key}".lstrip("/"))


def _cell_arrays(group: Any) -> list[np.ndarray]:
    """Return a cell's variables, then those of its parts, such as a layer normalisation."""
    parts = [_variables(part) for key, part in group.items() if key != "vars" and hasattr(part, "items")]
    return [*_variables(group), *(array for part in parts for array in part)]


def _variables(group: Any) -> list[np.ndarray]:
    own = group.get("vars")
    return [] if own is None else [np.asarray(own[key]) for key in sorted(own, key=int)]


def _chosen(path: str, stored: list[Stored], layer: str | None, split: Callable[[list[np.ndarray]], Any]) -> Stored:
    """Return the layer that is meant."""
    if layer is not None:
        found = [s for s in stored if layer in (s.name, s.path)]
        if not found:
            known = ", ".join(f"{s.name} ({s.path})" for s in stored) or "none"
            raise ValueError(f"layer: expected one of the layers of {path}: {known}; got {layer!r}")
        if len(found) > 1:
            raise ValueError(f"layer: expected a path, because {[s.path for s in found]} are all named {layer!r}")
        return found[0]
    found, errors = [], []
    for s in stored:
        try:
            split(s.arrays)
            found.append(s)
        except (ValueError, TypeError) as error:
            errors.append(f"{s.name} ({s.path}): {error}")
    if len(found) > 1:
        known = ", ".join(f"{s.name} ({s.path})" for s in found)
        raise ValueError(f"layer: expected one of the layers of {path} that fit: {known}; got None")
    if not found:
        raise ValueError(f"{path}: expected a layer that fits, got {'; '.join(errors) or 'a file without weights'}")
    return found[0]


def _check_configuration(configuration: Any, name: str, path: str) -> None:
    """Raise ValueError if the model's configuration says that the layer computes something else."""
    for layer in _walk(configuration):
        own = layer.get("config")
        # A model may have the name of a layer in it.
        if not isinstance(own, dict) or own.get("name") != name or "layers" in own:
            continue
        backward = own.get("backward_layer")
        for part in _walk(layer):
            settings = part.get("config")
            if not isinstance(settings, dict):
                continue
            expected = _CONFIGURED | {"go_backwards": part is backward}
            for key, value in expected.items():
                if key in settings and settings[key] != value:
                    raise ValueError(f"{path}: expected {name} with {key}={value!r}, got {settings[key]!r}")


def _walk(node: Any) -> Iterator[dict]:
    """Yield every dict in a tree of JSON."""
    if isinstance(node, dict):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _walk(child)
