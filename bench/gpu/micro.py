"""Microbenchmarks of what `roofline.py` is made of, measured on the device: they replace its published constants.

barrier_us            a counter barrier among so many programs, one of the kernels' own form
handoff_us            a word from one program to another, which polls for it
l2_latency_us         a dependent load past L1, of a buffer that fits in L2
l2_bytes_per_us       all multiprocessors reading such a buffer
smem_bytes_per_clock  weights that stay on chip, read by a product of 16 rows, at the clock that nvidia-smi gives
launch_us             an empty kernel, one of many launched in a row
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .device import nvidia_smi, synchronize
from .tasks import Task

GROUPS = (2, 4, 8, 16, 32, 64, 128)


@triton.jit
def barrier_kernel(counter_ptr, words_ptr, rounds, GROUP: tl.constexpr):
    """Publish a row of words and meet at a counter barrier, `rounds` times; GROUP programs, a counter of zero."""
    words = tl.program_id(0) * 128 + tl.arange(0, 128)
    for number in range(rounds):
        tl.store(words_ptr + words, words + number)
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < (number + 1) * GROUP:
            pass


@triton.jit
def handoff_kernel(words_ptr, rounds):
    """Pass a growing word to and fro between two programs; words [2, 32] are zero, one line for each direction."""
    program = tl.program_id(0)
    for number in range(rounds):
        if program == 0:
            tl.store(words_ptr, number + 1)
            while tl.load(words_ptr + 32, volatile=True) != number + 1:
                pass
        else:
            while tl.load(words_ptr, volatile=True) != number + 1:
                pass
            tl.store(words_ptr + 32, number + 1)


@triton.jit
def chase_kernel(next_ptr, out_ptr, rounds):
    """Follow a chain of places through a buffer, past L1."""
    place = tl.load(next_ptr)
    for _ in range(rounds):
        place = tl.load(next_ptr + place, cache_modifier=".cg")
    tl.store(out_ptr, place)


@triton.jit
def read_kernel(data_ptr, out_ptr, rounds, blocks, BLOCK: tl.constexpr):
    """Read all blocks of a buffer, `rounds` times, each program from another one on, past L1."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for number in range(rounds * blocks):
        block = (number + tl.program_id(0) * 7) % blocks
        total += tl.load(data_ptr + block * BLOCK + offsets, cache_modifier=".cg")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def product_kernel(weights_ptr, h_ptr, rounds, SIZE: tl.constexpr):
    """Multiply h [16, SIZE] by the same weights again and again, each time from the result before."""
    rows, units = tl.arange(0, 16), tl.arange(0, SIZE)
    weights = tl.load(weights_ptr + units[:, None] * SIZE + units[None, :])
    h = tl.load(h_ptr + rows[:, None] * SIZE + units[None, :])
    for _ in range(rounds):
        h = tl.dot(h, weights).to(h.dtype)
    tl.store(h_ptr + rows[:, None] * SIZE + units[None, :], h)


@triton.jit
def empty_kernel(out_ptr):
    """Store one number."""
    tl.store(out_ptr, 1)


def time_us(function: Callable[[], Any], device: str) -> float:
    """Return the least time of five calls in µs, after one that compiles."""
    times = []
    for _ in range(6):
        synchronize(device)
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            began = time.perf_counter()
            function()
            times.append((time.perf_counter() - began) * 1e6)
    return min(times[1:])


