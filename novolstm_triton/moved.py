"""Old names of this package's modules: a script or a pickle that imports one gets the module that has its place now."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "bptt": "engines.bptt",
    "bytemodel": "app.bytemodel",
    "doctor": "app.doctor",
    "environment": "app.environment",
    "isolated": "app.isolated",
    "keras_files": "weights.keras_files",
    "keras_weights": "weights.keras",
    "launch": "engines.launch",
    "measure": "app.measure",
    "model_copy": "convert.copies",
    "module": "",
    "onnx_export": "engines.onnx",
    "plan": "plans",
    "ragged": "layers.ragged",
    "recurrent": "layers.recurrent",
    "reference": "engines.reference",
    "references": "convert.references",
    "regularisers": "layers.regularisers",
    "sample_gradients": "layers.per_sample",
    "single_step": "",
    "streams": "engines.streams",
    "text": "app.text",
    "torch_lstm": "layers.torch_lstm",
    "train": "app.train",
    "tune": "app.tune",
    "tuned": "plans.tuned",
}
"""New names by old ones, both within this package."""


class _Finder(MetaPathFinder, Loader):
    """Finds modules under their old names, after all other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        # The import system returns what stands here afterwards.
        sys.modules[module.__name__] = importlib.import_module(f".{MOVED[name]}", package)


def install() -> None:
    """Let imports find the old names."""
    sys.meta_path.append(_Finder())


def attribute(name: str) -> ModuleType:
    """Return the module of an old name: `__getattr__` of the package, in which imported modules are attributes.

    Raises:
        AttributeError: there never was such a module.
    """
    if name not in MOVED:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__package__}.{name}")
