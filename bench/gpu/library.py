"""The library of this checkout and of nowhere else, for the workers.

sys.path stays as it is: the folder `kernels` of the checkout must not hide the package of that name.
"""

import dataclasses
import importlib.util
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from .tasks import Task

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def _load(name: str, path: pathlib.Path) -> types.ModuleType:
    """Import a file, or a folder as a package, under a name."""
    folders = [str(path)] if path.is_dir() else None
    file = path / "__init__.py" if folders else path
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


novolstm_triton = _load("novolstm_triton", ROOT / "novolstm_triton")
_load("novolstm_triton.kernels", ROOT / "kernels")
launch = importlib.import_module("novolstm_triton.engines.launch")
problems = importlib.import_module("novolstm_triton.problems")
# These import the library.
layers = importlib.import_module("layers")
claims = importlib.import_module(".claims", __package__)
pinned, DTYPES = layers.pinned, layers.DTYPES

torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False


def plans_of(hidden: int, batch: int, dtype: Any, device: str, cell: str) -> dict[str, dict]:
    """Return the plan in force, as dictionaries for forward and backward."""
    x = torch.empty(1, batch, 1, dtype=dtype, device=device)
    return dataclasses.asdict(launch.launch_plan(x, hidden, cell))


def compile_ahead(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Compile what a layer launches into Triton's cache on disk, launching none of it."""
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    problem = problems.Problem(steps=2, device=device, **task["problem"])
    began = time.monotonic()
    JITFunction.run = only_compile
    try:
        with pinned(task["pins"]):
            problem.run("triton", DTYPES[task["dtype"]])
    finally:
        JITFunction.run = run
    return dict(seconds=round(time.monotonic() - began, 2))
