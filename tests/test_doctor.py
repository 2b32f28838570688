"""What `novolstm doctor` says, and that it notices what is wrong."""

import dataclasses
import math
import re
import sys

import pytest
import torch

from novolstm_triton import plan
from novolstm_triton.app import environment
from novolstm_triton.app.cli import main
from novolstm_triton.cells import CELLS
from novolstm_triton.engines import bptt, choice
from novolstm_triton.plans import tuned
from novolstm_triton.plans.tuned import Entry, Key
from novolstm_triton.problems import Problem
from novolstm_triton.testing import cooperative

SMALL = ["doctor", "--hidden", "20", "--batch", "3", "--steps", "9", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("NOVOLSTM_BACKEND", tuned.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    yield
    tuned.put_in_force(None)


@pytest.fixture
def doctor(capsys):
    """Runs the command and returns its exit code and what it printed."""

    def run(*arguments):
        code = main(["doctor", *arguments] if arguments[:1] != ("doctor",) else list(arguments))
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def errors_of(text):
    """Return the table of the self-check."""
    rows = [line.split() for line in text.splitlines()]
    return {
        " ".join(row[:-2]): (float(row[-2]), float(row[-1]))
        for row in rows
        if " ".join(row[:-2]) in Problem(1, 1, 1).result_names
    }


def test_cpu_is_checked(doctor):
    code, text = doctor(*SMALL)
    assert code == 0
    assert '"auto" is          torch: tensors are on the CPU' in text
    assert "H=20 B=3 T=9 fp32, cell formula" in text
    assert "PyTorch sees no GPU" in text
    for version in environment.versions().values():
        assert version in text
    table = errors_of(text)
    assert list(table) == list(Problem(1, 1, 1).result_names)
    assert all(error <= bound for error, bound in table.values())
    assert "3 of 3" in text
    for case in ("H37-formula-lengths", "H37-notebook-lengths-reverse", "B3-H20-formula"):
        assert case in text


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_every_dtype_is_well(dtype, doctor):
    code, text = doctor(*SMALL[:-1], dtype)
    assert code == 0, text
    assert f"in {dtype} against" in text


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_is_well(cell, doctor):
    code, text = doctor(*SMALL, "--cell", cell)
    assert code == 0, text
    assert f"B3-H20-{cell}\n" in text
    assert list(errors_of(text)) == list(Problem(1, 1, 1).result_names)
    assert f" {9 * 3 * len(CELLS[cell].gates) * 20 * 4:,} bytes for a chunk's pre-activations" in text


@pytest.mark.parametrize("where", ["here", "h100"])
def test_cell_without_kernels_is_refused_by_name(where, doctor, monkeypatch):
    if where == "here":
        monkeypatch.setenv("NOVOLSTM_BACKEND", "triton")
    device = [] if where == "here" else ["--device", where]
    code, text = doctor(*SMALL, "--cell", "gru_reset_before", *device)
    assert code == 1
    assert text.count("PROBLEM") == 1
    assert "the call raises: backend 'triton' does not run the cell 'gru_reset_before' (its second product" in text


@pytest.mark.parametrize("wrong", [1.01, math.nan], ids=["off", "nan"])
def test_wrong_result_is_noticed(wrong, doctor, monkeypatch):
    def backward(*arguments, **options):
        return list(g if k != 3 or g is None else g * wrong for k, g in enumerate(right(*arguments, **options)))

    right = bptt.backward
    monkeypatch.setattr(bptt, "backward", backward)
    code, text = doctor(*SMALL)
    assert code == 1
    assert "PROBLEM            wrong results in grad weight_ih: take backend='reference'" in text
    assert text.count("WRONG") == 1
    assert "All is well" not in text


def test_self_check_ends_in_time(doctor, monkeypatch):
    monkeypatch.setattr("novolstm_triton.app.doctor.CHECK_S", -1.0)
    code, text = doctor(*SMALL)
    assert code == 0
    assert "1 of 3" in text


@pytest.mark.parametrize(
    "checks", [pytest.param(1, id="one-problem"), pytest.param(3, id="all-problems", marks=pytest.mark.exhaustive)]
)
def test_kernels_are_checked_in_the_interpreter(checks, doctor, monkeypatch):
    monkeypatch.setenv("NOVOLSTM_BACKEND", "triton")
    monkeypatch.setattr("novolstm_triton.app.doctor.CHECK_S", -1.0 if checks == 1 else 600.0)
    # It makes the interpreter faster, too.
    with cooperative():
        code, text = doctor(*SMALL)
    assert code == 0, text
    assert '"auto" is          triton: NOVOLSTM_BACKEND is set so' in text
    assert "Plan on interpreter" in text
    assert "Self-check: triton on cpu" in text
    assert f"{checks} of 3" in text
    assert all(error <= bound for error, bound in errors_of(text).values())


def test_backend_that_cannot_run_is_a_problem(doctor, monkeypatch):
    monkeypatch.setenv("NOVOLSTM_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    code, text = doctor(*SMALL)
    assert code == 1
    assert "PROBLEM            the call raises: backend 'triton' needs tensors on a GPU" in text


def test_missing_triton_is_a_problem(doctor, monkeypatch):
    monkeypatch.setenv("NOVOLSTM_BACKEND", "triton")
    monkeypatch.delitem(sys.modules, "novolstm_triton.engines.launch", raising=False)
    monkeypatch.delattr("novolstm_triton.engines.launch", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    code, text = doctor(*SMALL)
    assert code == 1
    assert "install triton, or take backend='torch'" in text
    assert "Self-check" not in text


def test_unknown_backend_is_a_problem(doctor, monkeypatch):
    monkeypatch.setenv("NOVOLSTM_BACKEND", "cudnn")
    code, text = doctor(*SMALL)
    assert code == 1
    assert "NOVOLSTM_BACKEND: expected one of" in text


def test_backend_of_a_block_is_told(capsys):
    with choice.use_backend("reference"):
        assert main(SMALL) == 0
    text = capsys.readouterr().out
    assert '"auto" is          reference: use_backend says so' in text
    assert "Plan: none" in text


@pytest.mark.parametrize("name", ["h200", "H200", "rtx-4090", "4090", "mi300x"])
def test_plan_for_a_gpu_that_is_not_here(name, doctor):
    code, text = doctor("--device", name)
    assert code == 0
    assert ", as if it were here" in text
    assert "Self-check: none" in text
    for line in ("forward", "backward", "  chosen           by the model", "  weights          st"):
        assert f"  {line}" in text


def test_plan_is_the_one_that_plan_returns(doctor):
    _, text = doctor("--device", "a100", "--hidden", "1024", "--batch", "4096")
    both = plan.plan(1024, 4096, torch.bfloat16, plan.A100)
    for kernel_plan in (both.forward, both.backward):
        choices = tuned.choices_of(kernel_plan)
        assert " ".join(f"{name}={value}" for name, value in choices.items()) in text
        assert f"at most {kernel_plan.smem_bytes:,} of 166,912 bytes" in text
        assert f"launches         {-(-kernel_plan.tiles // kernel_plan.tiles_per_launch)} per chunk" in text
        assert not kernel_plan.resident
    assert "stream from L2 in every step: no plan holds them in shared memory" in text


def test_streaming_by_choice_is_told(doctor):
    with plan.forced(resident=False):
        _, text = doctor("--device", "h200")
    assert "by pins and the model" in text
    assert "stream from L2 in every step: by choice" in text


def test_tuned_plan_is_told(doctor, tmp_path):
    device = dataclasses.replace(plan.H200, name="NVIDIA H200")
    entry = Entry(Key(512, 64, "bf16", "formula", "forward"), dict(slices=8), 1.25)
    tuned.write(tmp_path / "plans.json", device, {}, [entry])
    tuned.load(tmp_path / "plans.json")
    code, text = doctor("--device", "h200", "--hidden", "512", "--batch", "20")
    assert code == 0
    # The device of the file comes before the one that this package knows.
    assert "Plan on NVIDIA H200" in text
    assert f"chosen           measured 1.25 µs a step at B=64, in {tmp_path / 'plans.json'}" in text
    assert text.count("by the model") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--hidden", "9" * 30], "hidden: expected at most 2147483647", id="hidden-huge"),
        pytest.param(["--batch", "9" * 30], "batch: expected at most 2147483647", id="batch-huge"),
        pytest.param(["--hidden", "100000"], "no plan for hidden=100000 fits H200", id="too-large"),
        pytest.param(["--dtype", "fp64"], "backend 'triton' has no float64: use backend='torch'", id="fp64"),
    ],
)
def test_layer_that_the_kernels_refuse_is_a_problem(arguments, message, doctor):
    code, text = doctor("--device", "h200", *arguments)
    assert code == 1
    assert message in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--device", "cuda"], "--device cuda: PyTorch sees no GPU here", id="no-gpu"),
        pytest.param(["--device", "h900"], "one of .*h200.*; got 'h900'", id="device"),
        pytest.param(["--hidden", "0"], "--hidden: expected at least 1, got 0", id="hidden"),
        pytest.param(["--dtype", "int8"], "--dtype: expected one of bf16", id="dtype"),
        pytest.param(["--cell", "no_cell"], "--cell: expected one of .*lstm", id="cell"),
    ],
)
def test_request_that_cannot_be_met(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_bad_file_of_plans_is_a_problem(doctor, monkeypatch, tmp_path):
    (tmp_path / "plans.json").write_text("{")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    code, text = doctor(*SMALL)
    assert code == 1
    assert "PROBLEM            NOVOLSTM_PLANS: " in text
