"""The package transformers, for the tests that put a layer into one of its models."""

import pathlib
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def transformers() -> Any:
    """Import transformers, which would take the checkout's folder `kernels` for the package of that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
        import transformers

        # Its names are imported when they are first asked for.
        assert transformers.PreTrainedModel
        assert transformers.EncodecModel
    return transformers
