"""What real compilers make of the kernels, on a machine without a GPU: bench/compile_report.py run as a user would."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import triton

NEWEST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
needs_clusters = pytest.mark.skipif(not NEWEST, reason="Triton compiles for clusters from 3.9 on")
RECURRENT = {"formula": 5, "lstm": 4}
REPORT = pathlib.Path(__file__).parent.parent / "bench" / "compile_report.py"


def report(path: pathlib.Path, *arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), *arguments, "--json", str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=["formula", "lstm"])
def recurrent(tmp_path_factory, request):
    """The recurrent kernels of bf16 layers of a cell up to H = 1024."""
    path = tmp_path_factory.mktemp("report") / "recurrent.json"
    sizes = ["--arch", "sm_80", "sm_90", "--hidden", "64", "128", "256", "512", "1024", "--batch", "16", "64"]
    rows = report(path, *sizes, "--cell", request.param, "--kernel", "forward_kernel", "backward_kernel")
    assert len(rows) == 40
    assert {row["cell"] for row in rows} == {request.param}
    return rows


def name(row: dict) -> str:
    return f"{row['kernel']} {row['arch']} H={row['hidden']} B={row['batch']}"


def test_no_register_is_spilled(recurrent):
    """Older compilers spill a few bytes, in few kernels."""
    most = 0 if NEWEST else 40
    assert {name(row): row["spill_bytes"] for row in recurrent if row["spill_bytes"] > most} == {}
    assert sum(row["spill_bytes"] > 0 for row in recurrent) <= 6


@pytest.mark.parametrize(("cell", "most"), [("notebook", 24), ("formula_all", 24), ("notebook_all", 24)])
def test_other_cells_spill_little(tmp_path, cell, most):
    sizes = ["--arch", "sm_90", "--hidden", "64", "256", "512", "1024", "--batch", "16", "--cell", cell]
    rows = report(tmp_path / "report.json", *sizes, "--kernel", "forward_kernel", "backward_kernel")
    assert len(rows) == 8
    most = most if NEWEST else 2 * most
    assert {name(row): row["spill_bytes"] for row in rows if row["spill_bytes"] > most} == {}


def test_few_barriers_in_a_step(recurrent):
    """Every tile that changes its layout costs two; half of what the first kernels took is the most to accept."""
    # Forward and backward together, at sm_90, B = 16.
    first = {64: 30 + 52, 128: 40 + 58, 256: 36 + 69, 512: 40 + 87, 1024: 40 + 129}
    steps = dict.fromkeys(first, 0)
    for row in recurrent:
        if row["batch"] == 16 and row["arch"] == "sm_90":
            steps[row["hidden"]] += row["barriers"]
    assert all(0 < steps[hidden] <= first[hidden] // 2 for hidden in first), steps


def test_no_product_is_made_twice(recurrent):
    """Each m16n8k16 instruction of a step is one warp's, and only one's, if weights are resident and rows are few."""
    kept = [row for row in recurrent if row["resident"] and row["block_b"] == 16]
    assert sum(row["parts"] > 1 for row in kept) >= 12
    for row in kept:
        columns = RECURRENT[row["cell"]] * row["block_n"] // 8
        k_steps = -(-row["hidden"] // row["block_k"]) * row["block_k"] // 16
        assert row["products"] == columns * k_steps // row["num_warps"], name(row)


def test_shared_memory_is_within_plan_and_device(recurrent):
    for row in recurrent:
        assert row["shared_bytes"] <= row["planned_bytes"] <= row["device_bytes"], name(row)


def test_resident_weights_are_loaded_outside_the_time_loop(recurrent):
    resident = [row for row in recurrent if row["resident"]]
    assert len(resident) >= 30
    assert {name(row): row["weight_loads_in_loop"] for row in resident if row["weight_loads_in_loop"]} == {}
    # The count would see them: streamed weights are loaded inside.
    streamed = [row for row in recurrent if not row["resident"]]
    assert streamed
    assert all(row["weight_loads_in_loop"] >= 4 for row in streamed)


def test_programs_that_share_a_tile_release_and_acquire(recurrent):
    for row in recurrent:
        # A plain LSTM has one exchange a step, others two.
        expected = 0 if row["slices"] == 1 else 1 if row["cell"] == "lstm" else 2
        assert (row["releases"], row["acquires"]) == (expected, expected), name(row)
        assert row["releases_before_barrier"] == 0, name(row)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--exchange", "words"], id="words"),
        pytest.param(["--exchange", "barrier", "--exchanges", "1"], id="one-exchange"),
        pytest.param(["--exchange", "words", "--exchanges", "1"], id="words-one-exchange"),
        pytest.param(["--exchange", "cluster"], id="cluster", marks=needs_clusters),
    ],
)
def test_other_exchanges_compile(tmp_path, options):
    sizes = ["--arch", "sm_90", "--hidden", "256", "--batch", "16", "--kernel", "forward_kernel", "backward_kernel"]
    forward, backward = report(tmp_path / "report.json", *sizes, *options)
    for row in (forward, backward):
        assert row["shared_bytes"] <= row["planned_bytes"] <= row["device_bytes"], name(row)
        assert row["weight_loads_in_loop"] == 0, name(row)
    assert forward["spill_bytes"] == 0
    if "words" in options or "cluster" in options:
        # Neither has a counter.
        assert (backward["releases"], backward["acquires"]) == (0, 0)
    elif "1" in options:
        assert (backward["releases"], backward["acquires"]) == (1, 1)
    assert (forward["cluster_barriers"] > 0) == ("cluster" in options)


@pytest.mark.parametrize("exchange", ["barrier", "words"])
def test_bounded_waits_compile(tmp_path, exchange):
    sizes = ["--arch", "sm_90", "--hidden", "256", "--batch", "16", "--kernel", "forward_kernel", "backward_kernel"]
    for row in report(tmp_path / "report.json", *sizes, "--exchange", exchange, "--max-spins", "1000"):
        assert (row["releases"] > 0) == (exchange == "barrier")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--arch", "sm_90", "--dtype", "fp32"], id="fp32"),
        pytest.param(["--arch", "sm_90", "--cell", "notebook", "--lengths", "--dtype", "fp16"], id="notebook-lengths"),
        pytest.param(["--arch", "sm_100", "gfx942"], id="sm_100-gfx942"),
    ],
)
def test_all_kernels_compile(tmp_path, arguments):
    rows = report(tmp_path / "report.json", "--hidden", "100", "256", "--batch", "16", *arguments)
    assert {row["kernel"] for row in rows} == {
        "forward_kernel",
        "backward_kernel",
        "statistics_kernel",
        "cell_states_kernel",
    }
    for row in rows:
        assert row["shared_bytes"] <= row["device_bytes"], name(row)
