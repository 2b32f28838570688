"""Weights of Keras's layers as this library's, and back: names, orders, shapes. Their files: `keras_files.py`."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from novolstm_triton.cells import CELLS, novolstm_cell
from novolstm_triton.layers.recurrent import engine_weights, layer_weights
from novolstm_triton.weights import check_fixed
from novolstm_triton.weights.keras_files import RESET_BEFORE, read_layer

if TYPE_CHECKING:
    from novolstm_triton.layers.layer import RecurrentLayer
    from novolstm_triton.layers.novolstm import NovoLSTM

KERAS_EPS = 1e-3
"""Default ε of Keras's LayerNormalization."""

Arrays = dict[str, np.ndarray]
"""One direction's arrays by their names in Keras."""

_GATES = {"i": "i", "f": "f", "g": "c", "o": "o", "p": "i_prime"}
"""Keras's names of our gates."""

_NOTEBOOK = (
    "w_i",
    "u_i",
    "b_i",
    "w_i_prime",
    "b_i_prime",
    "w_f",
    "u_f",
    "b_f",
    "w_c",
    "u_c",
    "b_c",
    "w_o",
    "u_o",
    "b_o",
)
_NOVOLSTM = {"notebook": (*_NOTEBOOK, "gamma", "beta"), "formula": (*_NOTEBOOK, "u_i_prime", "gamma", "beta")}
"""Names of NovoLSTM's weights, in the order in which the Keras layer makes them."""

_NAMES = ("kernel", "recurrent_kernel", "bias")
"""Names of the weights of Keras's own layers, of which the last may be missing."""


class _Layer(NamedTuple):
    """One of Keras's own recurrent layers."""

    name: str
    order: tuple[int, ...]
    """Which of our blocks each of Keras's is; and the reverse, for none moves but by exchange with another."""
    two_biases: bool = False
    """Whether there is a bias of the inputs and one of the recurrence, [2, G·H]; elsewhere it is their sum [G·H]."""


_LAYERS = {
    "LSTM": _Layer("LSTM", (0, 1, 2, 3)),
    # z|r|h there, r|z|n here.
    "GRU": _Layer("GRU", (1, 0, 2), two_biases=True),
    "RNN": _Layer("SimpleRNN", (0,)),
}
"""Keras's layers by the names of PyTorch's, our classes' twins."""

_FIXED = ("input_size", "hidden_size", "num_layers", "bias", "dropout", "bidirectional", "proj_size", "layer_norm")

L = TypeVar("L", bound="RecurrentLayer")


def novolstm_from_keras(
    cls: "type[NovoLSTM]", weights: Any, variant: str, layer: str | None, options: Mapping[str, Any]
) -> "NovoLSTM":
    """Implement `NovoLSTM.from_keras`."""
    cell = CELLS[novolstm_cell(variant, "input_gate")]
    names = _NOVOLSTM[variant]

    def split(given: Any) -> list[Arrays]:
        return _by_direction(given, (names,), _novolstm_shapes, f"a NovoLSTM of variant {variant!r}")

    directions = _directions(weights, layer, split, {})
    parameters = []
    for arrays in directions:
        kinds = {"w": cell.gates, "u": cell.gates[: cell.recurrent], "b": cell.gates}
        w, u, b = (
            np.concatenate([arrays[f"{kind}_{_GATES[gate]}"].T for gate in gates]) for kind, gates in kinds.items()
        )
        norms = {"ln_weight": arrays["gamma"], "ln_bias": arrays["beta"]}
        parameters.append({"weight_ih": w, "weight_hh": u, "bias_ih": b, **norms})
    return _built(cls, parameters, {"variant": variant, "ln_eps": KERAS_EPS} | dict(options))


def from_keras(cls: type[L], weights: Any, layer: str | None, options: Mapping[str, Any]) -> L:
    """Implement `from_keras` of the layers that Keras has, too."""
    theirs, configured = _layer_like(cls), {}
    if theirs.name == "SimpleRNN":
        configured = {"activation": options.get("nonlinearity", "tanh")}
    elif theirs.name == "GRU":
        configured = {"reset_after": True}

    def split(given: Any) -> list[Arrays]:
        def shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
            return _shapes(arrays, theirs)

        return _by_direction(given, (_NAMES, _NAMES[:2]), shapes, f"a keras.layers.{theirs.name}")

    parameters = []
    for arrays in _directions(weights, layer, split, configured):
        own = {"weight_ih": arrays["kernel"].T, "weight_hh": arrays["recurrent_kernel"].T}
        if "bias" in arrays:
            biases = arrays["bias"] if theirs.two_biases else [arrays["bias"]]
            own |= dict(zip(("bias_ih", "bias_hh"), biases, strict=False))
        parameters.append({name: _reordered(array, theirs) for name, array in own.items()})
    return _built(cls, parameters, options)


