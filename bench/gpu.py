"""Check the Triton backend on a GPU against the float64 reference, and time it against nn.LSTM, within minutes.

    bash bench/gpu.sh OUT_DIR --seconds 500

OUT_DIR/<gpu name>.json is written again after every result, so that an early stop loses nothing:

    environment  device, versions and precision settings
    checks       name, shape, error, bound, ok, and how; `error` is null where `message` says what went wrong
    rows         layer, exchange, dtype, hidden, batch, steps, forward_us_per_step, forward_backward_us_per_step,
                 peak_mib, and how; or `error`, a text
    unfinished   what the time did not suffice for

A persistent kernel with a bug may spin for ever, or leave CUDA unusable. Therefore this process never touches the GPU:
it hands tasks, one by one, to a worker process, kills a worker that falls silent and goes on with a new one. Meanwhile
further workers compile ahead of time what later tasks need; timing starts when they are done.

With --device cpu (the default under TRITON_INTERPRET=1) tiny sizes run in Triton's interpreter: a test of this script.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import os
import pathlib
import platform
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
STALL_S = 60.0
"""How long a worker may say nothing: longer than any compilation takes."""
COMPILE_SHARE = 0.3
"""Share of the time after which timing starts whether or not everything is compiled."""

Task = dict[str, Any]


# What to run


def check(test: str, steps: int, batch: int, hidden: int, dtype: str, *, core: bool = False, **options: Any) -> Task:
    """Return a check task; options are fields of tests/problems.py's Problem, and `pins`, arguments of plan.forced."""
    pins = options.pop("pins", {})
    problem = dict(steps=steps, batch=batch, hidden=hidden, **options)
    flags = [options.get("variant", "formula"), *(name for name in ("lengths", "reverse") if options.get(name))]
    flags += [f"{name}={value}" for name, value in pins.items()]
    name = f"{test} T{steps}-B{batch}-H{hidden} {dtype} {' '.join(flags)}"
    return dict(kind="check", name=name, core=core, test=test, problem=problem, dtype=dtype, pins=pins)


def rows(hidden: int, batch: int, steps: int, *entries: Task, core: bool = False, **options: Any) -> Task:
    """Return a timing task, whose entries take turns."""
    name = f"time H{hidden}-B{batch} {', '.join(entry_name(entry) for entry in entries)}"
    return dict(
        kind="rows", name=name, core=core, hidden=hidden, batch=batch, steps=steps, entries=list(entries), **options
    )


def entry(layer: str, dtype: str, **pins: Any) -> Task:
    """Return one row to be: a layer, a dtype, and pins for the plan."""
    return dict(layer=layer, dtype=dtype, pins=pins)


def entry_name(entry: Task) -> str:
    """Return what tells the entries of a task apart."""
    return " ".join([entry["layer"], entry["dtype"], *(f"{name}={value}" for name, value in entry["pins"].items())])


def all_tasks() -> list[Task]:
    """Return everything worth running, the most important first."""
    tasks = [
        check("exact", 64, 16, 512, "bf16", core=True, inputs_size=512),
        check("exact", 64, 16, 128, "bf16", core=True, inputs_size=128),
        check("exact", 32, 64, 1024, "bf16", core=True, inputs_size=1024),
        check("exact", 40, 5, 100, "fp32", core=True, lengths=True, reverse=True),
        check("exact", 33, 33, 256, "fp16", core=True, variant="notebook", lengths=True),
        check("repeat", 256, 16, 512, "bf16", core=True),
    ]
    sixteen_bit = [entry("novolstm", "bf16"), entry("nn.LSTM", "fp16"), entry("nn.LSTM", "bf16")]
    tasks += [rows(h, b, 1024, *sixteen_bit, core=True) for h in (512, 128, 1024) for b in (16, 64)]
    return tasks + more_checks() + more_rows(sixteen_bit)


