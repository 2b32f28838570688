"""The modelled roofline of a step of an LSTM-like layer: what the latencies and bandwidths of a device leave possible.

A step of a persistent kernel is a chain: h is gathered from the other slices, multiplied by the weights that stay on
chip, summed over warps, put through the gates, and published. Each link takes the larger of its latency and its bytes
or operations over the device's rate, and nothing overlaps another link. The products outside the recurrence run at the
device's dense rate or at its memory's, whichever is slower. A measured time divided by the sum says how far there is
still to go; the model is not fitted to any measured layer.

Sources of the constants (no GPU was used for them):

    [luo]   Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv:2402.13499; H800 PCIe,
            114 multiprocessors at 1755 MHz, and A100: latencies in clocks, L2 throughput in bytes per clock of the
            whole device, SM-to-SM latency and throughput, share of the peak that mma.sync reaches
    [sun]   Sun et al., Dissecting Tensor Cores via Microbenchmarks, arXiv:2206.02874; A100: dependent mma
    [zhang] Zhang et al., A Study of Single and Multi-device Synchronization Methods in Nvidia GPUs, arXiv:2004.05371;
            V100: shuffle and block barrier
    [jia]   Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, arXiv:1804.06826
    [graphs] NVIDIA, Constant Time Launch for Straight-Line CUDA Graphs, technical blog, 2024
    [l40]   Non-Uniform L2 Cache Latency Across the Streaming Multiprocessors of an NVIDIA L40, arXiv:2606.22588: hits
            take 222 to 339 clocks depending on the multiprocessor, 279 in the mean
    [guide] CUDA C++ Programming Guide, throughput of native arithmetic instructions; [kepler] GK110 whitepaper:
            atomics to one address, one per clock; [h100], [h200], [a100] NVIDIA's whitepaper and data sheets
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

SLOWEST_L2 = 339 / 279
"""Latency of the slowest multiprocessor's L2 hit over the mean: an exchange ends when the last slice is done [l40]."""

BARRIER_ROUND_TRIPS = 2.5
"""A counter barrier's trips to L2: the stores' acknowledgement before the release (1), the arrival's way there (½), and
a poll that starts, on average, half a trip after it (½ + ½)."""

HANDOFF_ROUND_TRIPS = 1.5
"""A word's: its way to L2 (½), and the load that finds it, half a trip late on average, data included (½ + ½)."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device's constants. Those of the L2 are times, because it runs at a clock of its own."""

    name: str
    multiprocessors: int
    clocks_per_us: float
    smem_bytes_per_clock: float
    """Per multiprocessor."""
    smem_latency: float
    """Clocks."""
    l2_latency_us: float
    """Mean latency of a hit."""
    l2_bytes_per_us: float
    """Of the whole device."""
    l2_bytes_per_clock: float
    """Per multiprocessor, at most."""
    memory_bytes_per_us: float
    dense_flops_per_us: float
    """16-bit operands, fp32 sums, whole device; fp32 operands take three tf32 products at half the rate."""
    mma_per_clock: float
    """Multiply-adds of mma.sync, 16-bit, per multiprocessor."""
    mma_latency: float = 33.0
    """Clocks of a dependent m16n8k16 [sun]."""
    shuffle_latency: float = 22.0
    """Clocks [zhang]."""
    block_barrier: float = 22.0
    """Clocks of bar.sync [zhang]."""
    arithmetic_latency: float = 4.0
    """Clocks of a dependent fp32 instruction [jia]."""
    special_per_clock: float = 16.0
    """exp, reciprocal, tanh [guide]."""
    atomics_per_clock: float = 1.0
    """To one address [kepler]."""
    cluster_latency: float | None = None
    """Clocks from one multiprocessor of a cluster to another; None where there are no clusters."""
    cluster_bytes_per_clock: float = 16.3
    """Per multiprocessor: 3.27 TB/s [luo]."""
    launch_us: float = 2.5
    """A launch that nothing hides [graphs]."""
    barrier_us: tuple[tuple[int, float], ...] = ()
    """Measured (slices, time) of a counter barrier; replaces the model of it."""
    handoff_us: float | None = None
    """Measured time of a self-validating word from one slice to another; replaces the model of it."""


