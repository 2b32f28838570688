"""Interprets the kernels, whose variable must be set before triton is imported; chooses the cases of a quick run."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from .support.selection import mark_the_rest

# The tests' tensors are small: a second thread only adds its wake-up to every operation.
torch.set_num_threads(1)


def pytest_addoption(parser):
    help = "run all cases, not only the quick run's; with `-m exhaustive` all others than the quick run's"
    parser.addoption("--exhaustive", action="store_true", help=help)


def pytest_configure(config):
    # Tests of one group share what is costly to make.
    if getattr(config.option, "dist", None) == "load":
        config.option.dist = "loadgroup"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    mark_the_rest(items)
    if not config.getoption("exhaustive"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
