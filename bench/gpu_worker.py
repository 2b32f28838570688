"""The process in which gpu.py's tasks run: `python gpu_worker.py DEVICE`; see gpu_processes.Worker."""

import gc
import importlib
import json
import os
import sys
import traceback

from gpu_device import free, unusable

HANDLERS = {
    "environment": ("gpu_device", "describe"),
    "compile": ("gpu_library", "compile_ahead"),
    "check": ("gpu_checks", "run_check"),
    "rows": ("gpu_timing", "run_rows"),
    "memory": ("gpu_timing", "run_memory"),
    "micro": ("gpu_micro", "run_micro"),
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
            handler = getattr(importlib.import_module(module), function)
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


if __name__ == "__main__":
    serve(sys.argv[1])
