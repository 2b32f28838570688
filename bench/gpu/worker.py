"""The process in which the tasks run: `python bench/gpu --worker DEVICE`; see processes.Worker."""

import gc
import importlib
import json
import os
import sys
import traceback

from .device import free, unusable

HANDLERS = {
    "environment": ("device", "describe"),
    "compile": ("library", "compile_ahead"),
    "check": ("checks", "run_check"),
    "rows": ("timing", "run_rows"),
    "memory": ("timing", "run_memory"),
    "micro": ("micro", "run_micro"),
}
"""For each kind of task the module, imported when first needed, and the function."""


def serve(device: str) -> None:
    """Answer tasks until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    # Whatever else prints goes to the log.
    os.dup2(2, 1)

    def send(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    for line in sys.stdin:
        task = json.loads(line)
        try:
            module, function = HANDLERS[task["kind"]]
            handler = getattr(importlib.import_module(f".{module}", __package__), function)
            result = handler(task, device, lambda at: send({"at": at}))
        except Exception as error:
            traceback.print_exc()
            result = dict(failure=f"{type(error).__name__}: {error}")
            if lost := unusable(device):
                send({"lost": f"{result['failure'].splitlines()[0]}; then {lost}"})
                return
        send({"result": result})
        gc.collect()
        free(device)
