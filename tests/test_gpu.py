"""What only a GPU can show: the kernels' results there, CUDA graphs, no waiting for the device, and peak memory.

Skipped without one. The suite interprets the kernels, so these run in a process that does not, killed where it
hangs. `bash bench/gpu.sh OUT_DIR` checks this and more, and measures.
"""

import dataclasses
import os
import pathlib

import pytest
import torch

from novolstm_triton import plan
from novolstm_triton.app.isolated import CallError, Isolated

from .support.problems import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BENCH = pathlib.Path(__file__).resolve().parent.parent / "bench"
PROBLEMS = {
    "H512": Problem(64, 16, 512, inputs_size=512),
    "H128-lengths": Problem(40, 5, 128, inputs_size=64, lengths=True),
    "H256-notebook": Problem(33, 33, 256, cell="notebook", reverse=True),
}
CHOICES = {"default": {}} | {name: dict(exchange=name) for name in plan.EXCHANGES}


@pytest.fixture(scope="module")
def compiled():
    """Return a process with the functions of bench/gpu/claims.py, in which Triton compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]))
        with Isolated("gpu.claims") as process:
            yield process


def measure(process: Isolated, claim: str, problem: Problem, pins: dict) -> float:
    """Return a claim's figure; skip where the device allows no such plan."""
    fields = dataclasses.asdict(problem)
    del fields["device"]
    try:
        return process.call("measure", 240.0, claim=claim, problem=fields, dtype="bf16", pins=pins)
    except CallError as error:
        # A plan that the device refuses.
        if pins and str(error).startswith("ValueError"):
            pytest.skip(f"refused: {error}")
        raise


claims = pytest.mark.parametrize(
    ("problem", "pins"),
    [
        pytest.param(problem, pins, id=f"{size}-{choice}")
        for size, problem in PROBLEMS.items()
        for choice, pins in CHOICES.items()
    ],
)


@claims
def test_as_exact_as_eager(compiled, problem, pins):
    # In units of the bound.
    assert measure(compiled, "exact", problem, pins) <= 1


@claims
def test_graph_replays_the_same_bits(compiled, problem, pins):
    assert measure(compiled, "graph", problem, pins) == 0


@claims
def test_never_waits_for_the_device(compiled, problem, pins):
    # A wait raises.
    measure(compiled, "nosync", problem, pins)


def test_peak_memory_against_nn_lstm(compiled):
    # In units of the bound.
    assert measure(compiled, "memory", Problem(8192, 64, 512, inputs_size=512), {}) <= 1