def per_round_us(run: Callable[[int], Any], rounds: int, device: str) -> float:
    """Return the time of a round in µs: of so many rounds less those of a quarter, so that starting is not counted."""
    few = max(1, rounds // 4)
    return (time_us(lambda: run(rounds), device) - time_us(lambda: run(few), device)) / (rounds - few)


def barrier(device: str, group: int, rounds: int) -> float:
    """Return the time of a barrier among `group` programs in µs."""
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    words = torch.zeros(group * 128, dtype=torch.int32, device=device)

    def run(count: int) -> None:
        counter.zero_()
        barrier_kernel[(group,)](counter, words, count, GROUP=group, **_together(group))

    return per_round_us(run, rounds, device)


def handoff(device: str, rounds: int) -> float:
    """Return the time of a word from one program to another in µs."""
    words = torch.zeros(64, dtype=torch.int32, device=device)

    def run(count: int) -> None:
        words.zero_()
        handoff_kernel[(2,)](words, count, num_warps=1, **_together(2))

    return per_round_us(run, rounds, device) / 2


def l2_latency(device: str, rounds: int) -> float:
    """Return the latency of a load that hits in L2, in µs: a random cycle through 16 MiB, one place per 128 bytes."""
    lines = 2**17 if device == "cuda" else 2**6
    order = torch.randperm(lines, generator=torch.Generator().manual_seed(0)) * 32
    follow = torch.zeros(lines * 32, dtype=torch.int32)
    follow[order] = order.roll(-1).to(torch.int32)
    follow, out = follow.to(device), torch.zeros(1, dtype=torch.int32, device=device)
    # Once over everything, so that L2 holds it.
    follow.sum()
    return per_round_us(lambda count: chase_kernel[(1,)](follow, out, count, num_warps=1), rounds, device)


def l2_bytes_per_us(device: str, programs: int, rounds: int) -> float:
    """Return the rate at which `programs` read 8 MiB from L2, all together, in bytes per µs."""
    block, blocks = 4096, 512 if device == "cuda" else 2
    data = torch.ones(block * blocks, dtype=torch.int32, device=device)
    out = torch.zeros(programs, dtype=torch.int32, device=device)
    run = functools.partial(read_kernel[(programs,)], data, out)
    round_us = per_round_us(lambda count: run(count, blocks, BLOCK=block, num_warps=8), rounds, device)
    return programs * data.nbytes / round_us


def product_us(device: str, size: int, rounds: int) -> float:
    """Return the time of a product of 16 rows with bf16 weights [size, size] on chip, in µs."""
    weights = torch.zeros(size, size, dtype=torch.bfloat16, device=device)
    h = torch.zeros(16, size, dtype=torch.bfloat16, device=device)
    return per_round_us(lambda count: product_kernel[(1,)](weights, h, count, SIZE=size, num_warps=8), rounds, device)


def launch(device: str, launches: int) -> float:
    """Return the time of a launch in a row of launches, in µs."""
    out = torch.zeros(1, dtype=torch.int32, device=device)

    def run() -> None:
        for _ in range(launches):
            empty_kernel[(1,)](out, num_warps=1)

    return time_us(run, device) / launches


def _together(programs: int) -> dict[str, Any]:
    """Return the launch option of programs that wait for each other."""
    return dict(launch_cooperative_grid=True) if programs > 1 else {}


def run_micro(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Measure every constant; in the interpreter only what needs no second program, and for form's sake."""
    cuda = device == "cuda"
    rounds = 2000 if cuda else 4
    results = []

    def enter(constant: str, value: Any, unit: str) -> None:
        results.append(dict(constant=constant, value=value, unit=unit))

    announce("barrier")
    programs = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    groups = [group for group in GROUPS if group <= programs] if cuda else [1]
    enter("barrier_us", {str(group): barrier(device, group, rounds) for group in groups}, "us")
    if cuda:
        announce("handoff")
        enter("handoff_us", handoff(device, rounds), "us")
    announce("l2")
    enter("l2_latency_us", l2_latency(device, 10 * rounds), "us")
    enter("l2_bytes_per_us", l2_bytes_per_us(device, programs, 4 * max(1, rounds // 200)), "bytes/us")
    announce("launch")
    enter("launch_us", launch(device, rounds), "us")
    if cuda:
        announce("product")
        size = 256
        round_us = product_us(device, size, rounds)
        enter("resident product of 16 rows, 256 by 256", round_us, "us")
        clock = nvidia_smi("clocks.max.sm")
        if clock is not None:
            clocks_per_us = float(clock.split()[0])
            enter("clocks_per_us", clocks_per_us, "1/us")
            enter("smem_bytes_per_clock", size * size * 2 / round_us / clocks_per_us, "bytes")
    return dict(results=results)
