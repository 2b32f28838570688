"""What real compilers make of the kernels, on a machine without a GPU: what bench/compile_report.py says of them."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import triton

NEWEST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
needs_clusters = pytest.mark.skipif(not NEWEST, reason="Triton compiles for clusters from 3.9 on")
RECURRENT = {"formula": 5, "lstm": 4}
# What is compiled for one test serves others.
pytestmark = pytest.mark.xdist_group("compiled kernels")
BENCH = pathlib.Path(__file__).parent.parent / "bench"
PERSISTENT = ["--kernel", "forward_kernel", "backward_kernel"]

# One process for all reports: the import of PyTorch takes longer than a kernel.
CHILD = """
import contextlib, sys
import compile_report
for line in sys.stdin:
    path, *sys.argv[1:] = line.split()
    sys.argv += ["--jobs", "1", "--json", path]
    with contextlib.redirect_stdout(sys.stderr):
        code = compile_report.main()
    print(code, flush=True)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A function that returns the rows that bench/compile_report.py writes if it is called with some arguments."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("report")
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([sys.executable, "-c", CHILD], cwd=BENCH, env=environment, stderr=log, **pipes) as child,
    ):
        requests, answers = child.stdin, child.stdout
        assert requests is not None
        assert answers is not None

        def rows(*arguments: str) -> list[dict]:
            path = folder / "report.json"
            print(path, *arguments, file=requests, flush=True)
            assert answers.readline() == "0\n", (folder / "log").read_text()
            return json.loads(path.read_text())

        yield rows
        requests.close()


GRIDS = {
    "formula-few": ("formula", ["sm_90"], ["1024"], ["16", "64"]),
    "lstm-few": ("lstm", ["sm_90"], ["1024"], ["16", "64"]),
    "formula": ("formula", ["sm_80", "sm_90"], ["64", "128", "256", "512", "1024"], ["16", "64"]),
    "lstm": ("lstm", ["sm_80", "sm_90"], ["64", "128", "256", "512", "1024"], ["16", "64"]),
}
"""Cell, architectures, sizes and batches, with resident weights and streamed ones in each."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(grid, id=name, marks=[] if "few" in name else [pytest.mark.exhaustive])
        for name, grid in GRIDS.items()
    ],
)
def recurrent(report, request):
    """The recurrent kernels of bf16 layers of a cell up to H = 1024."""
    cell, *grid = request.param
    archs, hidden, batches = grid
    rows = report("--arch", *archs, "--hidden", *hidden, "--batch", *batches, "--cell", cell, *PERSISTENT)
    assert len(rows) == 2 * math.prod(map(len, grid))
    assert {row["cell"] for row in rows} == {cell}
    return rows


def name(row: dict) -> str:
    return f"{row['kernel']} {row['arch']} H={row['hidden']} B={row['batch']}"


def test_no_register_is_spilled(recurrent):
    """Older compilers spill a few bytes, in few kernels."""
    most = 0 if NEWEST else 40
    assert {name(row): row["spill_bytes"] for row in recurrent if row["spill_bytes"] > most} == {}
    assert sum(row["spill_bytes"] > 0 for row in recurrent) <= 6


SPILLS = {"notebook": 24, "formula_all": 24, "notebook_all": 24}
SPILLS |= {"coupled": 0, "peephole": 0, "gru": 8, "elman_tanh": 16, "elman_relu": 0}


@pytest.mark.parametrize(("cell", "most"), SPILLS.items())
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(["64"], id="64"),
        pytest.param(["256", "512", "1024"], id="others", marks=pytest.mark.exhaustive),
    ],
)
def test_other_cells_spill_little(report, hidden, cell, most):
    rows = report("--arch", "sm_90", "--hidden", *hidden, "--batch", "16", "--cell", cell, *PERSISTENT)
    assert len(rows) == 2 * len(hidden)
    most = most if NEWEST else 2 * most
    assert {name(row): row["spill_bytes"] for row in rows if row["spill_bytes"] > most} == {}


def test_few_barriers_in_a_step(recurrent):
    """Every tile that changes its layout costs two; half of what the first kernels took is the most to accept."""
    # Forward and backward together, at sm_90, B = 16.
    first = {64: 30 + 52, 128: 40 + 58, 256: 36 + 69, 512: 40 + 87, 1024: 40 + 129}
    steps = dict.fromkeys((row["hidden"] for row in recurrent), 0)
    for row in recurrent:
        if row["batch"] == 16 and row["arch"] == "sm_90":
            steps[row["hidden"]] += row["barriers"]
    assert all(0 < count <= first[hidden] // 2 for hidden, count in steps.items()), steps


def test_no_product_is_made_twice(recurrent):
    """Each m16n8k16 instruction of a step is one warp's, and only one's, if weights are resident and rows are few."""
    kept = [row for row in recurrent if row["resident"] and row["block_b"] == 16]
    assert sum(row["parts"] > 1 for row in kept) >= 2
    for row in kept:
        columns = RECURRENT[row["cell"]] * row["block_n"] // 8
        k_steps = -(-row["hidden"] // row["block_k"]) * row["block_k"] // 16
        assert row["products"] == columns * k_steps // row["num_warps"], name(row)


def test_shared_memory_is_within_plan_and_device(recurrent):
    for row in recurrent:
        assert row["shared_bytes"] <= row["planned_bytes"] <= row["device_bytes"], name(row)


def test_resident_weights_are_loaded_outside_the_time_loop(recurrent):
    resident = [row for row in recurrent if row["resident"]]
    assert 2 * len(resident) >= len(recurrent)
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
def test_other_exchanges_compile(report, options):
    forward, backward = report("--arch", "sm_90", "--hidden", "128", "--batch", "16", *PERSISTENT, *options)
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
def test_bounded_waits_compile(report, exchange):
    sizes = ["--arch", "sm_90", "--hidden", "64", "--batch", "16", *PERSISTENT]
    for row in report(*sizes, "--exchange", exchange, "--max-spins", "1000"):
        assert (row["releases"] > 0) == (exchange == "barrier")


@pytest.mark.parametrize(
    "hidden",
    [pytest.param("40", id="40"), *[pytest.param(h, id=h, marks=pytest.mark.exhaustive) for h in ("100", "256")]],
)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--arch", "sm_90", "--dtype", "fp32"], id="fp32"),
        pytest.param(["--arch", "sm_90", "--cell", "notebook", "--lengths", "--dtype", "fp16"], id="notebook-lengths"),
        pytest.param(["--arch", "sm_100", "gfx942"], id="sm_100-gfx942"),
    ],
)
def test_all_kernels_compile(report, arguments, hidden):
    rows = report("--hidden", hidden, "--batch", "16", *arguments)
    assert {row["kernel"] for row in rows} == {
        "forward_kernel",
        "backward_kernel",
        "statistics_kernel",
        "cell_states_kernel",
    }
    for row in rows:
        assert row["shared_bytes"] <= row["device_bytes"], name(row)