_HOPPER = dict(
    multiprocessors=132,
    clocks_per_us=1980.0,  # [h100]
    smem_bytes_per_clock=128.0,  # [luo]
    smem_latency=29.0,  # [luo]
    l2_latency_us=263.0 / 1755.0,  # [luo]
    l2_bytes_per_us=3942.4 * 1755.0,  # [luo]
    l2_bytes_per_clock=64.0,  # [h100]
    dense_flops_per_us=989.4e6,  # [h100]
    mma_per_clock=2048 * 0.629,  # [h100], [luo]
    cluster_latency=180.0,  # [luo]
)
H100 = Gpu(name="H100", memory_bytes_per_us=3.35e6, **_HOPPER)  # [h100]
H200 = Gpu(name="H200", memory_bytes_per_us=4.8e6, **_HOPPER)  # [h200]
A100 = Gpu(
    name="A100",
    multiprocessors=108,
    clocks_per_us=1410.0,  # [a100]
    smem_bytes_per_clock=128.0,  # [luo]
    smem_latency=29.0,  # [luo]
    l2_latency_us=261.5 / 1410.0,  # [luo]
    l2_bytes_per_us=2007.9 * 1410.0,  # [luo]
    l2_bytes_per_clock=64.0,  # [a100]
    memory_bytes_per_us=1.555e6,  # [a100]
    dense_flops_per_us=312e6,  # [a100]
    mma_per_clock=1024.0,  # [a100]: mma.sync reaches the peak
)
GPUS = {"H100": H100, "H200": H200, "A100": A100}


def gpu_named(name: str) -> Gpu | None:
    """Return the constants of the device that PyTorch calls `name`, like "NVIDIA H200"; None if they are unknown."""
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A CPU's two constants; measured, see `bench_throughput.py`."""

    flops_per_us: float
    """Of a large matrix product in fp32."""
    bytes_per_us: float
    """Read from the cache that holds the weights."""


class Cell(NamedTuple):
    """What a step computes, other than its sizes."""

    gates: int
    exchanges: int
    """Times per forward step that slices wait for each other."""
    backward_exchanges: int
    reductions: int
    """Sums over the units of a row, per step, each over a program before it is exchanged."""
    special: int
    """exp, reciprocal and tanh per unit."""


