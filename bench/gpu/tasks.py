"""What a run does: checks and timings as JSON-able tasks, their order, and what is left of them when one is lost."""

import functools
import json
from typing import Any

Task = dict[str, Any]


ROOFLINE_CONSTANTS = ("barrier_us", "handoff_us", "l2_latency_us", "l2_bytes_per_us", "launch_us", "clocks_per_us")
"""The results of micro.py that replace constants of roofline.py; its bound on shared memory is only a lower one."""


def check(test: str, steps: int, batch: int, hidden: int, dtype: str, *, core: bool = False, **options: Any) -> Task:
    """Return a check task; options are those of `novolstm_triton.problems.Problem`, and `pins` those of plan.forced."""
    pins = options.pop("pins", {})
    problem = dict(steps=steps, batch=batch, hidden=hidden, **options)
    flags = [options.get("cell", "formula"), *(name for name in ("lengths", "reverse") if options.get(name))]
    flags += [f"{name}={value}" for name, value in pins.items()]
    name = f"{test} T{steps}-B{batch}-H{hidden} {dtype} {' '.join(flags)}"
    return dict(kind="check", name=name, core=core, test=test, problem=problem, dtype=dtype, pins=pins)


def rows(hidden: int, batch: int, steps: int, *entries: Task, core: bool = False, **options: Any) -> Task:
    """Return a timing task, whose entries take turns."""
    name = f"time T{steps}-H{hidden}-B{batch} {', '.join(entry_name(entry) for entry in entries)}"
    return dict(
        kind="rows", name=name, core=core, hidden=hidden, batch=batch, steps=steps, entries=list(entries), **options
    )


def entry(layer: str, dtype: str, **pins: Any) -> Task:
    """Return one row to be: a layer, a dtype, and pins for the plan."""
    return dict(layer=layer, dtype=dtype, pins=pins)


def entry_name(entry: Task) -> str:
    """Return what tells the entries of a task apart."""
    return " ".join([entry["layer"], entry["dtype"], *(f"{name}={value}" for name, value in entry["pins"].items())])


def memory(steps: int, batch: int, hidden: int, *entries: Task, core: bool = False) -> Task:
    """Return a task that measures the peak memory of its entries, one alone after the other."""
    task = rows(hidden, batch, steps, *entries, core=core)
    return task | dict(kind="memory", name=f"memory T{steps}-B{batch}-H{hidden}")


GRID = [(hidden, batch) for hidden in (512, 128, 1024, 256, 768, 2048) for batch in (16, 64, 1, 256)]
"""H and B of the throughput table, the most important first."""

LIBRARY = [entry("nn.LSTM", "fp16"), entry("nn.LSTM", "bf16"), entry("nn.LSTM", "tf32")]


def all_tasks(flashrnn: bool = False) -> list[Task]:
    """Return everything worth running, the most important first.

    Args:
        flashrnn: whether FlashRNN can be imported.
    """
    tasks = [
        check("exact", 64, 16, 512, "bf16", core=True, inputs_size=512),
        check("exact", 64, 16, 128, "bf16", core=True, inputs_size=128),
        check("exact", 32, 64, 1024, "bf16", core=True, inputs_size=1024),
        check("exact", 40, 5, 100, "fp32", core=True, lengths=True, reverse=True),
        check("exact", 33, 33, 256, "fp16", core=True, cell="notebook", lengths=True),
        check("exact", 24, 20, 256, "bf16", core=True, pins=dict(exchange="words")),
        check("repeat", 256, 16, 512, "bf16", core=True),
        check("graph", 64, 16, 512, "bf16", core=True, inputs_size=512),
        check("nosync", 64, 16, 512, "bf16", core=True, inputs_size=512),
        # The peak of forward and backward against nn.LSTM's.
        check("memory", 8192, 64, 512, "bf16", core=True, inputs_size=512),
        dict(kind="micro", name="microbenchmarks", core=True),
    ]
    both = [entry("novolstm", "bf16"), entry("nn.LSTM", "bf16")]
    tasks += [memory(steps, 64, 512, *both, core=True) for steps in (8192, 2048, 512)]
    tasks += [rows(h, b, grid_steps(h, b), *grid_entries(h, flashrnn), core=True) for h, b in GRID]
    return tasks + more_checks() + more_rows()


