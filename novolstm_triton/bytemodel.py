"""The language model over bytes that `novolstm train` trains: network, file, sampling."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from novolstm_triton.module import NovoLSTM


class ByteModel(nn.Module):
    """A language model over bytes: embedding, recurrent layers, linear.

    Args:
        cell: "novolstm", or "lstm" for `torch.nn.LSTM`.
        hidden: units H of each recurrent layer and of the embedding.
        layers: number L of recurrent layers.
        options: keyword arguments of `NovoLSTM`.
    """

    def __init__(self, cell: str, hidden: int, layers: int, **options: Any) -> None:
        super().__init__()
        # The recurrent layer comes last: for one seed, the others start the same whatever the cell.
        self.embedding = nn.Embedding(256, hidden)
        self.head = nn.Linear(hidden, 256)
        self.rnn = (
            NovoLSTM(hidden, hidden, layers, **options) if cell == "novolstm" else nn.LSTM(hidden, hidden, layers)
        )
        self.arguments = {"cell": cell, "hidden": hidden, "layers": layers, **options}

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return logits of the next bytes [T, B, 256] and the state (h, c), [L, B, H] each, after tokens [T, B]."""
        hidden, (h, c) = self.rnn(self.embedding(tokens), state)
        return self.head(hidden), (h, c)


def save_model(model: ByteModel, path: Path) -> None:
    """Write weights, and as metadata what `load_model` needs, to a safetensors file."""
    from safetensors.torch import save

    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(weights, metadata={"format": "pt", "model": json.dumps(model.arguments)}))


def load_model(path: str | os.PathLike[str]) -> ByteModel:
    """Rebuild a trained model, fp32 on the CPU, from the `model.safetensors` that `save_model` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        model = ByteModel(**json.loads(file.metadata()["model"]))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return model.eval()


@torch.no_grad()
def sample(model: ByteModel, prompt: list[int], length: int, temperature: float, seed: int) -> bytes:
    """Return `length` bytes drawn one by one from a model, after a prompt of at least one byte."""
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
    """Decode bytes for a terminal: what is no text becomes U+FFFD, escape sequences included."""
    decoded = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)
