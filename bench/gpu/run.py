"""The whole run: tasks in their order, their results in the report, and its command line."""

import argparse
import importlib.util
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

from . import __doc__ as ABOUT
from .processes import STALL_S, Compilers, Lost, Worker
from .results import failed, line_of, slug, write_json
from .tasks import (
    ROOFLINE_CONSTANTS,
    Task,
    all_tasks,
    compilations,
    least_seconds,
    next_task,
    smoke_tasks,
    with_bounded_waits,
    without_lost,
)

COMPILE_SHARE = 0.38
"""Share of the time after which timing starts whether or not everything is compiled."""


class Run:
    """One run of the script: the report so far, and the worker in use."""

    def __init__(self, out_dir: pathlib.Path, device: str, seconds: float, jobs: int) -> None:
        self.began = time.monotonic()
        self.out_dir, self.device, self.seconds, self.jobs = out_dir, device, seconds, jobs
        self.report: dict[str, Any] = dict(environment={}, checks=[], rows=[], micro=[], unfinished=[])
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
        command = [sys.executable, str(pathlib.Path(__file__).resolve().parent), "--worker", self.device]
        return Worker(command, self.out_dir / "workers.log", self.environment)

    def do(self, task: Task, stall_s: float = STALL_S) -> Any:
        """Run a task in the worker of its group, a new one if the last task was another group's."""
        # Memory is measured in the process that times: it does no harm there, and a process takes seconds to start.
        group = ("rows" if task["kind"] == "memory" else task["kind"], task.get("core"))
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
            kind = "checks" if "ok" in result else "micro" if "constant" in result else "rows"
            self.report[kind].append(result)
            print(line_of(result), flush=True)
        self.save()

    def constants(self) -> dict[str, Any]:
        """Return the constants of the roofline that have been measured on this device."""
        measured = {result["constant"]: result["value"] for result in self.report["micro"]}
        # Of programs that share nothing with another's timer a difference may be zero or less: no measurement.
        return {name: measured[name] for name in ROOFLINE_CONSTANTS if name in measured and _positive(measured[name])}

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
            print(f"gpu.sh: {environment['failure']}", file=sys.stderr)
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
            try:
                constants = dict(constants=self.constants()) if task["kind"] == "rows" else {}
                result = self.do(task | constants, task.get("stall_s", STALL_S))
            except Lost as lost:
                if self.left() <= 0:
                    break
                rest = without_lost(task, lost.at)
                results = failed(task, str(lost), lost.at if rest else "")
                rest = rest or with_bounded_waits(task, str(lost))
            else:
                rest = None
                results = failed(task, result["failure"]) if "failure" in result else result["results"]
            position = pending.index(task)
            pending[position : position + 1] = [rest] if rest else []
            self.record(results)
        self.report["unfinished"] = [task["name"] for task in pending]


def _positive(value: Any) -> bool:
    return all(_positive(v) for v in value.values()) if isinstance(value, dict) else 0 < value < math.inf


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def has_flashrnn() -> bool:
    """Tell whether FlashRNN can be imported."""
    return importlib.util.find_spec("flashrnn") is not None


def main() -> int:
    """Run the script: 0 if every check passed, 1 if one failed, 2 for bad arguments or no device."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=ABOUT.splitlines()[0])
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
        return run.go(all_tasks(has_flashrnn()) if arguments.device == "cuda" else smoke_tasks())
    finally:
        run.drop()
        if cache:
            shutil.rmtree(cache, ignore_errors=True)