def grid_steps(hidden: int, batch: int) -> int:
    """Return T: shorter for layers whose steps take long."""
    return 256 if hidden * batch >= 2**18 or hidden > 1024 else 1024


def grid_entries(hidden: int, flashrnn: bool) -> list[Task]:
    """Return the layers timed at every size: the plan's own choice, every exchange that could be one, and others'."""
    exchanges = ["barrier", "words"] + (["none"] if hidden <= 512 else [])
    entries = [entry("novolstm", "bf16"), *(entry("novolstm", "bf16", exchange=name) for name in exchanges), *LIBRARY]
    return entries + ([entry("flashrnn", "bf16")] if flashrnn else [])


def more_checks() -> list[Task]:
    """Return the checks after the core: shapes by dtypes with every option in turn, pinned plans, long runs."""
    shapes = [(1, 1, 1), (9, 5, 7), (40, 3, 100), (33, 33, 257), (64, 16, 64), (50, 1, 256), (24, 64, 768)]
    shapes += [(16, 256, 512), (12, 130, 1024), (6, 8, 2048)]
    tasks = []
    for number, (steps, batch, hidden) in enumerate(shapes):
        for turn, dtype in enumerate(("bf16", "fp32", "fp16"), start=number):
            options = dict(lengths=turn % 2 == 1, reverse=turn % 3 == 1, seed=turn)
            options["cell"] = "notebook" if turn % 4 == 2 else "formula"
            tasks.append(check("exact", steps, batch, hidden, dtype, **options))
    pinned = [dict(slices=slices) for slices in (1, 2, 4, 8, 16)]
    pinned += [dict(slices=slices, resident=False) for slices in (1, 8)]
    pinned += [dict(block_b=32), dict(block_b=64), dict(block_k=32, slices=8), dict(chunk=5), dict(exchange="barrier")]
    pinned += [dict(exchange="words"), dict(exchange="words", slices=4, chunk=5), dict(exchange="words", slices=16)]
    pinned += [dict(split_k=False), dict(slices=16, split_k=False)]
    for number, pins in enumerate(pinned):
        options = dict(pins=pins, lengths=number % 2 == 1, reverse=number % 3 == 0)
        tasks.append(check("exact", 24, 20, 256, "bf16", **options))
    tasks += [
        check("exact", 24, 20, 256, "fp32", pins=dict(slices=16, chunk=7), lengths=True),
        # Nine batch tiles, of which four are resident together.
        check("exact", 6, 130, 512, "bf16", pins=dict(slices=32, block_b=16)),
        check("exact", 6, 130, 512, "bf16", pins=dict(slices=32, block_b=16, exchange="words")),
        check("exact", 24, 20, 128, "fp32", pins=dict(exchange="words", chunk=7), lengths=True, cell="notebook"),
        check("repeat", 1024, 64, 512, "bf16"),
        check("repeat", 1024, 64, 512, "bf16", pins=dict(exchange="words")),
        check("repeat", 256, 64, 1024, "bf16"),
        check("repeat", 100, 20, 256, "fp32", lengths=True, pins=dict(slices=16, chunk=32)),
        check("growth", 64, 16, 512, "bf16"),
        check("long", 65_536, 2, 64, "fp32"),
        check("long", 65_536, 2, 256, "bf16"),
    ]
    return tasks


