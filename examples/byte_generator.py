"""Continue a prompt byte by byte, with a model whose recurrent layer takes single steps and hands its state on.

    pip install 'novolstm-triton[examples]'
    python examples/byte_generator.py "def main("
    echo "import" | python examples/byte_generator.py --length 200 --temperature 0.5
    python examples/byte_generator.py --help

The first call trains the model on the sources of Python's standard library, half a minute on one CPU core, and keeps it
in a folder; later calls read it. A folder that `novolstm train` wrote will do, too. A byte costs the same however much
text came before it, because only the state is kept of that text.
"""

import codecs
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from novolstm_triton import LSTM
from novolstm_triton.app.bytemodel import ByteModel, load_model, printable
from novolstm_triton.app.text import UsageError
from novolstm_triton.app.train import MODEL, train


class Stream:
    """A text that grows at its end, and what a model makes of it so far.

    Args:
        model: a trained model. An nn.LSTM in it is replaced by its counterpart here, which can take single steps.
        seed: of the bytes that are drawn.
    """

    def __init__(self, model: ByteModel, seed: int) -> None:
        self.state: tuple[Tensor, Tensor] | None = None
        self.logits = torch.zeros(256)
        self._model = model
        self._rnn = LSTM.from_torch(model.rnn) if isinstance(model.rnn, nn.LSTM) else model.rnn
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def read(self, text: Iterable[int]) -> None:
        """Append bytes to the text, one by one."""
        for byte in text:
            y, self.state = self._rnn.step(self._model.embedding(torch.tensor(byte)), self.state)
            self.logits = self._model.head(y)

    def write(self, length: int, temperature: float) -> Iterator[int]:
        """Draw bytes, append each to the text and yield it."""
        for _ in range(length):
            odds = torch.softmax(self.logits / temperature, dim=0)
            byte = int(torch.multinomial(odds, 1, generator=self._generator))
            self.read([byte])
            yield byte


def model_in(folder: Path, steps: int, hidden: int, text: list[Path]) -> ByteModel:
    """Return the model in a folder, trained now if there is none.

    Raises:
        typer.Exit: the training was interrupted.
        UsageError: it cannot start.
    """
    if not (folder / MODEL).exists():
        settings = {"steps": steps, "hidden": hidden, "text": tuple(map(str, text))}
        # The messages of the training are not part of the text.
        with contextlib.redirect_stdout(sys.stderr):
            code = train(settings, out=folder)
        if code:
            raise typer.Exit(code)
    return load_model(folder / MODEL)


def main(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; read from standard input if left out.")
    ] = None,
    length: Annotated[int, typer.Option(min=0, help="Bytes to write.")] = 400,
    temperature: Annotated[float, typer.Option(min=0.01, help="Below 1: likelier bytes, above: wilder ones.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of what is written.")] = 0,
    folder: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("novolstm-run-bytes"),
    steps: Annotated[int, typer.Option(min=1, help="Updates of a new model's weights.")] = 300,
    hidden: Annotated[int, typer.Option(min=1, help="Units of a new model.")] = 128,
    text: Annotated[
        list[Path] | None, typer.Option(help="Files and folders that a new model is trained on; may be repeated.")
    ] = None,
) -> None:
    """Write a prompt and a continuation of it."""
    try:
        model = model_in(folder, steps, hidden, text or [])
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    stream = Stream(model, seed)
    given = sys.stdin.buffer.read() if prompt is None else prompt.encode()
    # Before its first byte a model expects nothing in particular.
    stream.read(given or b"\n")
    print(printable(given), end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for byte in stream.write(length, temperature):
        print(printable(decoder.decode(bytes([byte])).encode()), end="", flush=True)
    print()


if __name__ == "__main__":
    typer.run(main)