def more_checks() -> list[Task]:
    """Return the checks after the core: shapes by dtypes with every option in turn, pinned plans, long runs."""
    shapes = [(1, 1, 1), (9, 5, 7), (40, 3, 100), (33, 33, 257), (64, 16, 64), (50, 1, 256), (24, 64, 768)]
    shapes += [(16, 256, 512), (12, 130, 1024), (6, 8, 2048)]
    tasks = []
    for number, (steps, batch, hidden) in enumerate(shapes):
        for turn, dtype in enumerate(("bf16", "fp32", "fp16"), start=number):
            options = dict(lengths=turn % 2 == 1, reverse=turn % 3 == 1, seed=turn)
            options["variant"] = "notebook" if turn % 4 == 2 else "formula"
            tasks.append(check("exact", steps, batch, hidden, dtype, **options))
    pinned = [dict(slices=slices) for slices in (1, 2, 4, 8, 16)]
    pinned += [dict(slices=slices, resident=False) for slices in (1, 8)]
    pinned += [dict(block_b=32), dict(block_b=64), dict(block_k=32, slices=8), dict(chunk=5), dict(exchange="barrier")]
    pinned += [dict(exchange="words"), dict(exchange="words", slices=4, chunk=5), dict(exchange="words", slices=16)]
    for number, pins in enumerate(pinned):
        options = dict(pins=pins, lengths=number % 2 == 1, reverse=number % 3 == 0)
        tasks.append(check("exact", 24, 20, 256, "bf16", **options))
    tasks += [
        check("exact", 24, 20, 256, "fp32", pins=dict(slices=16, chunk=7), lengths=True),
        # Nine batch tiles, of which four are resident together.
        check("exact", 6, 130, 512, "bf16", pins=dict(slices=32, block_b=16)),
        check("exact", 6, 130, 512, "bf16", pins=dict(slices=32, block_b=16, exchange="words")),
        check("exact", 24, 20, 128, "fp32", pins=dict(exchange="words", chunk=7), lengths=True, variant="notebook"),
        check("repeat", 1024, 64, 512, "bf16"),
        check("repeat", 1024, 64, 512, "bf16", pins=dict(exchange="words")),
        check("repeat", 256, 64, 1024, "bf16"),
        check("repeat", 100, 20, 256, "fp32", lengths=True, pins=dict(slices=16, chunk=32)),
        check("growth", 64, 16, 512, "bf16"),
        check("long", 65_536, 2, 64, "fp32"),
        check("long", 65_536, 2, 256, "bf16"),
    ]
    return tasks


def more_rows(sixteen_bit: list[Task]) -> list[Task]:
    """Return the timings after the core."""
    ours, theirs = functools.partial(entry, "novolstm"), functools.partial(entry, "nn.LSTM")
    tasks = [rows(256, batch, 1024, *sixteen_bit) for batch in (16, 64)]
    # Slices to compare: those with one possible exchange, then those with two.
    alternatives = {128: ((1,), (2, 4, 8)), 256: ((1,), (4, 8, 16)), 512: ((1, 8), (16, 32)), 1024: ((16, 32), (64,))}
    for hidden, (single, either) in alternatives.items():
        entries = [ours("bf16"), ours("bf16", exchange="words"), *(ours("bf16", slices=s) for s in single + either)]
        entries += [ours("bf16", slices=s, exchange="words") for s in either]
        tasks += [rows(hidden, batch, 1024, *entries) for batch in (16, 64)]
    more = [ours("fp16"), ours("fp32"), theirs("fp32")]
    tasks += [rows(hidden, batch, 1024, *more) for hidden in (512, 128, 1024, 256) for batch in (16, 64)]
    for batch in (1, 256):
        tasks += [rows(hidden, batch, 1024, *sixteen_bit) for hidden in (512, 128, 1024, 256)]
    tasks += [rows(hidden, 16, 64, entry("reference", "bf16"), rounds=3) for hidden in (128, 512, 1024)]
    tasks += [rows(512, 16, 64, entry("reference", "fp32"), rounds=3)]
    tasks += [rows(hidden, batch, 1024, *more) for hidden in (512, 128, 1024, 256) for batch in (1, 256)]
    tasks += [rows(512, 16, 32, entry("compiled", "bf16"), rounds=5, stall_s=150)]
    return tasks


def smoke_tasks() -> list[Task]:
    """Return tasks for Triton's interpreter: fp32 and one slice, the only ones that it runs right."""
    return [
        check("exact", 3, 2, 5, "fp32"),
        check("exact", 4, 3, 6, "fp32", variant="notebook", lengths=True, reverse=True, pins=dict(chunk=2)),
        check("repeat", 2, 1, 3, "fp32"),
        check("growth", 1, 1, 3, "fp32"),
        check("long", 16, 1, 4, "fp32"),
        rows(6, 2, 2, entry("novolstm", "fp32"), entry("nn.LSTM", "fp32"), rounds=1),
        rows(6, 2, 2, entry("novolstm", "fp32"), entry("novolstm", "fp32", resident=False), rounds=1),
        rows(6, 2, 2, entry("reference", "fp32"), rounds=1),
    ]