def more_rows() -> list[Task]:
    """Return the timings after the core."""
    # Loops over the steps, which take their time one by one: few of them.
    tasks = [rows(h, 16, 64, entry("reference", "bf16"), rounds=3) for h in (512, 128, 1024, 256, 768, 2048)]
    tasks += [rows(h, 16, 64, entry("graphed", "bf16"), rounds=5) for h in (512, 128, 1024, 256, 768, 2048)]
    tasks += [
        rows(512, batch, 64, entry("reference", "bf16"), entry("graphed", "bf16"), rounds=3) for batch in (1, 256)
    ]
    # µs per step against T.
    sixteen_bit = [entry("novolstm", "bf16"), *LIBRARY[:2]]
    tasks += [rows(512, 16, steps, *sixteen_bit) for steps in (64, 256, 4096)]
    tasks += [rows(512, 16, 16, entry("compiled", "bf16"), rounds=5, stall_s=150)]
    ours, theirs = functools.partial(entry, "novolstm"), functools.partial(entry, "nn.LSTM")
    tasks += [rows(128, 16, 16, entry("compiled", "bf16"), rounds=5, stall_s=150)]
    # Predicted from kernels/README.md: a step of backward takes 2 µs less at H = 512, 4 at 1024; forward there 1.6.
    tasks += [rows(hidden, 16, 1024, ours("bf16"), ours("bf16", split_k=False)) for hidden in (512, 1024, 256)]
    # Slices to compare: those with one possible exchange, then those with two.
    alternatives = {128: ((1,), (2, 4, 8)), 256: ((1,), (4, 8, 16)), 512: ((1, 8), (16, 32)), 1024: ((16, 32), (64,))}
    for hidden, (single, either) in alternatives.items():
        entries = [ours("bf16", slices=s) for s in single + either]
        entries += [ours("bf16", slices=s, exchange="words") for s in either]
        tasks += [rows(hidden, batch, 1024, *entries) for batch in (16, 64)]
    more = [ours("fp16"), ours("fp32"), theirs("fp32")]
    tasks += [rows(hidden, batch, 1024, *more) for hidden in (512, 128, 1024, 256) for batch in (16, 64, 1, 256)]
    return tasks


def smoke_tasks() -> list[Task]:
    """Return tasks for Triton's interpreter: fp32 and one slice, the only ones that it runs right."""
    return [
        check("exact", 3, 2, 5, "fp32"),
        check("exact", 4, 3, 6, "fp32", cell="notebook", lengths=True, reverse=True, pins=dict(chunk=2)),
        check("repeat", 2, 1, 3, "fp32"),
        check("growth", 1, 1, 3, "fp32"),
        check("long", 16, 1, 4, "fp32"),
        rows(6, 2, 2, entry("novolstm", "fp32"), entry("nn.LSTM", "fp32"), rounds=1),
        rows(6, 2, 2, entry("novolstm", "fp32"), entry("novolstm", "fp32", resident=False), rounds=1),
        # The interpreter has no slices to exchange anything: refused.
        rows(6, 2, 2, entry("reference", "fp32"), entry("novolstm", "fp32", exchange="barrier"), rounds=1),
        memory(2, 2, 6, entry("nn.LSTM", "fp32")),
        dict(kind="micro", name="microbenchmarks", core=False),
    ]


def compilations(tasks: list[Task]) -> list[Task]:
    """Return the compile tasks for everything that `tasks` launch, without repetitions, in their order."""
    wanted = {}
    for task in tasks:
        if task["kind"] == "micro":
            continue
        problem = task["problem"] if task["kind"] == "check" else task
        # What decides the kernels.
        sizes = {name: problem[name] for name in ("hidden", "batch", "lengths", "cell") if problem.get(name)}
        entries = [task] if task["kind"] == "check" else [e for e in task["entries"] if e["layer"] == "novolstm"]
        for e in entries:
            name = json.dumps([sizes, e["dtype"], e["pins"]], sort_keys=True)
            wanted[name] = dict(kind="compile", name=name, problem=sizes, dtype=e["dtype"], pins=e["pins"])
    return list(wanted.values())


def next_task(pending: list[Task], compiling: bool) -> Task | None:
    """Return what to run next: the first task, but nothing is timed while others compile. None: wait for them."""
    return next((task for task in pending if not (compiling and task["kind"] in ("rows", "micro"))), None)


def least_seconds(task: Task) -> float:
    """Return the time without which it is not worth starting a task."""
    return 8.0 if task["kind"] == "check" else 12.0


def without_lost(task: Task, at: str) -> Task | None:
    """Return what is left of a timing task after its entry named `at` took a worker along; None if nothing is."""
    entries = task.get("entries", [])
    rest = [e for e in entries if entry_name(e) != at]
    return dict(task, entries=rest) if 0 < len(rest) < len(entries) else None


def with_bounded_waits(task: Task, reason: str) -> Task | None:
    """Return a check that was silent once more, with waits that end and say who waited for whom; None for others."""
    if task["kind"] != "check" or "silent" not in reason or "max_spins" in task["pins"]:
        return None
    return dict(task, name=f"{task['name']}, waits bounded", pins=task["pins"] | dict(max_spins=10**6))
