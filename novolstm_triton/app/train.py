"""The training job: a byte-level language model around a recurrent layer, from configuration to files.

Reads top-down: configuration, processes, learner, files, job. The model is in `bytemodel.py`, the text in `text.py`,
the command line in `cli.py`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import reprlib
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from novolstm_triton.app.bytemodel import CELLS, ByteModel, printable, sample, save_model
from novolstm_triton.app.text import ByteStream, UsageError, read_text, split_text
from novolstm_triton.cells import VARIANTS
from novolstm_triton.files import check_inflated
from novolstm_triton.functional import BACKENDS, resolve_backend

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CHECKPOINT, METRICS, MODEL, PLOT = "checkpoint.pt", "metrics.jsonl", "model.safetensors", "loss.png"
_FORMAT = "novolstm-train-1"
_FILES = (METRICS, MODEL, "model-lstm.safetensors", PLOT, CHECKPOINT)

_ROWS, _LONGEST_INTERVAL = 20, 250  # rows of metrics in a whole run; steps from one to the next
_REFRESH = 10  # steps between two looks at the losses, each of which waits for a GPU
_EVALUATED_BYTES = 2**15
_CLIP_NORM = 1.0
_WARM_UP_STEPS = 20
_FINAL_LR = 0.05  # share of the peak learning rate that the cosine ends at
_PROMPT_BYTES, _SAMPLE_BYTES, _TEMPERATURE = 120, 400, 0.7

_PRODUCTS_WORTH_THREADS = 2**25  # multiply-adds of a time step

_CHECKPOINT = dict(config=dict, rows_per_step=int, text_sha256=str, step=int, rows=list, learners=dict)
_FREE_ON_RESUME = {"steps", "text", "backend", "device"}


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how. Each field is a flag of `novolstm train`, whose help describes it.

    Raises:
        UsageError: a value out of range.
    """

    text: tuple[str, ...] = ()
    max_bytes: int = 2**26
    steps: int = 400
    hidden: int = 128
    layers: int = 1
    batch: int = 32
    seq: int = 128
    lr: float = 0.01
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    cell: str = "novolstm"
    compare: bool = False
    gate_gain: float | str = "hidden"
    variant: str = "formula"

    def __post_init__(self) -> None:
        """Check every value that can be checked without reading the text or touching a device."""
        for name in ("max_bytes", "steps", "hidden", "layers", "batch", "seq"):
            if getattr(self, name) < 1:
                raise UsageError(f"{_flag(name)}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr: expected a positive number, got {self.lr}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: expected 0 to 2^63 - 1, got {self.seed}")
        if self.gate_gain != "hidden" and not (
            isinstance(self.gate_gain, (int, float)) and math.isfinite(self.gate_gain)
        ):
            raise UsageError(f'--gate-gain: expected a number or "hidden", got {self.gate_gain!r}')
        known = {"dtype": DTYPES, "device": DEVICES, "backend": BACKENDS, "cell": CELLS, "variant": VARIANTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{_flag(name)}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells to train."""
        return CELLS if self.compare else (self.cell,)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class TrainingError(RuntimeError):
    """A failure of training that the user can do something about; the message is one line."""


class Processes:
    """The processes of a `torchrun`, or just this one, and what they have to agree on.

    Attributes:
        rank: number of this process.
        world: how many there are.
        device: where this process computes.
    """

    def __init__(self, device: str) -> None:
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no GPU here")
        self.device = torch.device("cpu")
        if device != "cpu" and torch.cuda.is_available():
            local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if local_world > gpus:
                raise UsageError(f"torchrun: {local_world} processes here need as many GPUs, there are {gpus}")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes of a tensor on the CPU."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def most(self, value: int) -> int:
        """Return the greatest of the processes' values."""
        if self.world == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def rows(self, values: Tensor) -> Tensor:
        """Return the processes' states [L, B, H] side by side, [L, world·B, H], on the CPU."""
        values = values.cpu().contiguous()
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values)
        return torch.cat(parts, dim=1)

    def agree(self, check: Callable[[], Any]) -> Any:
        """Run a check on the first process and return its result, or raise its UsageError, on all of them."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = check()
            except UsageError as error:
                answer[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if answer[1] is not None:
            raise UsageError(answer[1])
        return answer[0]

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1:
            dist.destroy_process_group()


def build_model(config: TrainConfig, cell: str) -> ByteModel:
    """Return the model of a configuration, initialised from its seed, on the CPU."""
    torch.manual_seed(config.seed)
    options = {}
    if cell == "novolstm":
        options = {"variant": config.variant, "gate_gain": config.gate_gain, "backend": config.backend}
    return ByteModel(cell, config.hidden, config.layers, **options)


@contextlib.contextmanager
def _threads(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute on one CPU thread if the products of a time step are small, unless OMP_NUM_THREADS is set.

    Threads gain little on them, and lose a factor of ten where other programs compete for the cores.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        products = 5 * config.hidden**2 * config.batch
        torch.set_num_threads(before if products >= _PRODUCTS_WORTH_THREADS else 1)
    yield
    torch.set_num_threads(before)


class Learner:
    """One model in training: weights, optimizer, carried state and loss curve.

    Attributes:
        cell: which recurrent layer.
        model: the model, without the wrapper that averages gradients.
        state: (h, c), [L, B, H] each, at the end of the last window, or None at the start of an epoch.
        curve: bits per byte of every step so far, averaged over processes; complete after `flush`.
    """

    def __init__(self, config: TrainConfig, cell: str, processes: Processes) -> None:
        self.cell, self.processes = cell, processes
        self.model = build_model(config, cell).to(processes.device)
        self.state: tuple[Tensor, Tensor] | None = None
        self.curve: list[float] = []
        self._pending: list[Tensor] = []
        self._clock = _Clock()
        self._dtype = resolve_dtype(config.dtype, processes.device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)
        # fp16 alone needs its loss scaled; disabled, the scaler passes everything through.
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=self._dtype == torch.float16)
        self._run = self.model
        if processes.world > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self._run = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        """Train on one window: x and y [T, B] int64."""
        with self._clock.running(x.numel()):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            loss, self.state = self._loss(self._run, x, y, self.state)
            self._optimizer.zero_grad()
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._pending.append(loss.detach())

    def flush(self) -> None:
        """Wait for the device and extend the curve to the present step."""
        if self._pending:
            with self._clock.running(0):
                losses = torch.stack(self._pending).double().cpu()
            self.curve += (self.processes.mean(losses) / math.log(2)).tolist()
            self._pending.clear()

    def rehearse(self, x: Tensor, y: Tensor) -> None:
        """Run forward and backward once and change nothing: first calls are slow, and some cannot work at all."""
        loss, _ = self._loss(self.model, x, y, None)
        loss.backward()
        self._optimizer.zero_grad()
        self._optimizer.step()  # without gradients: only its first call's imports

    @torch.no_grad()
    def evaluate(self, stream: ByteStream) -> float:
        """Return bits per byte over the start of every row of a held-out stream, the state carried along."""
        bytes_per_window = stream.window(0)[0].numel() * self.processes.world
        windows = min(stream.windows, max(1, _EVALUATED_BYTES // bytes_per_window))
        total, state = torch.zeros((), dtype=torch.float64), None
        for index in range(windows):
            loss, state = self._loss(self.model, *stream.window(index), state)
            total += loss.double().cpu()
        return float(self.processes.mean(total)) / windows / math.log(2)

    def tokens_per_s(self) -> float:
        """Return bytes trained on per second, over all processes, since the last call."""
        return self._clock.lap() * self.processes.world

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, the states of all processes included.

        There is no state of a random generator: nothing is drawn after the initial weights.
        """
        states = () if self.state is None else tuple(self.processes.rows(s) for s in self.state)
        parts = {"model": self.model, "optimizer": self._optimizer, "scaler": self._scaler}
        saved = {name: part.state_dict() for name, part in parts.items()}
        return saved | {"state": states, "curve": torch.tensor(self.curve, dtype=torch.float64)}

    def load_state_dict(self, saved: dict[str, Any], share: slice) -> None:
        """Take up a saved `state_dict`; of the states, the rows that are this process's share."""
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._scaler.load_state_dict(saved["scaler"])
        self.curve = saved["curve"].tolist()
        if saved["state"]:
            h, c = (s[:, share].contiguous().to(self.processes.device) for s in saved["state"])
            self.state = h, c

    def _loss(
        self, model: nn.Module, x: Tensor, y: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the mean cross-entropy in nats, and the state cut off from the graph."""
        with torch.autocast(x.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits, (h, c) = model(x, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        return loss, (h.detach(), c.detach())


class _Clock:
    """Counts bytes and the seconds spent on them."""

    def __init__(self) -> None:
        self._count, self._seconds = 0, 0.0

    @contextlib.contextmanager
    def running(self, count: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        self._count += count

    def lap(self) -> float:
        rate = self._count / max(self._seconds, 1e-9)
        self._count, self._seconds = 0, 0.0
        return rate


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the products: for "auto", bf16 on a GPU that has it, else fp32."""
    dtype = DTYPES[name]
    if dtype is not None:
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a short linear warm-up, then half a cosine."""
    warm_up = min(_WARM_UP_STEPS, config.steps // 10)
    if step < warm_up:
        return config.lr * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, config.steps - warm_up)
    return config.lr * (_FINAL_LR + (1 - _FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place, so that no reader sees half a file.

    Raises:
        TrainingError: the disk is full, or the folder gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise TrainingError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the checkpoint of a run.

    Raises:
        UsageError: the folder has no checkpoint, or one that cannot be read or that another version wrote.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise UsageError(f"--resume: no {CHECKPOINT} in {folder}")
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                check_inflated(entry.file_size, path.stat().st_size, entry.filename)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"--resume: cannot read {path}: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != _FORMAT:
        raise UsageError(f"--resume: {path} is not a checkpoint of this version of novolstm train")
    if (flaw := _flaw(checkpoint)) is not None:
        raise UsageError(f"--resume: {path} is damaged: {flaw}")
    return checkpoint


def _flaw(checkpoint: dict[str, Any]) -> str | None:
    """Return what is wrong with a checkpoint, as far as can be told before a model is made, or None."""
    for name, kind in _CHECKPOINT.items():
        if type(checkpoint.get(name)) is not kind:
            return f"{name}: expected {kind.__name__}, got {reprlib.repr(checkpoint.get(name))}"
    config, defaults = checkpoint["config"], dataclasses.asdict(TrainConfig())
    if config.keys() != defaults.keys():
        return f"config: expected {sorted(defaults)}, got {reprlib.repr(sorted(config, key=str))}"
    for name, default in defaults.items():
        kinds = (str, int, float) if name == "gate_gain" else (list, tuple) if name == "text" else (type(default),)
        if type(config[name]) not in kinds:
            return f"{name}: expected {kinds[0].__name__}, got {reprlib.repr(config[name])}"
    if not all(isinstance(path, str) for path in config["text"]):
        return "text: expected names of files"
    for name, least in (("step", 1), ("rows_per_step", 1)):
        if checkpoint[name] < least:
            return f"{name}: expected at least {least}, got {checkpoint[name]}"
    return None


def resumed_config(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """Return the configuration of a saved run with the flags that a resumed run may change.

    Args:
        saved: fields of the saved run's configuration.
        given: fields that the user has set.

    Raises:
        UsageError: a flag that contradicts the saved run.
    """
    saved = saved | {"text": tuple(saved["text"])}
    for name, value in given.items():
        if name not in _FREE_ON_RESUME and value != saved[name]:
            raise UsageError(f"{_flag(name)} {value}: the run to resume has {saved[name]}, which cannot change")
    return TrainConfig(**saved | given)


def choose_folder(out: Path | None, resume: Path | None, overwrite: bool) -> Path:
    """Return the folder to write to, made and found writable; no earlier run's files are lost without `overwrite`.

    Args:
        out: the folder that was asked for. None: the resumed run's, else the first of novolstm-run, novolstm-run-2,
            … that holds no run (with `overwrite`, novolstm-run).
        resume: folder of the run to resume.
        overwrite: a run in `out` may be replaced.

    Raises:
        UsageError: the folder holds another run, or cannot be written to.
    """
    folder = out or resume
    if folder is None:
        folder, number = Path("novolstm-run"), 1
        while _holds_run(folder) and not overwrite:
            number += 1
            folder = Path(f"novolstm-run-{number}")
    other = resume is None or folder.resolve() != resume.resolve()
    if other and _holds_run(folder) and not overwrite:
        raise UsageError(
            f"--out: {folder} holds a run already: continue it with --resume {folder}, or replace it with --overwrite"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if other:
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write to {folder}: {error.strerror}") from error
    return folder


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES)


class Job:
    """A run: what it trains on, its learners, how far it is, its files.

    Attributes:
        config: the configuration; of a resumed run, the saved one with the flags given.
        learners: one per cell, trained on the same batches.
        step: steps done.
        rows: the rows of metrics so far.

    Args:
        config: what to train.
        processes: the processes to train in.
        checkpoint: the saved run to continue, from `load_checkpoint`.

    Raises:
        UsageError: something that cannot work, found before any training.
    """

    def __init__(self, config: TrainConfig, processes: Processes, checkpoint: dict[str, Any] | None = None) -> None:
        if checkpoint:
            config = dataclasses.replace(config, batch=_share(checkpoint["rows_per_step"], processes.world))
        self.config, self.processes = config, processes
        text = read_text(config.text, config.max_bytes)
        self._text_bytes, self._text_hash = len(text), hashlib.sha256(text).hexdigest()
        if checkpoint and checkpoint["text_sha256"] != self._text_hash:
            raise UsageError(
                "--resume: the text is not the one that the run was trained on: restore it, or pass --text"
            )
        rows = config.batch * processes.world
        trained, self._held_out = split_text(text, rows, config.seq)
        self._share = slice(processes.rank * config.batch, (processes.rank + 1) * config.batch)
        streams = [ByteStream(d, rows, config.seq, self._share, processes.device) for d in (trained, self._held_out)]
        self._stream, self._held_out_stream = streams
        self.step, self.rows = 0, []
        self.learners = self._build()
        if checkpoint:
            self._restore(checkpoint)

    def _build(self) -> list[Learner]:
        """Make the learners and run each once, forward and backward, so that what cannot work fails here."""
        try:
            learners = [Learner(self.config, cell, self.processes) for cell in self.config.cells]
            for learner in learners:
                learner.rehearse(*self._stream.window(0))
        except (ImportError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"this configuration does not run here: {reason[0]}") from error
        return learners

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.step, self.rows = checkpoint["step"], checkpoint["rows"]
        if self.step >= self.config.steps:
            raise UsageError(f"--resume: the run has done its {self.step} steps: give --steps a larger number")
        try:
            for learner in self.learners:
                learner.load_state_dict(checkpoint["learners"][learner.cell], self._share)
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"--resume: {CHECKPOINT} does not fit the run it describes: {reason[:200]}") from error

    def fit(self, folder: Path) -> int:
        """Train to the last step, or until a signal asks to stop; save at every row of metrics and at the end.

        Returns:
            0, or the number of the signal.
        """
        every = min(max(1, self.config.steps // _ROWS), _LONGEST_INTERVAL)
        with _stop_requests() as stop, _Progress(self) as progress:
            stopped = 0
            while self.step < self.config.steps and not stopped:
                self._advance()
                # All processes have to stop after the same step, so each looks at its signal here only.
                stopped = self.processes.most(stop.signal)
                measured = self.step % every == 0 or self.step in (1, self.config.steps)
                if measured or stopped or self.step % _REFRESH == 0:
                    self._flush()
                if measured:
                    self._measure()
                    self.save(folder)
                    progress.measured()
                progress.advanced()
            if stopped:
                self.save(folder)
            if self.processes.rank == 0:
                write_atomically(folder / PLOT, self.draw)
        return stopped

    def _advance(self) -> None:
        """Train every learner on the next window; the state starts anew with every epoch."""
        index = self.step % self._stream.windows
        x, y = self._stream.window(index)
        lr = learning_rate(self.step, self.config)
        for learner in self.learners:
            if index == 0:
                learner.state = None
            learner.step(x, y, lr)
            if len(self.learners) > 1 and self.processes.device.type == "cuda":
                learner.flush()  # else the time of one would be counted for the other
        self.step += 1

    def _flush(self) -> None:
        for learner in self.learners:
            learner.flush()
            self._check_finite(learner, learner.curve[-1])

    def _check_finite(self, learner: Learner, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"{learner.cell}: the loss is {loss} by step {self.step}: lower --lr")

    def _measure(self) -> None:
        """Append a row of metrics for each learner."""
        before = self.rows[-1]["step"] if self.rows else 0
        for learner in self.learners:
            since, held_out = learner.curve[before : self.step], learner.evaluate(self._held_out_stream)
            self._check_finite(learner, held_out)
            self.rows.append(
                {
                    "step": self.step,
                    "cell": learner.cell,
                    "train_bpb": round(sum(since) / len(since), 6),
                    "valid_bpb": round(held_out, 6),
                    "tokens_per_s": round(learner.tokens_per_s()),
                }
            )

    def save(self, folder: Path) -> None:
        """Write metrics, models and checkpoint."""
        states = {learner.cell: learner.state_dict() for learner in self.learners}
        if self.processes.rank != 0:
            return
        checkpoint = {
            "format": _FORMAT,
            "config": dataclasses.asdict(self.config),
            "rows_per_step": self.config.batch * self.processes.world,
            "text_sha256": self._text_hash,
            "step": self.step,
            "rows": self.rows,
            "learners": states,
        }
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(folder / METRICS, lambda path: path.write_text(lines))
        for learner in self.learners:
            write_atomically(folder / self.model_file(learner.cell), functools.partial(save_model, learner.model))
        # Last, because a resumed run relies on it.
        write_atomically(folder / CHECKPOINT, functools.partial(torch.save, checkpoint))

    def model_file(self, cell: str) -> str:
        """Return the name of a cell's model file; the run's main model is always `model.safetensors`."""
        return MODEL if cell == self.config.cells[0] else f"model-{cell}.safetensors"

    def draw(self, path: Path) -> None:
        """Write a picture of the loss curves to `path` (PNG)."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(
            xlabel="step",
            ylabel="bits per byte",
            title=self.describe().replace("; ", "\n"),
        )
        for learner, colour in zip(self.learners, ("tab:blue", "tab:orange"), strict=False):
            rows = [row for row in self.rows if row["cell"] == learner.cell]
            steps = range(1, len(learner.curve) + 1)
            axes.plot(steps, learner.curve, color=colour, alpha=0.35, linewidth=1, label=f"{learner.cell}, training")
            final = f": {rows[-1]['valid_bpb']:.2f}" if rows else ""
            held_out = [row["valid_bpb"] for row in rows]
            label = f"{learner.cell}, held-out{final}"
            axes.plot([row["step"] for row in rows], held_out, color=colour, marker="o", markersize=4, label=label)
        axes.set_xlim(0, self.config.steps)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, format="png", dpi=150)

    def files(self) -> list[str]:
        """Return the names of the files of a finished run."""
        return [METRICS, *(self.model_file(cell) for cell in self.config.cells), PLOT, CHECKPOINT]

    def _source(self) -> str:
        """Name what is trained on."""
        if not self.config.text:
            return "Python's standard library"
        names = [Path(name).name or name for name in self.config.text]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    def describe(self) -> str:
        """Describe the run in one line."""
        config, device = self.config, self.processes.device
        dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
        parts = [" and ".join(config.cells), f"{config.layers} × {config.hidden} units", f"{dtype} on {device.type}"]
        if "novolstm" in config.cells:
            parts.append(f"backend {resolve_backend(config.backend, device)}")
        if self.processes.world > 1:
            parts.append(f"{self.processes.world} processes")
        size = f"{'first ' if self._text_bytes == config.max_bytes else ''}{self._text_bytes:,} bytes"
        return f"{', '.join(parts)}; {size} of {self._source()}"

    def sample(self) -> tuple[str, str]:
        """Return the start of the held-out text and how the first learner's model goes on from there."""
        prompt = self._held_out[:_PROMPT_BYTES].tolist()
        generated = sample(self.learners[0].model, prompt, _SAMPLE_BYTES, _TEMPERATURE, self.config.seed)
        return printable(bytes(prompt)), printable(generated)


