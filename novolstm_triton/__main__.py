"""The command line: `novolstm`, or `python -m novolstm_triton`."""

import importlib.util
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from novolstm_triton import __version__

_EXTRAS = [name for name in ("typer", "tqdm", "matplotlib", "safetensors") if importlib.util.find_spec(name) is None]
if _EXTRAS:
    # Here and not in main(): the commands below are declared with typer.
    print(f"novolstm needs {', '.join(_EXTRAS)}: pip install 'novolstm-triton[train]'", file=sys.stderr)
    raise SystemExit(2)

import typer  # noqa: E402

from novolstm_triton.functional import BACKENDS  # noqa: E402
from novolstm_triton.reference import RECURRENT_GATES  # noqa: E402
from novolstm_triton.text import UsageError  # noqa: E402
from novolstm_triton.train import CELLS, DEVICES, DTYPES, TrainConfig, TrainingError, train  # noqa: E402

# Plain help: in rich markup, the [train] of a pip command would be a tag.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def novolstm(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """NovoLSTM: a fused recurrent layer for PyTorch."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _option(field: str, text: str, choices: Sequence[str] = (), metavar: str | None = None) -> Any:
    """Return the option of a field of `TrainConfig`; left out, it is None, to tell it from one given as the default."""
    if choices:
        metavar = "{" + ",".join(choices) + "}"
    return typer.Option(help=f"{text} [default: {getattr(TrainConfig, field)}]", metavar=metavar)


@app.command("train")
def train_command(
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...",
            help="Files and folders (taken recursively) to train on; the last 5 % is held out. "
            "[default: the sources of Python's standard library]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for metrics.jsonl, model.safetensors, loss.png and checkpoint.pt. "
            "[default: novolstm-run, or novolstm-run-2, … where that holds a run]",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Continue the run in DIR exactly where it stopped, with its settings. --steps may be raised; "
            "--text, --backend and --device may name the same thing anew.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that --out holds.")] = False,
    steps: Annotated[int | None, _option("steps", "Updates of the weights.")] = None,
    hidden: Annotated[int | None, _option("hidden", "Units of each recurrent layer and of the embedding.")] = None,
    layers: Annotated[int | None, _option("layers", "Recurrent layers.")] = None,
    batch: Annotated[int | None, _option("batch", "Rows per step, in each process.")] = None,
    seq: Annotated[
        int | None,
        _option("seq", "Bytes per row and step. The state is carried over from step to step, gradients are not."),
    ] = None,
    lr: Annotated[
        float | None, _option("lr", "Peak learning rate of AdamW: a short warm-up, then half a cosine.")
    ] = None,
    seed: Annotated[int | None, _option("seed", "Seed of the initial weights and of the sample.")] = None,
    dtype: Annotated[
        str | None,
        _option(
            "dtype",
            "auto: bf16 on a GPU that has it, else fp32. bf16 and fp16 are autocast: weights and updates stay fp32.",
            tuple(DTYPES),
        ),
    ] = None,
    device: Annotated[str | None, _option("device", "auto: the GPU if there is one.", DEVICES)] = None,
    backend: Annotated[
        str | None, _option("backend", "What computes NovoLSTM. auto: triton on a GPU, else torch.", BACKENDS)
    ] = None,
    cell: Annotated[str | None, _option("cell", "Recurrent layer; lstm is torch.nn.LSTM.", CELLS)] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Train both cells on the same batches, with the same settings, into one plot."),
    ] = False,
    gate_gain: Annotated[
        str | None,
        _option(
            "gate_gain",
            "Constant factor on the input gate: a number, or hidden for the number of units.",
            metavar="GAIN",
        ),
    ] = None,
    variant: Annotated[str | None, _option("variant", "Which NovoLSTM.", tuple(RECURRENT_GATES))] = None,
    max_bytes: Annotated[int | None, _option("max_bytes", "Read no more text than this.")] = None,
) -> int:
    """Train a byte-level language model and write its metrics, weights, loss curve and a sample.

    Without options: on the sources of Python's standard library, on the GPU if there is one, in about one minute on
    two CPU cores. Runs under `torchrun --nproc-per-node=N -m novolstm_triton train …`, too. Ctrl-C stops after the
    step at hand and saves; --resume continues.
    """
    values = dict(steps=steps, hidden=hidden, layers=layers, batch=batch, seq=seq, lr=lr, seed=seed, dtype=dtype)
    values |= dict(device=device, backend=backend, cell=cell, variant=variant, max_bytes=max_bytes)
    values |= dict(
        text=_absolute(text),
        compare=compare or None,
        gate_gain=_gate_gain(gate_gain),
    )
    given = {name: value for name, value in values.items() if value is not None}
    return train(given, out, resume, overwrite)


def _gate_gain(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _absolute(paths: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return paths that a run resumed from another folder finds, too."""
    return tuple(str(Path(path).expanduser().absolute()) for path in paths) if paths else None


def _repeat_text(arguments: Sequence[str]) -> list[str]:
    """Write `--text a b` as `--text a --text b`: an option of typer takes one value at a time."""
    expanded: list[str] = []
    values = None
    for argument in arguments:
        if argument.startswith("-"):
            values = 0 if argument == "--text" else None
        elif values is not None:
            values += 1
            if values > 1:
                expanded.append("--text")
        expanded.append(argument)
    return expanded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 with one line on stderr for a request that cannot be met."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = _repeat_text(sys.argv[1:] if arguments is None else arguments)
    try:
        return app(arguments, prog_name="novolstm", standalone_mode=False) or 0
    except UsageError as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        # The parser's own errors, known by this method: their base class differs between versions of typer.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _fail(message(), 2)


def _fail(message: str, code: int) -> int:
    # Under torchrun all processes come to the same end: one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"novolstm: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
