"""The language model over bytes that `novolstm train` trains: network, file, sampling."""

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch
from novolstm_triton.checks import check_finite, check_int
from novolstm_triton.files import check_path, check_regular, strict_json
from novolstm_triton.layers.novolstm import NovoLSTM
from novolstm_triton.layers.recurrent import check_positive

CELLS = ("novolstm", "lstm")
"""Recurrent layers that a model may have."""


class ByteModel(nn.Module):
    """A language model over bytes: embedding, recurrent layers, linear.

    Args:
        cell: "novolstm", or "lstm" for `torch.nn.LSTM`.
        hidden: units H of each recurrent layer and of the embedding.
        layers: number L of recurrent layers.
        options: keyword arguments of `NovoLSTM`.

    Raises:
        TypeError: an argument of the wrong type, or an option for `torch.nn.LSTM`.
        ValueError: an argument out of range.
    """

    def __init__(self, cell: str, hidden: int, layers: int, **options: Any) -> None:
        super().__init__()
        _check_arguments(cell, hidden, layers, options)
        # The recurrent layer comes last, so that for one seed the others start the same with either cell.
        self.embedding = nn.Embedding(256, hidden)
        self.head = nn.Linear(hidden, 256)
        self.rnn = _recurrent(cell, hidden, layers, options)
        self.arguments = {"cell": cell, "hidden": hidden, "layers": layers, **options}

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return logits of the next bytes [T, B, 256] and the state (h, c), [L, B, H] each, after tokens [T, B]."""
        hidden, (h, c) = self.rnn(self.embedding(tokens), state)
        return self.head(hidden), (h, c)


def _check_arguments(cell: str, hidden: int, layers: int, options: Mapping[str, Any]) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {list(CELLS)}, got {cell!r}")
    if cell == "lstm" and options:
        raise TypeError(f"options: expected none for nn.LSTM, got {sorted(options)}")
    check_positive(hidden=hidden, layers=layers)


def _recurrent(cell: str, hidden: int, layers: int, options: Mapping[str, Any]) -> NovoLSTM | nn.LSTM:
    return NovoLSTM(hidden, hidden, layers, **options) if cell == "novolstm" else pytorch.LSTM(hidden, hidden, layers)


def save_model(model: ByteModel, path: str | os.PathLike[str]) -> None:
    """Write weights, and as metadata what `load_model` needs, to a safetensors file.

    Raises:
        TypeError: `model` is not a ByteModel, or `path` not a path.
    """
    from safetensors.torch import save

    check_path(path)
    if not isinstance(model, ByteModel):
        raise TypeError(f"model: expected a ByteModel, got {type(model).__name__}")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    Path(path).write_bytes(save(weights, metadata={"format": "pt", "model": json.dumps(model.arguments)}))


def load_model(path: str | os.PathLike[str]) -> ByteModel:
    """Rebuild a trained model, fp32 on the CPU, from the `model.safetensors` that `save_model` wrote.

    Raises:
        TypeError: `path` is not a path.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds no such model.
    """
    from safetensors import SafetensorError, safe_open

    check_path(path)
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            model = _described(file)
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(path)}: damaged, or not a model of novolstm train: {reason[:300]}") from error
    return model.eval()


def _described(file: Any) -> ByteModel:
    """Return the model that a safetensors file describes, with weights yet to be loaded.

    Raises:
        TypeError, ValueError, RuntimeError: the file describes no model, or one that its tensors do not fit.
    """
    metadata, shapes = file.metadata(), {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if "model" not in (metadata or {}):
        raise ValueError("it has no description of a model")
    arguments = strict_json(metadata["model"])
    if not isinstance(arguments, dict) or not {"cell", "hidden", "layers"} <= arguments.keys():
        raise ValueError(f"expected a description with cell, hidden and layers, got {reprlib.repr(arguments)}")
    # Before anything is allocated: the file has to hold the tensors that it describes.
    check_int(arguments["layers"], "layers", most=len(shapes))
    options = {name: value for name, value in arguments.items() if name not in ("cell", "hidden", "layers")}
    cell, hidden, layers = (arguments[name] for name in ("cell", "hidden", "layers"))
    _check_arguments(cell, hidden, layers, options)
    expected = {"embedding.weight": [256, hidden], "head.weight": [256, hidden], "head.bias": [256]}
    with torch.device("meta"):
        rnn = _recurrent(cell, hidden, layers, options)
    expected |= {f"rnn.{name}": list(value.shape) for name, value in rnn.state_dict().items()}
    for name in expected.keys() | shapes.keys():
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"{name}: expected shape {expected.get(name)}, got {shapes.get(name)}")
    return ByteModel(**arguments)


@torch.no_grad()
def sample(model: ByteModel, prompt: Sequence[int], length: int, temperature: float, seed: int) -> bytes:
    """Return `length` bytes drawn one by one from a model, after a prompt of at least one byte.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the prompt is empty or has something other than bytes, or a number is out of range.
    """
    if len(prompt) == 0:
        raise ValueError("prompt: expected at least one byte, got none")
    for byte in prompt:
        check_int(byte, "prompt", least=0, most=255)
    check_int(length, "length", least=0)
    check_finite(temperature, "temperature", "a positive finite number", above=0)
    prompt = list(prompt)
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens, state, drawn = torch.tensor(prompt, device=device).unsqueeze(1), None, []
    for _ in range(length):
        logits, state = model(tokens, state)
        odds = torch.softmax(logits[-1, 0].float().cpu() / temperature, dim=0)
        drawn.append(int(torch.multinomial(odds, 1, generator=generator)))
        tokens = torch.tensor([[drawn[-1]]], device=device)
    return bytes(drawn)


def printable(text: bytes) -> str:
    """Decode bytes for a terminal: whatever is not text becomes U+FFFD, escape sequences included."""
    decoded = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)