def _share(rows: int, world: int) -> int:
    if rows % world:
        raise UsageError(f"--resume: the run has {rows} rows a step, which {world} processes cannot share evenly")
    return rows // world


@dataclass
class _Stop:
    signal: int = 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step; the second acts as usual."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: object) -> None:
        stop.signal = number
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


class _Progress:
    """Shows a job's progress on stderr: a bar on a terminal, else a line per row of metrics."""

    def __init__(self, job: Job) -> None:
        from tqdm import tqdm

        self._job, self._mute = job, job.processes.rank != 0
        self._terminal = sys.stderr.isatty()
        hidden = self._mute or not self._terminal
        self._bar = tqdm(total=job.config.steps, initial=job.step, unit="step", dynamic_ncols=True, disable=hidden)
        self._speed = ""

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advanced(self) -> None:
        """Count a step and show the latest losses."""
        losses = [f"{learner.cell} {learner.curve[-1]:.2f}" for learner in self._job.learners if learner.curve]
        self._bar.set_postfix_str(", ".join(losses) + " bits/byte" + self._speed, refresh=False)
        self._bar.update()

    def measured(self) -> None:
        """Show the latest row of metrics."""
        rows = self._job.rows[-len(self._job.learners) :]
        self._speed = ", " + "/".join(f"{row['tokens_per_s']:,}" for row in rows) + " tokens/s"
        if not self._terminal and not self._mute:
            print(f"step {self._job.step}/{self._job.config.steps}  {summary(rows)}", file=sys.stderr, flush=True)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return one line for the rows of metrics of one step."""
    return "   ".join(
        f"{row['cell']}: {row['train_bpb']:.3f} bits/byte, held-out {row['valid_bpb']:.3f}, "
        f"{row['tokens_per_s']:,} tokens/s"
        for row in rows
    )


def train(given: dict[str, Any], out: Path | None = None, resume: Path | None = None, overwrite: bool = False) -> int:
    """Run the whole job of `novolstm train`: check, train, write the files, print a summary and a sample.

    Args:
        given: the fields of `TrainConfig` that are not left at their default (or, with `resume`, at the run's).
        out: folder to write to, see `choose_folder`.
        resume: folder of a run to continue.
        overwrite: replace a run in `out`.

    Returns:
        Exit code: 0, or 128 + signal number after an interruption.

    Raises:
        UsageError: a request that cannot be met, found before any training.
        TrainingError: the loss is no longer finite.
    """
    checkpoint = load_checkpoint(resume) if resume else None
    config = resumed_config(checkpoint["config"], given) if checkpoint else TrainConfig(**given)
    processes = Processes(config.device)
    try:
        with _threads(config, processes.device):
            job = Job(config, processes, checkpoint)
            folder = processes.agree(lambda: choose_folder(out, resume, overwrite))
            return _run(job, folder)
    finally:
        processes.close()


def _run(job: Job, folder: Path) -> int:
    """Fit and tell the user; return the exit code."""
    say = functools.partial(print, flush=True) if job.processes.rank == 0 else lambda *_: None
    say(f"{job.describe()}; writing to {folder}")
    started = time.perf_counter()
    signal_number = job.fit(folder)
    if signal_number and job.step < job.config.steps:
        again = f"novolstm train --resume {shlex.quote(str(folder))}"
        say(f"stopped after step {job.step} of {job.config.steps}; to go on: {again}")
        return 128 + signal_number
    say(f"{summary(job.rows[-len(job.learners) :])}; {time.perf_counter() - started:.0f} s")
    say(f"wrote {', '.join(str(folder / name) for name in job.files())}")
    if job.processes.rank == 0:
        prompt, continuation = job.sample()
        say(f"--- held-out text ---\n{prompt}\n--- continued by {job.learners[0].cell} ---\n{continuation}")
    return 0