def novolstm_to_keras(layer: "NovoLSTM") -> list[np.ndarray]:
    """Implement `NovoLSTM.to_keras`."""
    _check_counterpart(layer)
    if layer.layer_norm != "input_gate":
        raise ValueError(f"layer_norm: expected 'input_gate' for a Keras layer, got {layer.layer_norm!r}")
    if layer.ln_eps != KERAS_EPS:
        warnings.warn(
            f"to_keras: ε is not a weight: the Keras layer needs LayerNormalization(epsilon={layer.ln_eps})",
            stacklevel=3,
        )
    cell = CELLS[layer.variant]
    gain = layer.hidden_size if layer.gate_gain == "hidden" else float(layer.gate_gain)
    result = []
    for own in _own_weights(layer):
        own |= engine_weights(layer._cell, own)
        if own["bias"] is None:
            own["bias"] = own["weight_ih"].new_zeros(own["weight_ih"].shape[0])
        arrays = {}
        for kind, blocks in (("w", own["weight_ih"]), ("u", own["weight_hh"]), ("b", own["bias"])):
            # Where there are fewer blocks than gates, p has no block.
            for gate, block in zip(cell.gates, blocks.split(layer.hidden_size), strict=False):
                arrays[f"{kind}_{_GATES[gate]}"] = _array(block)
        # The gate is gain · (γ · … + β), times a softmax in one variant.
        arrays |= {"gamma": _array(own["ln_weight"] * gain), "beta": _array(own["ln_bias"] * gain)}
        result += [arrays[name] for name in _NOVOLSTM[layer.variant]]
    return result


def to_keras(layer: "RecurrentLayer") -> list[np.ndarray]:
    """Implement `to_keras` of the layers that Keras has, too."""
    theirs = _layer_like(type(layer))
    _check_counterpart(layer)
    result = []
    for own in _own_weights(layer):
        given = [own["weight_ih"], own["weight_hh"]]
        if layer.bias:
            biases = own["bias_ih"], own["bias_hh"]
            # Side by side, for a matrix is transposed.
            given.append(torch.stack(biases, 1) if theirs.two_biases else biases[0] + biases[1])
        blocks = len(theirs.order)
        result += [_array(torch.cat([w.chunk(blocks)[k] for k in theirs.order])) for w in given]
    return result


def _layer_like(cls: type[Any]) -> _Layer:
    """Return Keras's layer that computes what one of our classes, or a subclass of it, computes."""
    return _LAYERS[cls._twin.__name__]


def _reordered(array: np.ndarray, theirs: _Layer) -> np.ndarray:
    """Return an array whose rows are in Keras's order of blocks in ours, or the reverse."""
    blocks = np.split(array, len(theirs.order))
    return np.concatenate([blocks[k] for k in theirs.order])


def _directions(
    weights: Any, layer: str | None, split: Callable[[Any], list[Arrays]], configured: Mapping[str, Any]
) -> list[Arrays]:
    """Return each direction's arrays from weights in any of the accepted forms; `configured` as for `read_layer`."""
    if isinstance(weights, (str, os.PathLike)):
        return read_layer(os.fspath(weights), layer, split, configured)
    if layer is not None:
        raise ValueError(f"layer: expected None beside arrays, got {layer!r}")
    return split(weights)


