"""Compile the kernels of planned layers for real GPUs, on a machine that needs none, and print the outcome.

    python bench/compile_report.py --arch sm_80 sm_90 gfx942 --hidden 64 512 --batch 16 --dtype bf16 --json OUT.json

One row per kernel: registers per thread, spilled bytes, shared memory per program against the plan's estimate and the
device's limit, loads of recurrent weights left inside the time loop, and block-wide barriers in a step of that loop.
The file has a thread's tensor-core instructions in a step, `products`, and its loads of their operands, besides.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from novolstm_triton import plan as planning
from novolstm_triton.cells import with_kernels
from novolstm_triton.engines.launch import FUSION, WalkOptions, compile_options, kernel_constants
from novolstm_triton.kernels.backward import backward_kernel, cell_states_kernel, statistics_kernel
from novolstm_triton.kernels.forward import forward_kernel

DEVICES = {
    "sm_80": planning.A100,
    "sm_89": planning.RTX_4090,
    "sm_90": planning.H100,
    "sm_100": planning.B200,
    "gfx942": planning.MI300X,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {k.__name__: k for k in (forward_kernel, statistics_kernel, cell_states_kernel, backward_kernel)}

# Arguments in the dtype of x; other pointers are fp32, but for the integers.
_IN_DTYPE = {
    "x_gates_ptr",
    "weight_hh_ptr",
    "h_mask_ptr",
    "h_ptr",
    "h_ring_ptr",
    "y_ptr",
    "z_ptr",
    "dy_ptr",
    "dz_ptr",
    "companion_ptr",
    "late_ring_ptr",
}
_IN_INT32 = {"lengths_ptr", "counter_ptr"}
_IN_FP32 = {"eps", "zoneout_h", "zoneout_c"}
_CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Case(NamedTuple):
    """A kernel of a layer, to be compiled as `launch.py` would launch it."""

    kernel: str
    arch: str
    hidden: int
    batch: int
    dtype: str
    cell: str
    options: WalkOptions
    directions: int
    pins: planning.Pins

    def plan(self) -> planning.KernelPlan:
        """Return how the kernel is launched."""
        sizes = (self.hidden, self.batch, DTYPES[self.dtype], DEVICES[self.arch])
        plans = planning.plan(*sizes, cell=self.cell, directions=self.directions, pins=self.pins)
        return plans.forward if self.kernel == "forward_kernel" else plans.backward

    def text(self) -> tuple:
        """Return all that the compiled text depends on: one plan serves many batches. Without a plan, the case."""
        try:
            same_plan = dataclasses.replace(self.plan(), tiles=0, tiles_per_launch=0, step_us=0.0)
        except ValueError:
            return self
        return self._replace(batch=0, pins=planning.Pins(max_spins=self.pins.max_spins)), same_plan


def compile_kernel(case: Case) -> dict:
    """Compile one kernel and return its row of the report."""
    kernel, device, kernel_plan, dtype = KERNELS[case.kernel], DEVICES[case.arch], case.plan(), case.dtype
    precision = "tf32x3" if dtype == "fp32" and device.backend == "cuda" else "ieee"
    with planning.in_force(case.pins):
        constants = kernel_constants(
            kernel, case.cell, case.hidden, kernel_plan, case.options, precision, directions=case.directions
        )
    given = dict(lengths_ptr=case.options.lengths, h_mask_ptr=case.options.h_mask)
    given["zoneout_mask_ptr"] = case.options.zoneout == "masks"
    constants |= {name: None for name, there in given.items() if not there and name in kernel.arg_names}
    signature = {name: _type(name, dtype, constants) for name in kernel.arg_names}
    if constants.get("EXCHANGE") == "words":
        signature["row_ring_ptr"] = "*i64"
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and name not in _IN_INT32
    }
    persistent = kernel in (forward_kernel, backward_kernel)
    options = compile_options(kernel_plan) if persistent else FUSION
    target = GPUTarget(device.backend, device.arch, device.warp_size)
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    row = case._asdict()
    del row["pins"]
    row |= row.pop("options")._asdict()
    row |= dict(slices=kernel_plan.slices if persistent else 1)
    row |= _resources(compiled, device)
    row |= dict(shared_bytes=compiled.metadata.shared, device_bytes=device.smem_bytes)
    if persistent:
        row |= dict(planned_bytes=kernel_plan.smem_bytes, resident=kernel_plan.resident)
        row |= dict(weight_loads_in_loop=weight_loads_in_loop(compiled.asm["ttgir"]))
        row |= {
            name: getattr(kernel_plan, name)
            for name in (
                "exchange",
                "exchanges",
                "ctas",
                "block_b",
                "block_n",
                "block_k",
                "num_warps",
                "parts",
                "in_flight",
            )
        }
    return row


def weight_loads_in_loop(ttgir: str) -> int:
    """Count the loads inside a loop whose address comes from the recurrent weights."""
    operands, weights, depth, loads = {}, set(), 0, 0
    for line in ttgir.splitlines():
        depth += len(re.findall(r"scf\.for|scf\.while", line)) > 0
        definition = re.match(r"\s*(%[\w#:]+) = (\S+) (.*)", line)
        if definition:
            name, operation, rest = definition.groups()
            used = {v.split("#")[0] for v in re.findall(r"%[\w]+", rest.split(" : ")[0])}
            operands[name.split(":")[0]] = used
            from_weights = operation.startswith(("tt.addptr", "tt.splat", "tt.broadcast", "ttg.convert_layout"))
            if from_weights and any(v in weights or v.startswith("%weight_hh_ptr") for v in used):
                weights.add(name)
            is_load = operation.startswith(("tt.load", "ttg.async_copy", "amdg.buffer_load", "ttg.buffer_load"))
            loads += is_load and depth > 0 and any(v in weights or v.startswith("%weight_hh_ptr") for v in used)
    return loads


def releases_before_barrier(ptx: str) -> int:
    """Count releases that a thread may reach while another thread's stores to global memory are still under way.

    A release orders the stores of its own thread, and those of others only through a barrier in between.
    """
    pending, count = False, 0
    for line in ptx.splitlines():
        if "st.global" in line:
            pending = True
        elif "bar.sync" in line:
            pending = False
        elif ".release." in line and pending:
            count += 1
    return count


def count_per_step(ptx: str, instruction: str) -> int:
    """Count an instruction of a thread in the longest loop, the one over time; each round of a wait counts once."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if re.match(r"\$\w+:", line)}
    jumps = [(labels.get(m[1], number), number) for number, line in enumerate(lines) if (m := _JUMP.search(line))]
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0], default=(0, 0))
    return sum(instruction in line for line in lines[first:last])


