"""Processes that work for a run: one can be killed at any time, and several compile side by side."""

import collections
import contextlib
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from .tasks import Task

STALL_S = 60.0
"""How long a worker may say nothing: longer than any compilation takes."""


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
                    reason = f"the process ended with {self.process.wait(10)}"
                    break
                if "lost" in message:
                    reason = message["lost"]
                    break
                if "result" in message:
                    return message["result"]
                at = message["at"]
        except queue.Empty:
            reason = "out of time" if time.monotonic() >= deadline else f"silent for {stall_s:.0f} s"
        # ValueError: another thread has closed the pipe.
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            reason = f"{type(error).__name__}: {error}"
        self.kill()
        raise Lost(at, reason)

    def kill(self) -> None:
        """End the process and its children, whatever they are doing."""
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