def compilations(tasks: list[Task]) -> list[Task]:
    """Return the compile tasks for everything that `tasks` launch, without repetitions, in their order."""
    wanted = {}
    for task in tasks:
        if task["kind"] == "check":
            problem = {
                name: value for name, value in task["problem"].items() if name not in ("steps", "seed", "reverse")
            }
            needs = [(problem, task["dtype"], task["pins"])]
        else:
            problem = dict(batch=task["batch"], hidden=task["hidden"], inputs_size=task["hidden"])
            needs = [(problem, e["dtype"], e["pins"]) for e in task["entries"] if e["layer"] == "novolstm"]
        for problem, dtype, pins in needs:
            # What decides the kernels; the input's size does not.
            key = json.dumps(
                [{k: v for k, v in problem.items() if k != "inputs_size" and v}, dtype, pins], sort_keys=True
            )
            wanted.setdefault(key, dict(kind="compile", name=key, problem=problem, dtype=dtype, pins=pins))
    return list(wanted.values())


def next_task(pending: list[Task], compiling: bool) -> Task | None:
    """Return what to run next: the first task, but nothing is timed while others compile. None: wait for them."""
    return next((task for task in pending if not (compiling and task["kind"] == "rows")), None)


def least_seconds(task: Task) -> float:
    """Return the time without which it is not worth starting a task."""
    return 8.0 if task["kind"] == "check" else 12.0


def without_lost(task: Task, at: str) -> Task | None:
    """Return what is left of a timing task after its entry named `at` took a worker along; None if nothing is."""
    entries = [e for e in task.get("entries", []) if entry_name(e) != at]
    return dict(task, entries=entries) if entries and len(entries) < len(task.get("entries", [])) else None


# Results


def slug(name: str) -> str:
    """Return a device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def finite(value: Any) -> Any:
    """Return `value` with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: pathlib.Path, report: dict) -> None:
    """Write a report so that a reader, or an interrupted run, finds the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def line_of(result: dict) -> str:
    """Return a check or a row as one line of text."""
    if "ok" in result:
        text = f"{'ok    ' if result['ok'] else 'FAILED'} {result['name']:70} "
        if "message" in result:
            return text + result["message"].splitlines()[0][:300]
        return text + f"error {number(result['error'], '.2e')} of {number(result['bound'], '.2e')} {result['detail']}"
    text = f"row    {result['layer']:9} {result['dtype']:4} H={result['hidden']:<5} B={result['batch']:<4}"
    if "error" in result:
        return text + result["error"].splitlines()[0][:300]
    for key in ("forward", "forward_backward"):
        text += f" {key} {number(result[f'{key}_us_per_step'], '8.3f')}"
    text += f" us/step  peak {number(result['peak_mib'], '.0f')} MiB  first call {result['first_call_s']:.1f} s"
    plans = [f"{p['slices']}x({p['block_b']}x{p['block_n']}x{p['block_k']})" for p in result.get("plan", {}).values()]
    return f"{text}  {result['exchange']} {' '.join(plans)}".rstrip()


def number(value: float | None, form: str) -> str:
    """Return a number, or a dash for none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


# The parent: workers and the clock


class Lost(Exception):
    """A worker died or was killed; `at` is what it was at, by its own last word."""

    def __init__(self, at: str, reason: str) -> None:
        super().__init__(f"{reason} at {at!r}" if at else reason)
        self.at = at


class Worker:
    """A process that takes tasks as lines of JSON and answers {"at": …} on its way and {"result": …} at the end."""

    def __init__(self, command: list[str], log: pathlib.Path, environment: dict[str, str] | None = None) -> None:
        with open(log, "a") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self.messages: queue.Queue[dict | None] = queue.Queue()
        self._killed = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout, contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.messages.put(json.loads(line))
        self.messages.put(None)

    def run(self, task: Task, stall_s: float = STALL_S, deadline: float = math.inf) -> Any:
        """Run one task and return its result.

        Args:
            task: what the worker is to do.
            stall_s: how long it may say nothing.
            deadline: when it must be done, by time.monotonic().

        Raises:
            Lost: it died, fell silent, or gave itself up; the process is gone by then.
        """
        assert self.process.stdin is not None
        at = ""
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            while True:
                message = self.messages.get(timeout=max(0.0, min(stall_s, deadline - time.monotonic())))
                if message is None:
                    raise Lost(at, f"the process ended with {self.process.wait(10)}")
                if "lost" in message:
                    raise Lost(at, message["lost"])
                if "result" in message:
                    return message["result"]
                at = message["at"]
        except queue.Empty:
            late = time.monotonic() >= deadline
            self.kill()
            raise Lost(at, "out of time" if late else f"silent for {stall_s:.0f} s") from None
        # ValueError: another thread has closed the pipe.
        except (Lost, OSError, ValueError, subprocess.TimeoutExpired) as error:
            self.kill()
            raise error if isinstance(error, Lost) else Lost(at, f"{type(error).__name__}: {error}") from None

    def kill(self) -> None:
        """End the process and its children, whatever they are at."""
        # Once only: its number may be another process's by now.
        if self._killed:
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        # A process that the driver holds on to is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