def _by_direction(
    given: Any,
    orders: Sequence[tuple[str, ...]],
    shapes: Callable[[Arrays], dict[str, tuple[int, ...]]],
    owner: str,
) -> list[Arrays]:
    """Check and name the arrays of one direction or both.

    Args:
        given: a list in one of the orders, or twice as long, or a dict.
        orders: the names that one direction's arrays may have.
        shapes: returns the shapes that they should have, given the arrays.
        owner: what has such weights, for messages.
    """
    if isinstance(given, Mapping):
        orders = [names for names in orders if set(names) == set(given)] or [orders[0]]
        missing, extra = sorted(set(orders[0]) - set(given)), sorted(set(given) - set(orders[0]), key=str)
        if missing or extra:
            raise ValueError(f"weights: expected the names of {owner}, got one without {missing} and with {extra}")
        given = [given[name] for name in orders[0]]
    if isinstance(given, (np.ndarray, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"weights: expected a list or dict of arrays or a path, got {type(given).__name__}")
    for names in orders:
        if len(given) in (len(names), 2 * len(names)):
            break
    else:
        counts = " or ".join(str(n) for names in orders for n in (len(names), 2 * len(names)))
        raise ValueError(f"weights: expected {counts} arrays, the weights of {owner}, got {len(given)}")
    arrays = [_checked(array, name) for array, name in zip(given, names * 2, strict=False)]
    directions = [dict(zip(names, arrays[k : k + len(names)], strict=True)) for k in range(0, len(arrays), len(names))]
    for direction in directions:
        expected = shapes(directions[0])
        for name, array in direction.items():
            if array.shape != expected[name]:
                raise ValueError(f"weights: expected {name} of shape {expected[name]}, got {array.shape}")
    return directions


def _checked(array: Any, name: str) -> np.ndarray:
    """Return an array with a dtype that PyTorch has, in the machine's byte order."""
    try:
        array = np.asarray(array)
    except ValueError as error:
        raise ValueError(f"weights: expected {name} to be an array: {error}") from error
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"weights: expected {name} in float16, float32 or float64, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _novolstm_shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    features, hidden = _matrix(arrays["w_i"], "w_i")
    matrices = {"w": (features, hidden), "u": (hidden, hidden)}
    return {name: matrices.get(name.partition("_")[0], (hidden,)) for name in arrays}


def _shapes(arrays: Arrays, theirs: _Layer) -> dict[str, tuple[int, ...]]:
    features, rows = _matrix(arrays["kernel"], "kernel")
    blocks = len(theirs.order)
    if rows % blocks:
        raise ValueError(f"weights: expected kernel of shape (I, {blocks}H), got {arrays['kernel'].shape}")
    if theirs.two_biases and "bias" in arrays and arrays["bias"].shape == (rows,):
        raise ValueError(
            f"weights: expected bias of shape {(2, rows)}, got {(rows,)}, that of a {theirs.name} with "
            f"reset_after=False: {RESET_BEFORE}"
        )
    bias = (2, rows) if theirs.two_biases else (rows,)
    return {"kernel": (features, rows), "recurrent_kernel": (rows // blocks, rows), "bias": bias}


def _matrix(array: np.ndarray, name: str) -> tuple[int, ...]:
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"weights: expected {name} to be a matrix, got shape {array.shape}")
    return array.shape


def _built(cls: type[L], directions: Sequence[Arrays], options: Mapping[str, Any]) -> L:
    """Return a layer with these parameters, an entry for each direction."""
    check_fixed(options, _FIXED, "the weights")
    first = directions[0]
    dtype = np.result_type(*(array for arrays in directions for array in arrays.values()))
    sizes = {"bias": "bias_ih" in first, "bidirectional": len(directions) == 2}
    defaults = {"batch_first": True, "dtype": torch.from_numpy(np.empty(0, dtype)).dtype}
    features, hidden = first["weight_ih"].shape[1], first["weight_hh"].shape[1]
    layer = cls(features, hidden, **sizes, **(defaults | dict(options)))
    with torch.no_grad():
        for arrays, suffix in zip(directions, ("_l0", "_l0_reverse"), strict=False):
            for name, array in arrays.items():
                # A copy, which PyTorch may write to.
                layer.get_parameter(name + suffix).copy_(torch.from_numpy(np.array(array, order="C")))
            if layer.bias and "bias_hh" not in arrays:
                layer.get_parameter("bias_hh" + suffix).zero_()
    return layer


def _check_counterpart(layer: "RecurrentLayer") -> None:
    """Raise ValueError where no Keras layer computes the same."""
    for name, expected in (("num_layers", 1), ("proj_size", 0), ("zoneout_h", 0), ("zoneout_c", 0)):
        if (value := getattr(layer, name)) != expected:
            raise ValueError(f"{name}: expected {expected} for a Keras layer, got {value}")


def _own_weights(layer: "RecurrentLayer") -> list[dict[str, Any]]:
    suffixes = ("_l0", "_l0_reverse") if layer.bidirectional else ("_l0",)
    return [layer_weights(layer, suffix) for suffix in suffixes]


def _array(tensor: Tensor) -> np.ndarray:
    """Return a copy, with a matrix transposed as Keras has it."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return np.array(tensor.numpy().T, order="C")
