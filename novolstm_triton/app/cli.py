"""The command line: `novolstm`, or `python -m novolstm_triton`."""

import importlib.util
import io
import math
import os
import reprlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from novolstm_triton import __version__

_EXTRAS = [name for name in ("typer", "tqdm", "matplotlib", "safetensors") if importlib.util.find_spec(name) is None]
if _EXTRAS:
    # Here and not in main(): the commands below are declared with typer.
    print(f"novolstm needs {', '.join(_EXTRAS)}: pip install 'novolstm-triton[train]'", file=sys.stderr)
    raise SystemExit(2)

import typer  # noqa: E402

from novolstm_triton.app import tune  # noqa: E402
from novolstm_triton.app.doctor import DTYPES as DOCTOR_DTYPES  # noqa: E402
from novolstm_triton.app.doctor import Shape, doctor  # noqa: E402
from novolstm_triton.app.isolated import CallError  # noqa: E402
from novolstm_triton.app.text import UsageError  # noqa: E402
from novolstm_triton.app.train import CELLS, DEVICES, DTYPES, TrainConfig, TrainingError, train  # noqa: E402
from novolstm_triton.cells import CELLS as CELL_NAMES  # noqa: E402
from novolstm_triton.cells import VARIANTS, with_kernels  # noqa: E402
from novolstm_triton.functional import BACKENDS  # noqa: E402
from novolstm_triton.plans import tuned  # noqa: E402

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
            "--text, --backend and --device may be given anew.",
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
    variant: Annotated[str | None, _option("variant", "Which NovoLSTM.", VARIANTS)] = None,
    max_bytes: Annotated[int | None, _option("max_bytes", "Read no more text than this.")] = None,
) -> int:
    """Train a byte-level language model and write its metrics, weights, loss curve and a sample.

    Without options: on the sources of Python's standard library, on the GPU if there is one, in about one minute on
    two CPU cores. Runs under `torchrun --nproc-per-node=N -m novolstm_triton train …`, too. Ctrl-C stops after the
    current step and saves; --resume continues.
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


@app.command("tune")
def tune_command(
    hidden: Annotated[str, typer.Option(metavar="H,...", help="Units of the layers.")],
    batch: Annotated[str, typer.Option(metavar="B,...", help="Rows of the layers.")] = "16",
    dtype: Annotated[str, typer.Option(metavar="DTYPE,...", help=f"Among {', '.join(tuned.DTYPES)}.")] = "bf16",
    cell: Annotated[str, typer.Option(metavar="CELL,...", help=f"Any of {', '.join(with_kernels())}.")] = "formula",
    out: Annotated[Path, typer.Option(metavar="FILE", help="File of plans; an existing one is continued.")] = Path(
        "novolstm-plans.json"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Time steps of a timed call.")] = 256,
    candidates: Annotated[int, typer.Option(min=1, help="How many of the plan's candidates are measured.")] = 24,
    timeout: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="Longest check or timing of one plan, with compilation.")
    ] = 120.0,
) -> int:
    """Measure plans on this machine's GPU and write the fastest to a file.

    Every plan is checked against the torch backend before it is timed. The file is written after each size; an
    existing one is continued. To use its plans, set NOVOLSTM_PLANS=FILE in the environment or call
    novolstm_triton.plans.tuned.load(FILE).
    """
    wanted = list(
        tune.keys(
            _sizes("--hidden", hidden),
            _sizes("--batch", batch),
            _names("--dtype", dtype, tuple(tuned.DTYPES)),
            _names("--cell", cell, tuple(with_kernels())),
        )
    )
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout: expected a finite number, got {timeout}")
    if not torch.cuda.is_available():
        return _fail("tune measures plans on a GPU, and PyTorch sees none here", 1)
    failed = tune.tune(wanted, out, steps=steps, candidates=candidates, timeout_s=timeout)
    print(f"{len(wanted) - len(failed)} of {len(wanted)} kernels tuned; to use the plans: {tuned.VARIABLE}={out}")
    return 1 if failed else 0


@app.command("doctor")
def doctor_command(
    hidden: Annotated[int, typer.Option(help="Units of the layer.")] = Shape.hidden,
    batch: Annotated[int, typer.Option(help="Rows.")] = Shape.batch,
    steps: Annotated[int, typer.Option(help="Time steps.")] = Shape.steps,
    dtype: Annotated[str, typer.Option(metavar="{" + ",".join(DOCTOR_DTYPES) + "}")] = Shape.dtype,
    cell: Annotated[str, typer.Option(metavar="{" + ",".join(CELL_NAMES) + "}")] = Shape.cell,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="auto, cpu or cuda; or a GPU that need not be here, such as h200: its plan alone."
        ),
    ] = "auto",
) -> int:
    """Say what would run here for a layer and why, and check it against the reference.

    Prints versions, devices, the backend, the plan of the kernels and the limits that apply, then the largest error of
    each output and gradient. The exit code is 0 if all is well, else 1, with advice.
    """
    return doctor(Shape(hidden, batch, steps, dtype, cell), device)


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: expected names among {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))


def _sizes(option: str, text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1 or max(sizes) > tuned.MAX_SIZE:
        wanted = f"numbers of at least 1, at most {tuned.MAX_SIZE}, with commas between them"
        raise UsageError(f"{option}: expected {wanted}, got {reprlib.repr(text)}")
    return list(dict.fromkeys(sizes))


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
    except (TrainingError, CallError) as error:
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
