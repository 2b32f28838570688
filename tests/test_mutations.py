"""Every synchronisation in the kernels is needed, and the tests see when one is gone: remove each in turn and look."""

import dataclasses
import importlib.util
import pathlib
import re
import sys

import pytest
import torch

import novolstm_triton.kernels
from novolstm_triton import launch, plan
from novolstm_triton.kernels import backward, exchange, forward

from .cooperative import GridError, cooperative
from .problems import Problem, assert_as_exact_as_eager

KERNELS = {"forward": forward, "backward": backward, "exchange": exchange}
FILES = {name: pathlib.Path(novolstm_triton.kernels.__path__[0], f"{name}.py") for name in KERNELS}
SYNCHRONISATION = re.compile(r"^\s+(arrive\(|wait\(|arrivals \+= |tl\.debug_barrier|tl\.atomic_add)")
PROBLEM = Problem(steps=4, batch=3, hidden=8)
# With the exchanges of a step in backward: a plain LSTM has one anyway.
RUNS = [(PROBLEM, 2), (PROBLEM, 1), (dataclasses.replace(PROBLEM, cell="lstm"), None)]


def removals() -> list:
    """List one mutation per line that synchronises, and one per memory order of an atomic: (file, line, new text)."""
    found = []
    for name, file in FILES.items():
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            indent = line[: len(line) - len(line.lstrip())]
            where = f"{name}-{number + 1}-{line.strip().split('(')[0].replace(' ', '')}"
            if SYNCHRONISATION.match(line):
                found.append(pytest.param(name, number, indent + "pass", id=where))
            weaker = re.sub('sem="(acquire|release)"', 'sem="relaxed"', line)
            if weaker != line:
                found.append(pytest.param(name, number, weaker, id=f"{where}-relaxed"))
    return found


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Return a function that loads a kernel file with one line replaced, and launches that copy from then on."""

    def load(name: str, number: int, text: str) -> None:
        lines = FILES[name].read_text().splitlines()
        lines[number] = text
        path = tmp_path / f"{name}.py"
        path.write_text("\n".join(lines) + "\n")
        full_name = f"novolstm_triton.kernels.mutant_{name}"
        spec = importlib.util.spec_from_file_location(full_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full_name, module)
        spec.loader.exec_module(module)
        if name == "exchange":
            for user in (forward, backward):
                monkeypatch.setattr(user, "arrive", module.arrive)
                monkeypatch.setattr(user, "wait", module.wait)
        else:
            monkeypatch.setattr(launch, f"{name}_kernel", getattr(module, f"{name}_kernel"))

    return load


def run(seed: int | None) -> None:
    roomy = plan.Device("roomy", "cuda", 90, multiprocessors=64, smem_bytes=2**40)
    for problem, exchanges in RUNS:
        with cooperative(seed, poison=True), plan.forced(device=roomy, slices=2, chunk=3, exchanges=exchanges):
            result = problem.run("triton", torch.float32)
        assert_as_exact_as_eager(problem, result, torch.float32)


def test_removals_cover_both_kernels():
    files = [case.values[0] for case in removals()]
    # Two arrivals and their counts in each kernel; two waits in forward, and four in backward, of which a step with two
    # exchanges takes two, one with companions the third and a plain LSTM's the fourth; three operations and two orders
    # in the exchange.
    assert {name: files.count(name) for name in KERNELS} == {"forward": 6, "backward": 8, "exchange": 4}


def test_copy_without_mutation_passes(mutate):
    for name in KERNELS:
        line = FILES[name].read_text().splitlines()[0]
        mutate(name, 0, line)
    run(seed=0)


@pytest.mark.parametrize(("name", "number", "text"), removals())
def test_removal_is_found(mutate, name, number, text):
    mutate(name, number, text)
    with pytest.raises((GridError, AssertionError)):  # noqa: PT012
        for seed in range(6):
            run(seed)
