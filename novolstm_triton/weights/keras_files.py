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
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from novolstm_triton.files import check_inflated, check_regular, read_entry, strict_json

R = TypeVar("R")

_DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)

_CONFIGURED = {"activation": "tanh", "recurrent_activation": "sigmoid", "merge_mode": "concat"}
"""How a layer in a file has to be configured, if the file says: this library computes nothing else."""

RESET_BEFORE = """the GRU that resets before the product is here RecurrentLayer(cells.CELLS["gru_reset_before"], …)"""
"""Where to find the function of a GRU that `GRU` does not compute."""

_REASONS = {"reset_after": f": {RESET_BEFORE}"}
"""What a message adds about a setting."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """The weights of a layer in a file."""

    name: str
    """The layer's name in Keras."""
    path: str
    """Path of its group in the file."""
    arrays: list[np.ndarray]


def read_layer(
    path: str, layer: str | None, split: Callable[[list[np.ndarray]], R], configured: Mapping[str, Any]
) -> R:
    """Return what `split` makes of the arrays of one layer of a file.

    Args:
        path: of the file.
        layer: name or path of the layer; None takes the only one whose arrays `split` accepts.
        split: takes a layer's arrays and raises ValueError or TypeError if they do not fit.
        configured: settings that the layer has to have, in addition to or in place of the usual ones.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: h5py is missing.
        ValueError: the file is damaged or not Keras's, or has no such layer, or several; or what `split` raises.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ModuleNotFoundError as error:
        raise ImportError(f"{path}: reading it needs h5py: pip install 'novolstm-triton[keras]'") from error
    check_regular(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected a .weights.h5 or .keras file, found none")
    try:
        stored, configuration = _contents(h5py, path)
    except _DAMAGE as error:
        raise ValueError(f"{path}: damaged, or not a .weights.h5 or .keras file: {error}") from error
    if stored is None:
        raise ValueError(f"{path}: a legacy HDF5 file; save the model in Keras 3 as .weights.h5 or .keras")
    chosen = _chosen(path, stored, layer, split)
    _check_configuration(configuration, chosen.name, path, _CONFIGURED | dict(configured))
    return split(chosen.arrays)


def _contents(h5py: Any, path: str) -> tuple[list[Stored] | None, Any]:
    """Return the layers of a file, None if Keras 3 would not write it so, and the model's configuration or None."""
    configuration, size = None, os.path.getsize(path)
    with contextlib.ExitStack() as stack:
        source: Any = path
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            weights = read_entry(archive, "model.weights.h5", size)
            source, size = io.BytesIO(weights), len(weights)
            configuration = strict_json(read_entry(archive, "config.json", size))
        file = stack.enter_context(h5py.File(source, "r"))
        if "layer_names" in file.attrs or "model_weights" in file:
            return None, None
        return list(_Tree(h5py, size).layers(file, "", "")), configuration


class _Tree:
    """Reads the tree of groups of a file of `size` bytes; refuses groups with two names and links to other files."""

    def __init__(self, h5py: Any, size: int) -> None:
        self._h5py, self._size, self._read = h5py, size, 0
        self._seen: set[int] = set()

    def layers(self, group: Any, key: str, path: str) -> Iterator[Stored]:
        """Yield every layer with weights in a group, outer ones first."""
        # A group under several names makes a walk endless, or nearly so.
        place = self._h5py.h5o.get_info(group.id).addr
        if place in self._seen:
            raise ValueError(f"{group.name} has another name, too")
        self._seen.add(place)
        members = self._members(group)
        parts = {k: part for k, part in members.items() if k != "vars" and hasattr(part, "items")}
        if {"forward_layer", "backward_layer"} <= parts.keys():
            taken, arrays = ["forward_layer", "backward_layer"], []
            for name in taken:
                inner = self._members(parts[name])
                arrays += self._cell_arrays(self._members(inner["cell"]) if "cell" in inner else inner)
        elif "cell" in parts:
            taken, arrays = ["cell"], self._cell_arrays(self._members(parts["cell"]))
        elif own := self._variables(members):
            taken, arrays = [], [*own, *self._arrays_of_parts(members)]
        else:
            taken, arrays = [], []
        if arrays:
            name = members["vars"].attrs.get("name", key) if "vars" in members else key
            yield Stored(str(name), path, arrays)
        for part_key, part in parts.items():
            # The optimizer's variables have the shapes of weights.
            if part_key not in taken and (path or part_key != "optimizer"):
                yield from self.layers(part, part_key, f"{path}/{part_key}".lstrip("/"))

    def _members(self, group: Any) -> dict[str, Any]:
        """Return a group's members by their names."""
        for key in group:
            if not isinstance(group.get(key, getlink=True), self._h5py.HardLink):
                raise ValueError(f"{group.name}/{key} is a link")
        return {key: group[key] for key in group}

    def _cell_arrays(self, members: dict[str, Any]) -> list[np.ndarray]:
        """Return a cell's variables, then those of its parts, such as a layer normalisation."""
        return [*self._variables(members), *self._arrays_of_parts(members)]

    def _arrays_of_parts(self, members: dict[str, Any]) -> list[np.ndarray]:
        parts = [part for key, part in members.items() if key != "vars" and hasattr(part, "items")]
        return [array for part in parts for array in self._variables(self._members(part))]

    def _variables(self, members: dict[str, Any]) -> list[np.ndarray]:
        own = members.get("vars")
        if own is None:
            return []
        arrays = self._members(own)
        return [self._array(arrays[key]) for key in sorted(arrays, key=int)]

    def _array(self, dataset: Any) -> np.ndarray:
        if not isinstance(dataset, self._h5py.Dataset):
            raise ValueError(f"{dataset.name} is not an array")
        if dataset.dtype.hasobject:
            # Text is never a weight, and may be of any size.
            return np.empty(0, object)
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{dataset.name} lies in another file")
        self._read += dataset.nbytes
        check_inflated(self._read, self._size, dataset.name)
        return np.asarray(dataset)


def _chosen(path: str, stored: list[Stored], layer: str | None, split: Callable[[list[np.ndarray]], Any]) -> Stored:
    """Return the layer that `layer` names."""
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


def _check_configuration(configuration: Any, name: str, path: str, expected: Mapping[str, Any]) -> None:
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
            for key, value in (*expected.items(), ("go_backwards", part is backward)):
                if key in settings and settings[key] != value:
                    reason = _REASONS.get(key, "")
                    raise ValueError(f"{path}: expected {name} with {key}={value!r}, got {settings[key]!r}{reason}")


def _walk(node: Any) -> Iterator[dict]:
    """Yield every dict in a tree of JSON."""
    rest = [node]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            yield node
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        rest += reversed([*children])