class Compilers:
    """Workers that compile side by side, first task first, until none is left or `stop` is called."""

    def __init__(self, tasks: list[Task], count: int, start: Callable[[], Worker]) -> None:
        self.seconds: dict[str, float] = {}
        self._tasks, self._stopped = collections.deque(tasks), False
        self._workers: list[Worker] = []
        self._threads = [threading.Thread(target=self._work, args=(start,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self, start: Callable[[], Worker]) -> None:
        worker = None
        while not self._stopped:
            try:
                task = self._tasks.popleft()
            except IndexError:
                break
            if worker is None:
                worker = start()
                self._workers.append(worker)
            # Looked at after the worker is where `stop` finds it.
            if self._stopped:
                break
            try:
                result = worker.run(task, 2 * STALL_S)
            except Lost:
                worker = None
                continue
            if "seconds" in result:
                self.seconds[task["name"]] = result["seconds"]
        if worker is not None:
            worker.kill()

    def busy(self) -> bool:
        """Return whether any of them still works."""
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """End all of them."""
        self._stopped = True
        for worker in self._workers:
            worker.kill()


def failed(task: Task, reason: str, at: str = "") -> list[dict]:
    """Return the results of a task that has none: a check, or a row for each entry that `at` names (all if none)."""
    if task["kind"] == "check":
        how = {key: task[key] for key in ("name", "dtype", "pins")}
        return [dict(how, shape=shape_of(task["problem"]), error=None, bound=None, ok=False, message=reason)]
    lost = [e for e in task["entries"] if entry_name(e) == at] or task["entries"]
    return [dict(row_head(task, e), error=reason) for e in lost]


def shape_of(problem: dict) -> list[int]:
    """Return [T, B, I, H] of a check."""
    return [problem[key] for key in ("steps", "batch")] + [problem.get("inputs_size", 3), problem["hidden"]]


def row_head(task: Task, entry: Task) -> dict:
    """Return the part of a row that is known before it runs."""
    head = {key: entry[key] for key in ("layer", "dtype", "pins")}
    return dict(head, exchange=None, **{key: task[key] for key in ("hidden", "batch", "steps")})


class Run:
    """One run of the script: the report so far, and the worker in use."""

    def __init__(self, out_dir: pathlib.Path, device: str, seconds: float, jobs: int) -> None:
        self.began = time.monotonic()
        self.out_dir, self.device, self.seconds, self.jobs = out_dir, device, seconds, jobs
        self.report: dict[str, Any] = dict(environment={}, checks=[], rows=[], unfinished=[])
        self.path = out_dir / "report.json"
        self.environment = dict(os.environ)
        self.environment.pop("TRITON_INTERPRET", None)
        if device == "cpu":
            self.environment["TRITON_INTERPRET"] = "1"
        self.worker: Worker | None = None
        self.group: tuple | None = None

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.began + self.seconds - time.monotonic()

    def start(self) -> Worker:
        """Start a worker."""
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--serve", self.device]
        return Worker(command, self.out_dir / "workers.log", self.environment)

    def do(self, task: Task, stall_s: float = STALL_S) -> Any:
        """Run a task in the worker of its group, a new one if the last task was another group's."""
        group = (task["kind"], task.get("core"))
        if self.worker is not None and self.group != group:
            self.drop()
        self.group = group
        self.worker = self.worker or self.start()
        try:
            return self.worker.run(task, stall_s, self.began + self.seconds)
        except Lost:
            self.worker = None
            raise

    def drop(self) -> None:
        """End the worker, if there is one."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def record(self, results: list[dict]) -> None:
        """Print results, add them to the report and write it."""
        for result in results:
            self.report["checks" if "ok" in result else "rows"].append(result)
            print(line_of(result), flush=True)
        self.save()

    def save(self) -> None:
        """Write the report."""
        self.report["elapsed_s"] = round(time.monotonic() - self.began, 1)
        write_json(self.path, self.report)

    def go(self, tasks: list[Task]) -> int:
        """Run the tasks while the time lasts and return the exit code."""
        try:
            environment = self.do(dict(kind="environment"))
        except Lost as lost:
            environment = dict(failure=str(lost))
        if "failure" in environment:
            print(f"gpu.py: {environment['failure']}", file=sys.stderr)
            return 2
        for key, value in environment.items():
            print(f"{key}: {value}", flush=True)
        self.path = self.out_dir / f"{slug(environment['device'])}.json"
        self.report["environment"] = environment
        self.report["how"] = (
            "times: CUDA events around single calls, median; layers of a comparison take turns; L2 not flushed; input "
            "product included. peak_mib: of forward and backward, gradients included, beyond parameters, x and dy. "
            "error: largest deviation from float64, relative to the array's largest magnitude; bound: twice that of "
            "the eager loop in the same dtype, plus the dtype's floor"
        )
        self.save()
        # The interpreter compiles nothing.
        wanted = compilations(tasks) if self.device == "cuda" else []
        compilers = Compilers(wanted, min(self.jobs, len(wanted)), self.start)
        try:
            self._work_off(list(tasks), compilers)
        finally:
            compilers.stop()
            self.drop()
            self.report["compile_s"] = compilers.seconds
            self.save()
        bad = [c["name"] for c in self.report["checks"] if not c["ok"]]
        errors = sum("error" in row for row in self.report["rows"])
        print(
            f"{len(self.report['checks'])} checks, {len(bad)} failed; {len(self.report['rows'])} rows, {errors} failed"
        )
        print(f"{len(self.report['unfinished'])} tasks unfinished; {self.report['elapsed_s']:.0f} s; {self.path}")
        return 1 if bad else 0

    def _work_off(self, pending: list[Task], compilers: Compilers) -> None:
        compile_until = self.began + COMPILE_SHARE * self.seconds
        while pending:
            compiling = compilers.busy() and time.monotonic() < compile_until
            if not compiling:
                compilers.stop()
            task = next_task(pending, compiling)
            if task is None:
                time.sleep(0.2)
                continue
            if self.left() < least_seconds(task):
                break
            # Unfinished until its results are there.
            self.report["unfinished"] = [t["name"] for t in pending]
            position = pending.index(task)
            del pending[position]
            try:
                result = self.do(task, task.get("stall_s", STALL_S))
            except Lost as lost:
                if self.left() <= 0:
                    pending.insert(position, task)
                    break
                rest = without_lost(task, lost.at)
                self.record(failed(task, str(lost), lost.at if rest else ""))
                if rest:
                    pending.insert(position, rest)
            else:
                self.record(failed(task, result["failure"]) if "failure" in result else result["results"])
        self.report["unfinished"] = [task["name"] for task in pending]


# The worker: everything below runs in a process of its own


@functools.lru_cache
def library() -> types.SimpleNamespace:
    """Import torch and, from this checkout and nowhere else, the library and the tests' problems.

    sys.path stays as it is: the folder `kernels` of the checkout must not hide the package of that name.
    """
    import torch

    folders = {"novolstm_triton": ROOT / "novolstm_triton", "novolstm_triton.kernels": ROOT / "kernels"}
    for name, folder in folders.items():
        _load(name, folder / "__init__.py", [str(folder)])
    problems = _load("novolstm_problems", ROOT / "tests" / "problems.py", None)
    from novolstm_triton import launch, plan

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    return types.SimpleNamespace(torch=torch, problems=problems, launch=launch, plan=plan, dtypes=dtypes)


def _load(name: str, path: pathlib.Path, folders: list[str] | None) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def serve(device: str) -> None:
    """Answer tasks until the input ends; see Worker."""
    channel = os.fdopen(os.dup(1), "w")
    # Whatever else prints goes to the log.
    os.dup2(2, 1)

    def send(message: dict) -> None:
        channel.write(json.dumps(finite(message)) + "\n")
        channel.flush()

    def announce(at: str) -> None:
        send({"at": at})

    for line in sys.stdin:
        task = json.loads(line)
        handlers = dict(environment=describe, compile=compile_ahead, check=run_check, rows=run_rows)
        try:
            result = handlers[task["kind"]](task, device, announce)
        except Exception as error:
            traceback.print_exc()
            result = dict(failure=f"{type(error).__name__}: {error}")
            if lost := unusable(device):
                send({"lost": f"{result['failure'].splitlines()[0]}; then {lost}"})
                return
        send({"result": result})
        gc.collect()
        if device == "cuda" and task["kind"] != "environment":
            library().torch.cuda.empty_cache()


def unusable(device: str) -> str:
    """Return what keeps the GPU from going on after an error; empty if nothing does."""
    try:
        synchronize(device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda" and library().torch.cuda.is_available():
        library().torch.cuda.synchronize()


def allocated(device: str) -> int:
    """Return the bytes in use on the GPU."""
    return library().torch.cuda.memory_allocated() if device == "cuda" else 0


def describe(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Return the environment of the run."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return dict(failure="no CUDA device; --device cpu runs a smoke test of this script in Triton's interpreter")
    import triton

    lib = library()
    settings = dict(
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        matmul_allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        matmul_allow_bf16_reduced_precision_reduction=torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        matmul_allow_fp16_reduced_precision_reduction=torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        cudnn_allow_tf32=torch.backends.cudnn.allow_tf32,
        l2_flushed=False,
    )
    software = dict(torch=torch.__version__, triton=triton.__version__, python=platform.python_version())
    software["cpus"] = os.cpu_count()
    if device == "cpu":
        return dict(device="cpu-interpreter", driver=None, cudnn=None, multiprocessors=1, **software, **settings)
    properties = torch.cuda.get_device_properties(0)
    plan_device = lib.launch._device(torch.device("cuda", 0))
    return dict(
        device=properties.name,
        driver=nvidia_smi("driver_version"),
        nvidia_smi=nvidia_smi(
            "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
        ),
        **software,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        arch=plan_device.arch,
        multiprocessors=properties.multi_processor_count,
        smem_bytes=plan_device.smem_bytes,
        total_memory_mib=properties.total_memory >> 20,
        **settings,
    )


def nvidia_smi(fields: str) -> str | None:
    """Return what nvidia-smi says of the first GPU; None without one."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def pinned(pins: dict) -> Iterator[None]:
    """Pin the plan, in backward, too: it runs in a thread of autograd's own unless that is switched off."""
    lib = library()
    with contextlib.ExitStack() as stack:
        if pins:
            stack.enter_context(lib.plan.forced(**pins))
            stack.enter_context(lib.torch.autograd.set_multithreading_enabled(False))
        yield


def plans_of(hidden: int, batch: int, dtype: Any, device: str, variant: str) -> dict[str, dict]:
    """Return the plan in force, as dictionaries for forward and backward."""
    lib = library()
    x = lib.torch.empty(1, batch, 1, dtype=dtype, device=device)
    return dataclasses.asdict(lib.launch.launch_plan(x, hidden, lib.launch.CELLS[variant]))


def compile_ahead(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Compile what a layer launches into Triton's cache on disk, launching none of it."""
    from triton.runtime.jit import JITFunction

    lib = library()
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    problem = lib.problems.Problem(steps=2, device=device, **task["problem"])
    began = time.monotonic()
    JITFunction.run = only_compile
    try:
        with pinned(task["pins"]):
            problem.run("triton", lib.dtypes[task["dtype"]])
    finally:
        JITFunction.run = run
    return dict(seconds=round(time.monotonic() - began, 2))


def run_check(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Run a check of any kind and return its record."""
    lib = library()
    began = time.monotonic()
    problem = lib.problems.Problem(device=device, **task["problem"])
    dtype = lib.dtypes[task["dtype"]]
    tests = dict(exact=check_exact, repeat=check_repeat, growth=check_growth, long=check_long)
    with pinned(task["pins"]):
        plans = plans_of(problem.hidden, problem.batch, dtype, device, problem.variant)
        outcome = tests[task["test"]](problem, dtype, task, announce)
    record = {key: task[key] for key in ("name", "dtype", "pins")}
    record |= dict(shape=shape_of(task["problem"]), **outcome)
    # Not below the bound, rather than above it: NaN fails.
    record["ok"] = bool(record["error"] <= record["bound"])
    return dict(results=[record | dict(plan=plans, seconds=round(time.monotonic() - began, 2))])


def compare(problem: Any, result: dict, dtype: Any, truth: dict, bounds: dict) -> dict:
    """Return the error, and its bound, of the array that comes closest to its bound or exceeds it."""

    def nearness(pair: tuple[float, float]) -> float:
        # NaN is as near as can be.
        return pair[0] / pair[1] if math.isfinite(pair[0]) else math.inf

    arrays = {}
    for name, pair in library().problems.errors(result, truth).items():
        # The largest error or the root mean square, whichever is nearer to its bound.
        arrays[name] = max(zip(pair, bounds[name], strict=True), key=nearness)
    worst = max(arrays, key=lambda name: nearness(arrays[name]))
    return dict(error=arrays[worst][0], bound=arrays[worst][1], detail=f"({worst})", arrays=arrays)


def check_exact(problem: Any, dtype: Any, task: Task, announce: Callable[[str], None]) -> dict:
    """Compare outputs and every gradient with the float64 reference."""
    lib = library()
    announce("triton")
    result = problem.run("triton", dtype)
    synchronize(problem.device)
    announce("reference")
    truth = problem.run("reference", lib.torch.float64, rounded=dtype)
    announce("eager")
    return compare(problem, result, dtype, truth, lib.problems.bounds(problem, dtype, truth))


def check_repeat(problem: Any, dtype: Any, task: Task, announce: Callable[[str], None]) -> dict:
    """Count the arrays that differ in any bit between the first of five runs and the others."""
    first, different = None, 0
    for number in range(5):
        announce(f"run {number}")
        result = problem.run("triton", dtype)
        synchronize(problem.device)
        if first is None:
            first = result
        different += sum(not library().torch.equal(result[name], first[name]) for name in first)
    finite_results = all(bool(a.isfinite().all()) for a in first.values())
    return dict(
        error=float(different) if finite_results else math.nan, bound=0.0, detail="arrays differ in 4 repetitions"
    )


def check_growth(problem: Any, dtype: Any, task: Task, announce: Callable[[str], None]) -> dict:
    """Measure by how many bytes twenty calls change the memory in use."""
    sizes = []
    for number in range(23):
        announce(f"run {number}")
        problem.run("triton", dtype)
        gc.collect()
        sizes.append(allocated(problem.device))
    return dict(error=float(abs(sizes[-1] - sizes[2])), bound=0.0, detail="bytes more after 20 calls")


def check_long(problem: Any, dtype: Any, task: Task, announce: Callable[[str], None]) -> dict:
    """Compare the last steps of a long sequence, and dx there, with the reference from the carried state on.

    The state carried is the kernels' own, of the sequence without its tail; the first steps are compared as well.
    """
    lib = library()
    from novolstm_triton.functional import novolstm

    tail = min(128, problem.steps // 2)
    inputs, _, _ = dataclasses.replace(problem, steps=1).draw()
    generator = lib.torch.Generator().manual_seed(1)
    inputs[0] = lib.torch.randn(problem.steps, problem.batch, problem.inputs_size, generator=generator)
    x, *others = (a.to(problem.device, dtype) for a in inputs)
    dy = lib.torch.randn(tail, problem.batch, problem.hidden, generator=generator).to(problem.device, dtype)

    def head_and_tail(x: Any, arguments: list, backend: str) -> dict:
        x = x.detach().requires_grad_()
        y, _, _ = novolstm(x, *arguments, gate_gain=problem.gate_gain, backend=backend)
        y[-tail:].backward(dy.to(x.dtype))
        return {"y": y[-tail:].detach(), "dx": x.grad[-tail:]} | ({"head": y[:tail].detach()} if len(x) > tail else {})

    announce("triton")
    result = head_and_tail(x, others, "triton")
    with lib.torch.no_grad():
        _, h, c = novolstm(x[:-tail], *others, gate_gain=problem.gate_gain, backend="triton")
    synchronize(problem.device)

    def short(dtype: Any) -> dict:
        announce(f"reference {dtype}")
        carried = [a.to(dtype) for a in (h, c, *others[2:])]
        start = [a.to(dtype) for a in others]
        end = head_and_tail(x[-tail:].to(dtype), carried, "reference")
        return end | {"head": head_and_tail(x[:tail].to(dtype), start, "reference")["y"]}

    truth = short(lib.torch.float64)
    floor = lib.problems.FLOORS[dtype]
    eager = lib.problems.errors(short(dtype), truth)
    bounds = {name: tuple(2 * e + floor for e in pair) for name, pair in eager.items()}
    return compare(problem, result, dtype, truth, bounds)


class Timed:
    """A layer with its input and output gradient, ready to be timed."""

    def __init__(self, task: Task, entry: Task, device: str) -> None:
        lib = library()
        torch, dtype = lib.torch, lib.dtypes[entry["dtype"]]
        self.name, self.pins, self.device = entry_name(entry), entry["pins"], device
        self.row = row_head(task, entry)
        hidden, batch, steps = task["hidden"], task["batch"], task["steps"]
        torch.manual_seed(0)
        where = dict(device=device, dtype=dtype)
        if entry["layer"] == "nn.LSTM":
            self.layer = torch.nn.LSTM(hidden, hidden, **where)
        else:
            from novolstm_triton import NovoLSTM

            backend = "triton" if entry["layer"] == "novolstm" else "reference"
            self.layer = NovoLSTM(hidden, hidden, gate_gain="hidden", backend=backend, **where)
        if entry["layer"] == "novolstm":
            with pinned(self.pins):
                self.row["plan"] = plans_of(hidden, batch, dtype, device, "formula")
            self.row["exchange"] = self.row["plan"]["forward"]["exchange"]
        self.call = torch.compile(self.layer) if entry["layer"] == "compiled" else self.layer
        self.x = torch.randn(steps, batch, hidden, **where).requires_grad_()
        self.dy = torch.randn(steps, batch, hidden, **where)

    def forward(self) -> None:
        """Run the layer for its output alone."""
        self.layer.eval()
        with library().torch.no_grad():
            self.call(self.x)

    def forward_backward(self) -> None:
        """Run the layer, then the gradients of its parameters and its input."""
        self.layer.train()
        self.clear()
        self.call(self.x)[0].backward(self.dy)

    def clear(self) -> None:
        """Free the gradients."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def prepare(self) -> None:
        """Make the first calls, which compile, and measure the peak of memory in a later one."""
        lib = library()
        began = time.monotonic()
        with pinned(self.pins):
            self.forward()
            self.forward_backward()
            synchronize(self.device)
            self.row["first_call_s"] = round(time.monotonic() - began, 2)
            self.row["peak_mib"] = None
            if self.device == "cuda":
                self.clear()
                lib.torch.cuda.reset_peak_memory_stats()
                baseline = lib.torch.cuda.memory_allocated()
                self.forward_backward()
                synchronize(self.device)
                self.row["peak_mib"] = round((lib.torch.cuda.max_memory_allocated() - baseline) / 2**20, 2)

    def time_ms(self, passes: str) -> float:
        """Time one call of `forward` or `forward_backward`."""
        function = getattr(self, passes)
        with pinned(self.pins):
            if self.device != "cuda":
                began = time.perf_counter()
                function()
                return (time.perf_counter() - began) * 1e3
            cuda = library().torch.cuda
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            cuda.synchronize()
            start.record()
            function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)


def run_rows(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Time the entries of a task in turn; one that raises becomes a row with an error, and the others go on."""
    done, ready = [], []
    for entry in task["entries"]:
        announce(entry_name(entry))
        try:
            timed = Timed(task, entry, device)
            if timed.pins and any(timed.row.get("plan") == other.row.get("plan") for other in ready):
                # What the plan chooses by itself is being timed already.
                continue
            timed.prepare()
            ready.append(timed)
        except Exception as error:
            if unusable(device):
                raise
            traceback.print_exc()
            done.append(dict(row_head(task, entry), error=f"{type(error).__name__}: {error}"))
    for passes in ("forward", "forward_backward") if ready else ():
        first_ms = []
        for timed in ready:
            announce(timed.name)
            timed.time_ms(passes)
            first_ms.append(timed.time_ms(passes))
        # About 0.4 s for each, in turns.
        rounds = task.get("rounds") or min(30, max(5, int(400 * len(ready) / sum(first_ms))))
        times_ms: dict[str, list[float]] = {timed.name: [] for timed in ready}
        for number in range(rounds):
            for timed in ready[:: 1 if number % 2 else -1]:
                announce(timed.name)
                times_ms[timed.name].append(timed.time_ms(passes))
        for timed in ready:
            timed.row[f"{passes}_us_per_step"] = statistics.median(times_ms[timed.name]) * 1e3 / task["steps"]
            timed.row[f"{passes}_least_us_per_step"] = min(times_ms[timed.name]) * 1e3 / task["steps"]
            timed.row[f"{passes}_calls"] = rounds
    return dict(results=[timed.row for timed in ready] + done)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def main() -> int:
    """Run the script: 0 if every check passed, 1 if one failed, 2 for bad arguments or no device."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=pathlib.Path, help="where the JSON file goes")
    parser.add_argument("--seconds", type=_seconds, default=500.0, help="time for everything (default: 500)")
    default = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="cpu: smoke test in the interpreter")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes that compile")
    arguments = parser.parse_args()
    try:
        arguments.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"OUT_DIR: {error}")
    # A signal, too, ends the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = None
    if "TRITON_CACHE_DIR" not in os.environ:
        cache = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="novolstm-gpu-")
    run = Run(arguments.out_dir, arguments.device, arguments.seconds, arguments.jobs)
    try:
        return run.go(all_tasks() if arguments.device == "cuda" else smoke_tasks())
    finally:
        run.drop()
        if cache:
            shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