_JUMP = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")


def _type(name: str, dtype: str, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in _IN_INT32:
        return "*i32"
    if name == "zoneout_mask_ptr":
        return "*u8"
    if name.endswith("_ptr"):
        return "*" + (dtype if name in _IN_DTYPE else "fp32")
    return "fp32" if name in _IN_FP32 else "i32"


def _resources(compiled, device: planning.Device) -> dict:
    """Read registers per thread, spilled bytes per thread and barriers from what the target's compiler made."""
    if device.backend == "hip":
        text = compiled.asm["amdgcn"]
        count = {key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1)) for key in ("vgpr_count", "vgpr_spill_count")}
        return dict(
            registers=count["vgpr_count"],
            spill_bytes=4 * count["vgpr_spill_count"],
            # GCN has no labels that tell a loop: this is the whole text's.
            barriers=text.count("s_barrier"),
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    # The kernels have no arrays of their own, so a stack frame holds spilled registers and nothing else.
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spill_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),
        barriers=count_per_step(ptx, "bar.sync"),
        cluster_barriers=count_per_step(ptx, "barrier.cluster.arrive"),
        products=count_per_step(ptx, "mma.sync"),
        operand_loads=count_per_step(ptx, "ldmatrix"),
        releases=len(re.findall(r"(?:atom|red)\.[\w.]*release", ptx)),
        acquires=len(re.findall(r"(?:atom|ld)\.[\w.]*acquire", ptx)),
        releases_before_barrier=releases_before_barrier(ptx),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=DEVICES, default=["sm_90"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--cell", nargs="+", choices=with_kernels(), default=["formula"])
    parser.add_argument("--lengths", action="store_true", help="compile the kernels for batches with lengths")
    parser.add_argument("--h-mask", action="store_true", help="and with recurrent dropout")
    parser.add_argument("--zoneout", choices=("none", "masks", "average"), default="none", help="and with zoneout")
    parser.add_argument("--directions", type=int, choices=(1, 2), default=1, help="that run side by side")
    parser.add_argument(
        "--exchange",
        choices=(*planning.EXCHANGES, planning.RACY),
        help=f"the plan's own choice unless given; {planning.RACY!r} can be compiled here and runs nowhere",
    )
    parser.add_argument("--exchanges", type=int, choices=(1, 2), help="of a step of backward, likewise")
    parser.add_argument("--warps", type=int, help="per program, likewise")
    parser.add_argument("--split-k", action=argparse.BooleanOptionalAction, help="among the warps, likewise")
    parser.add_argument("--max-spins", type=int, help="bound every wait, for finding mistakes")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile; 1: in this one")
    return parser.parse_args()


class _Here(concurrent.futures.Executor):
    """Runs everything at once in this process."""

    def submit(self, function, /, *args, **kwargs) -> concurrent.futures.Future:
        """Return what the function made of its arguments, or raised."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def main() -> int:
    """Print the report; the exit code is 1 if a kernel does not compile, 0 otherwise."""
    arguments = _arguments()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile_report: unset TRITON_INTERPRET, which replaces the compilers by the interpreter")
    grid = itertools.product(
        arguments.kernel, arguments.arch, arguments.hidden, arguments.batch, arguments.dtype, arguments.cell
    )
    pins = planning.Pins(
        exchange=arguments.exchange,
        exchanges=arguments.exchanges,
        num_warps=arguments.warps,
        max_spins=arguments.max_spins,
        split_k=arguments.split_k,
        allow_races=True,
    )
    options = WalkOptions(arguments.lengths, arguments.h_mask, arguments.zoneout)
    cases = [Case(*sizes, options, arguments.directions, pins) for sizes in grid]
    print(f"triton {triton.__version__}, {len(cases)} kernels")
    rows, failed = [], 0
    # Fresh processes: the compilers are not made for a fork of a process with threads.
    context = multiprocessing.get_context("spawn")
    pool = (
        _Here() if arguments.jobs == 1 else concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context)
    )
    with pool:
        texts: dict[tuple, concurrent.futures.Future] = {}
        futures = []
        for case in cases:
            # What is compiled for one batch serves the others.
            text = case.text()
            if text not in texts:
                texts[text] = pool.submit(compile_kernel, case)
            futures.append((case, texts[text]))
        print(f"{len(texts)} of them differ", flush=True)
        for case, future in futures:
            try:
                row = future.result() | dict(batch=case.batch)
            except Exception as error:
                failed += 1
                print(f"FAILED {case}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            rows.append(row)
            print(_line(row), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


def _line(row: dict) -> str:
    text = (
        f"{row['arch']:7} {row['dtype']:4} H={row['hidden']:<5} B={row['batch']:<4} {row['cell']:12} "
        f"{row['kernel']:18} registers {row['registers']:3} spilled {row['spill_bytes']:4} B  "
        f"shared {row['shared_bytes']:6} B"
    )
    if "resident" in row:
        text += (
            f" (planned {row['planned_bytes']}, device {row['device_bytes']})  slices {row['slices']:3} "
            f"tile {row['block_b']}x{row['block_n']}x{row['block_k']} warps {row['num_warps']} "
            f"{'resident' if row['resident'] else 'streamed'}  weight loads in loop {row['weight_loads_in_loop']}"
            f"  barriers in a step {row['barriers']}"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