LSTM = Cell(gates=4, exchanges=1, backward_exchanges=1, reductions=0, special=10)
NOVOLSTM = Cell(gates=5, exchanges=2, backward_exchanges=2, reductions=2, special=11)
CELLS = {"novolstm": NOVOLSTM, "nn.LSTM": LSTM}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """T, B, I, H, and the bytes of an element."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Slicing:
    """How the programs share a step; the fields of `novolstm_triton.plan.KernelPlan` that the roofline depends on."""

    slices: int
    block_b: int = 16
    exchange: str = "barrier"
    resident: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.exchange not in ("none", "barrier", "words", "cluster"):
            raise ValueError(f"exchange: expected none, barrier, words or cluster, got {self.exchange!r}")
        if self.slices < 1 or self.block_b < 1:
            raise ValueError(f"expected at least one slice and row, got slices={self.slices}, block_b={self.block_b}")
        if (self.exchange == "none") != (self.slices == 1):
            raise ValueError(f"exchange={self.exchange!r} does not go with slices={self.slices}")


def barrier_us(gpu: Gpu, slices: int) -> float:
    """Return the time of a counter barrier among `slices` programs: measured, between its neighbours, or modelled."""
    if gpu.barrier_us:
        below = max((pair for pair in gpu.barrier_us if pair[0] <= slices), default=gpu.barrier_us[0])
        above = min((pair for pair in gpu.barrier_us if pair[0] >= slices), default=gpu.barrier_us[-1])
        share = 0.0 if below[0] == above[0] else (slices - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])
    # Each slice's arrival, and one poll of its in front of the last arrival.
    queue = 2 * slices / gpu.atomics_per_clock
    return BARRIER_ROUND_TRIPS * gpu.l2_latency_us * SLOWEST_L2 + (queue + 2 * gpu.block_barrier) / gpu.clocks_per_us


def exchange_us(gpu: Gpu, slicing: Slicing) -> float:
    """Return the time from a program's last store to the first byte of the others' in its registers, in µs."""
    if slicing.exchange == "none":
        return gpu.block_barrier / gpu.clocks_per_us
    if slicing.exchange == "cluster":
        if gpu.cluster_latency is None:
            raise ValueError(f"{gpu.name} has no thread-block clusters")
        # Arrival, then a load of what is there.
        return (2 * gpu.cluster_latency + gpu.block_barrier) / gpu.clocks_per_us
    if slicing.exchange == "words":
        handoff = gpu.handoff_us or HANDOFF_ROUND_TRIPS * gpu.l2_latency_us * SLOWEST_L2
        # The test whether a word is missing is a reduction over the program.
        return handoff + (2 * gpu.block_barrier + gpu.smem_latency) / gpu.clocks_per_us
    return barrier_us(gpu, slicing.slices) + gpu.l2_latency_us * SLOWEST_L2


def recurrence_terms(
    cell: Cell, sizes: Sizes, slicing: Slicing, gpu: Gpu, *, backward: bool = False
) -> dict[str, float]:
    """Return the links of one step of the recurrence, in µs; their sum is the step's roofline.

    Args:
        cell: the cell.
        sizes: the layer's sizes.
        slicing: how programs share a step.
        gpu: the device.
        backward: whether dz of all gates is exchanged and multiplied by the transposed weights.
    """
    units = math.ceil(sizes.hidden / slicing.slices)
    # mma takes rows by sixteen.
    rows = 16 * math.ceil(min(slicing.block_b, sizes.batch) / 16)
    taken = min(slicing.block_b, sizes.batch)
    operand_bytes = sizes.itemsize * (2 if sizes.itemsize == 4 else 1)
    tiles = math.ceil(sizes.batch / slicing.block_b)
    together = min(tiles, max(1, gpu.multiprocessors // slicing.slices))
    programs = together * slicing.slices
    # Per program: what comes from the other slices, and what is staged in shared memory for the tensor cores.
    gathered = taken * sizes.hidden * sizes.itemsize * (cell.gates if backward else 1)
    clocks: dict[str, float] = {}
    if slicing.exchange == "cluster":
        clocks["gather"] = gathered / gpu.cluster_bytes_per_clock
    elif slicing.exchange != "none":
        clocks["gather"] = _l2_clocks(gpu, gathered, programs)
    # Stored once, a barrier, read once.
    clocks["stage"] = 2 * gathered / gpu.smem_bytes_per_clock + gpu.smem_latency + gpu.block_barrier

    weight_bytes = cell.gates * sizes.hidden * units * operand_bytes
    on_chip = weight_bytes / gpu.smem_bytes_per_clock
    weights = on_chip if slicing.resident else _l2_clocks(gpu, weight_bytes, programs)
    products = [_product_clocks(cell, sizes, gpu, weights, rows, units, backward, split) for split in (1, 2, 4)]
    clocks["product"], clocks["sum over warps"] = min(products, key=sum)
    # Add, σ or tanh, multiply-add, tanh, multiply, round: 20 dependent instructions.
    clocks["gates"] = taken * units * cell.special / gpu.special_per_clock + 20 * gpu.arithmetic_latency
    if cell.reductions:
        within = 5 * gpu.shuffle_latency + gpu.smem_latency + gpu.block_barrier
        clocks["row sums"] = cell.reductions * within
    terms = {name: value / gpu.clocks_per_us for name, value in clocks.items()}
    exchanges = cell.backward_exchanges if backward else cell.exchanges
    terms["exchange"] = exchanges * exchange_us(gpu, slicing)
    rounds = math.ceil(tiles / together)
    return {name: rounds * value for name, value in terms.items()}


def _product_clocks(
    cell: Cell, sizes: Sizes, gpu: Gpu, weights: float, rows: int, units: int, backward: bool, split: int
) -> tuple[float, float]:
    """Return the clocks of a step's product and of its sum over warps, `split` of which share the terms of each sum.

    A multiprocessor has four tensor cores; `weights` is the clocks in which a program reads its weights.
    """
    passes = 6 if sizes.itemsize == 4 else 1
    outputs, depth = (units, sizes.hidden * cell.gates) if backward else (units * cell.gates, sizes.hidden)
    # An mma makes eight columns.
    busy = min(1.0, split * math.ceil(outputs / 8) / 4)
    multiply = passes * rows * depth * outputs / (gpu.mma_per_clock * busy)
    dependent = passes * math.ceil(depth / 16 / split) * gpu.mma_latency
    # Each warp's sums are written, a barrier, read.
    partial = 2 * split * rows * outputs * 4 / gpu.smem_bytes_per_clock + gpu.smem_latency + gpu.block_barrier
    return max(weights, multiply, dependent), partial if split > 1 else 0.0


def _l2_clocks(gpu: Gpu, bytes_per_program: float, programs: int) -> float:
    """Return the clocks in which `programs` read that many bytes each from L2 at once."""
    alone = bytes_per_program / gpu.l2_bytes_per_clock
    return max(alone, bytes_per_program * programs / gpu.l2_bytes_per_us * gpu.clocks_per_us)


def outside_terms(cell: Cell, sizes: Sizes, gpu: Gpu, *, backward: bool = False, launches: int = 1) -> dict[str, float]:
    """Return what a step costs outside the recurrence, in µs: its share of the large products and of the launches.

    Forward: x W. Backward: the gates again (x W + h U), then dx, dW and dU.
    """
    rate = gpu.dense_flops_per_us / (6 if sizes.itemsize == 4 else 1)
    contracted = 3 * sizes.inputs + 2 * sizes.hidden if backward else sizes.inputs
    flops = 2 * sizes.batch * cell.gates * sizes.hidden * contracted
    # Forward: x read, pre-activations written and read, y written. Backward: x, y, dy, dx, and z, dz written and read.
    values = 2 * cell.gates * sizes.hidden + sizes.inputs + sizes.hidden
    if backward:
        values = 2 * values + 2 * cell.gates * sizes.hidden
    moved = sizes.batch * values * sizes.itemsize
    return {
        "large products": max(flops / rate, moved / gpu.memory_bytes_per_us),
        "launches": launches * gpu.launch_us / sizes.steps,
    }


def step_terms(
    cell: Cell,
    sizes: Sizes,
    forward: Slicing,
    gpu: Gpu,
    *,
    backward: Slicing | None = None,
    launches: int = 1,
) -> dict[str, float]:
    """Return all terms of a step in µs; with `backward`, of forward and backward together.

    Args:
        cell: the cell.
        sizes: the layer's sizes.
        forward: how forward's programs share a step.
        gpu: the device.
        backward: how backward's do; None for forward alone.
        launches: kernels started, per pass, that nothing hides.
    """
    terms = recurrence_terms(cell, sizes, forward, gpu) | outside_terms(cell, sizes, gpu, launches=launches)
    if backward is not None:
        again = recurrence_terms(cell, sizes, backward, gpu, backward=True)
        again |= outside_terms(cell, sizes, gpu, backward=True, launches=launches)
        terms = {f"forward {name}": value for name, value in terms.items()}
        terms |= {f"backward {name}": value for name, value in again.items()}
    return terms


def step_us(*args, **kwargs) -> float:
    """Return the sum of `step_terms`."""
    return sum(step_terms(*args, **kwargs).values())


def cpu_step_us(cell: Cell, sizes: Sizes, cpu: Cpu, *, backward: bool = False) -> float:
    """Return the roofline of a step on a CPU in µs; with `backward`, of forward and backward together.

    The larger of the products' operations at the rate of a large product, and the recurrent weights read once a step.
    """
    contracted = sizes.inputs + sizes.hidden
    # Backward: dx, dh, dW, dU.
    flops = 2 * sizes.batch * cell.gates * sizes.hidden * contracted * (3 if backward else 1)
    read = cell.gates * sizes.hidden * sizes.hidden * sizes.itemsize * (2 if backward else 1)
    return max(flops / cpu.flops_per_us, read / cpu.bytes_per_us)


class Anchor(NamedTuple):
    """A published measurement that the model must reproduce."""

    source: str
    cell: Cell
    sizes: Sizes
    slicing: Slicing
    gpu: Gpu
    measured_us: float


ANCHOR = Anchor(
    source="nn.LSTM fp16, cuDNN's persistent algorithm, H100, forward, input product included",
    cell=LSTM,
    sizes=Sizes(steps=1024, batch=16, inputs=768, hidden=768, itemsize=2),
    # Eight units are the narrowest tile of mma: 96 of the 132 multiprocessors.
    slicing=Slicing(slices=96),
    gpu=H100,
    measured_us=1.96,
)


def with_measured(gpu: Gpu, measured: Mapping[str, float | dict[int, float]]) -> Gpu:
    """Return the constants with those replaced that a microbenchmark has measured on the device.

    Args:
        gpu: the published constants.
        measured: any of Gpu's fields by name; `barrier_us` as {slices: µs}.

    Raises:
        ValueError: a name that is not a field, or a number that is not positive.
    """
    fields: dict = {}
    for name, value in measured.items():
        if name not in {field.name for field in dataclasses.fields(Gpu)}:
            raise ValueError(f"expected a constant of Gpu, got {name!r}")
        numbers = list(value.values()) if isinstance(value, dict) else [value]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"{name}: expected positive numbers, got {value}")
        fields[name] = tuple(sorted((int(k), v) for k, v in value.items())) if isinstance(value, dict) else value
    return dataclasses.replace(gpu, **fields)


def best_slicing(cell: Cell, sizes: Sizes, gpu: Gpu) -> Slicing:
    """Return the slicing of the least forward roofline, with either exchange: for a layer that has no plan."""
    slicings = [Slicing(1, block_b, "none") for block_b in (16, 32, 64)]
    for slices in (2, 4, 8, 16, 32, 64, 96, 128):
        if slices <= min(gpu.multiprocessors, sizes.hidden):
            slicings += [Slicing(slices, block_b, name) for block_b in (16, 32, 64) for name in ("barrier", "words")]
    return min(slicings, key=lambda slicing: step_us(cell, sizes, slicing, gpu))


def of_plan(cell: Cell, sizes: Sizes, gpu: Gpu | None, plans: Mapping | None, *, backward: bool) -> float | None:
    """Return the roofline of a step in µs under a layer's plan, or under the best slicing where it has none.

    Args:
        cell: the cell.
        sizes: the layer's sizes.
        gpu: the device; None if its constants are not known.
        plans: `novolstm_triton.plan.KernelPlan` of "forward" and of "backward"; None for another layer.
        backward: whether to count both passes.

    Returns:
        None without constants of the device, and for the backward of a layer whose way to do it is not known.
    """
    if gpu is None or (backward and plans is None):
        return None
    if plans is None:
        return step_us(cell, sizes, best_slicing(cell, sizes, gpu), gpu)
    # A cluster's thread blocks share a slice out among themselves.
    slicings = {name: Slicing(p.slices * p.ctas, p.block_b, p.exchange, p.resident) for name, p in plans.items()}
    cell = cell._replace(backward_exchanges=plans["backward"].exchanges)
    return step_us(cell, sizes, slicings["forward"], gpu, backward=slicings["backward"] if backward else None)
