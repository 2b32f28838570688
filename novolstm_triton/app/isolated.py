"""Function calls in a process of their own: one that hangs or crashes fails alone, and the caller goes on.

The process is `python -m novolstm_triton.app.isolated MODULE`. It takes calls of that module's functions as lines of
JSON, {"function": …, "arguments": {…}}, and answers each with {"result": …} or {"failure": …}.
"""

import contextlib
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any


class CallError(Exception):
    """The function raised, its process died, or it did not answer in time; the message is one line."""


class Isolated:
    """The functions of a module, called in a process that starts with the first call and again after each failure.

    Args:
        module: name of the module.
        command: what is run instead, for a process that speaks the same protocol.
    """

    def __init__(self, module: str, command: Sequence[str] | None = None) -> None:
        self._command = command or [sys.executable, "-m", "novolstm_triton.app.isolated", module]
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def call(self, function: str, timeout_s: float, **arguments: Any) -> Any:
        """Call a function, whose arguments and result are JSON values, and return its result.

        Raises:
            CallError: the function raised, its process died, or it took longer than `timeout_s`. The process has ended.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(dict(function=function, arguments=arguments)) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.end()
            raise CallError(f"no answer within {timeout_s:g} s") from None
        except OSError:
            line = None
        if line is None:
            raise CallError(self._last_words(process))
        answer = json.loads(line)
        if "failure" in answer:
            # After a failure on a GPU, no further result of that process can be trusted.
            self.end()
            raise CallError(answer["failure"])
        return answer["result"]

    def end(self) -> None:
        """End the process and its children, whatever they are doing."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        # A process that the driver holds on to is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> "Isolated":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.end()

    def _start(self) -> None:
        # Open as long as the process lives.
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        # In a session of its own: Ctrl-C is for the caller, who ends it.
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        self._process = subprocess.Popen(self._command, text=True, start_new_session=True, **pipes)
        self._answers = queue.Queue()
        threading.Thread(target=_listen, args=(self._process, self._answers), daemon=True).start()

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        lines: list[str] = []
        if self._log is not None:
            self._log.seek(0)
            lines = self._log.read().split("\n")
        words = next((line for line in reversed(lines) if line.strip()), "")
        self.end()
        return f"its process ended with {process.returncode}" + (f": {words.strip()}" if words else "")


def _listen(process: subprocess.Popen[str], answers: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout, contextlib.suppress(ValueError):
        for line in process.stdout:
            answers.put(line)
    answers.put(None)


def serve(module: str) -> None:
    """Answer calls until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    # Whatever else prints must not be taken for an answer.
    os.dup2(2, 1)
    functions = importlib.import_module(module)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = dict(result=getattr(functions, call["function"])(**call["arguments"]))
        except Exception as error:
            answer = dict(failure=" ".join(f"{type(error).__name__}: {error}".split())[:500])
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
        gc.collect()


if __name__ == "__main__":
    serve(sys.argv[1])
