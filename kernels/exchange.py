"""How the programs of one batch tile exchange data within a step: a counter barrier around plain loads and stores.

Each batch tile has one int32 counter, zero before the launch. A program stores what it publishes and calls `arrive`;
whoever needs the data of all `SLICES` programs waits in `wait` until the counter shows that they all have arrived, then
loads with `.cg`, past the L1 cache, which other multiprocessors' stores do not reach. Counters only grow, so a
program that runs ahead never hides an arrival from one that still waits. Programs that wait for each other must be
resident together: launch cooperatively.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, SLICES: tl.constexpr):
    """Publish all stores this program has made. With one slice, order them among its own threads."""
    # Every thread's stores come before the one thread's release.
    tl.debug_barrier()
    if SLICES > 1:
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, arrivals, SLICES: tl.constexpr):
    """Wait until `arrivals` calls of `arrive` have been counted, and see all that they published."""
    if SLICES > 1:
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
            pass


@triton.jit
def publish_rows(rows_ptr, values, row, row_mask, slice, slot, batch, SLICES: tl.constexpr):
    """Store a tuple of rows [R] into this slice's places of the ring [2, B, len(values), SLICES] fp32."""
    for k in tl.static_range(len(values)):
        offset = ((slot * batch + row) * len(values) + k) * SLICES + slice
        tl.store(rows_ptr + offset, values[k], mask=row_mask)


@triton.jit
def collect_rows(rows_ptr, values, row, row_mask, slot, batch, SLICES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Load what all slices have published in `slot`: tiles [R, BLOCK_S]. A single slice takes its own `values`."""
    parts = ()
    slices = tl.arange(0, BLOCK_S)
    mask = row_mask[:, None] & (slices < SLICES)[None, :]
    for k in tl.static_range(len(values)):
        if SLICES == 1:
            parts = parts + (values[k][:, None],)
        else:
            offset = ((slot * batch + row) * len(values) + k)[:, None] * SLICES + slices[None, :]
            parts = parts + (tl.load(rows_ptr + offset, mask=mask, other=0.0, cache_modifier=".cg"),)
    return parts
