"""How a layer is launched: a pure function from sizes and device properties to a frozen plan, and pins on its choices.

The plan enumerates the tilings that a kernel accepts, drops those that do not fit the device, and takes the one whose
modelled time per step is least. A plan measured beforehand outranks the model; see `tuned.py`. No device is needed to
plan, and nothing is measured at run time.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
import reprlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from novolstm_triton.cells import CELLS, Cell
from novolstm_triton.checks import check_int

if TYPE_CHECKING:
    from novolstm_triton.tuned import TunedPlans


MOST = 2**31 - 1
"""The largest size, count or offset of 32 bits."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a GPU that decide a plan.

    Raises:
        TypeError: a property of the wrong type.
        ValueError: a value that no device can have.
    """

    name: str
    backend: str
    """"cuda", "hip" or "interpreter"."""
    arch: int | str
    """Compute capability times ten (90), or the gfx name."""
    multiprocessors: int
    smem_bytes: int
    """Shared memory that one program may use, opted in."""
    warp_size: int = 32

    def __post_init__(self) -> None:
        """Check the properties."""
        if self.backend not in ("cuda", "hip", "interpreter"):
            raise ValueError(f"backend: expected cuda, hip or interpreter, got {reprlib.repr(self.backend)}")
        for name in ("multiprocessors", "smem_bytes", "warp_size"):
            check_int(getattr(self, name), name)


H100 = Device("H100", "cuda", 90, 132, 232448)
H200 = Device("H200", "cuda", 90, 132, 232448)
B200 = Device("B200", "cuda", 100, 148, 232448)
A100 = Device("A100", "cuda", 80, 108, 166912)
RTX_4090 = Device("RTX 4090", "cuda", 89, 128, 101376)
MI300X = Device("MI300X", "hip", "gfx942", 304, 65536, warp_size=64)
INTERPRETER = Device("interpreter", "interpreter", "cpu", 1, 2**40)
"""Triton's interpreter: it runs one program after another, so programs cannot wait for each other."""

EXCHANGES = ("none", "barrier", "words")
"""How hidden slices exchange data: a single slice does not; a counter barrier, the default; self-validating words."""

RACY = "cluster"
"""A single slice that a cluster of thread blocks computes together, through each other's shared memory: refused.

Only pins with `allow_races` take it, to see what compilers make of it.
"""

CLUSTERS = (2, 4, 8, 16)
"""Thread blocks that a cluster may have: eight everywhere, sixteen where the driver allows the non-portable size."""


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """How one persistent kernel is launched."""

    slices: int
    """Programs that share the hidden units of a batch tile."""
    units: int
    """Units per slice; the last one may hold fewer."""
    block_b: int
    """Rows per batch tile."""
    block_n: int
    """`units` padded to the tile size that tl.dot takes."""
    block_k: int
    """Units of h per tile of the K loop."""
    parts: int
    """Parts into which a tile's K is cut, one for each warp; 1 if the warps share out its columns instead."""
    in_flight: int
    """K tiles of the other operand of resident weights that are loaded before the first one is multiplied."""
    resident: bool
    """Whether the recurrent weights stay in shared memory for all steps; otherwise they stream from L2."""
    exchange: str
    ctas: int
    """Thread blocks of the cluster that is one program; 1 unless `exchange` is "cluster"."""
    exchanges: int
    """Exchanges among slices in a step: two, or, in backward at the price of a few products more, one; the plain LSTM
    has one anyway."""
    tiles: int
    """Batch tiles in all, those of every direction."""
    tiles_per_launch: int
    """Batch tiles that are resident together; the others follow in successive launches."""
    num_warps: int
    num_stages: int
    max_registers: int | None
    """Registers per thread that the compiler may use, where its own limit would spill; None leaves it alone."""
    smem_bytes: int
    """Upper bound of the shared memory of one program."""
    step_us: float
    """Modelled time of a step over all launches, in µs; good for ranking plans, not for quoting."""


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """How a layer is launched."""

    forward: KernelPlan
    backward: KernelPlan


@dataclasses.dataclass(frozen=True)
class Pins:
    """Choices that `forced` has taken out of the plan's hands; None leaves one to the plan.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value that no plan can have.
    """

    slices: int | None = None
    block_b: int | None = None
    block_k: int | None = None
    resident: bool | None = None
    exchange: str | None = None
    ctas: int | None = None
    exchanges: int | None = None
    num_warps: int | None = None
    split_k: bool | None = None
    overlap: bool | None = None
    chunk: int | None = None
    max_spins: int | None = None
    device: Device | None = None
    allow_races: bool = False
    """Take exchange="cluster", which `forced` refuses: for compilers, and the interpreter, which has no clusters."""

    def __post_init__(self) -> None:
        """Check each value by itself."""
        for name in ("slices", "block_b", "block_k", "ctas", "exchanges", "num_warps", "chunk", "max_spins"):
            if (value := getattr(self, name)) is not None:
                # Of the others the plan knows tighter limits; these two are handed on to kernels in 32 bits.
                check_int(value, name, most=MOST if name in ("chunk", "max_spins") else None)
        for name in ("block_b", "block_k"):
            if (value := getattr(self, name)) is not None and (value < 16 or value & (value - 1)):
                raise ValueError(f"{name}: expected a power of two of at least 16, got {value}")
        for name in ("resident", "split_k", "overlap"):
            if not isinstance(value := getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name}: expected a bool, got {reprlib.repr(value)}")
        if self.exchange == RACY and not self.allow_races:
            raise ValueError(
                f"exchange: expected one of {list(EXCHANGES)}, got {RACY!r}, which is refused: Triton 3.9.0 reads the "
                "shared memory of other thread blocks after a barrier of one block only, which is a race"
            )
        if self.exchange not in (None, *EXCHANGES, RACY):
            raise ValueError(f"exchange: expected one of {list(EXCHANGES)}, got {reprlib.repr(self.exchange)}")
        if self.ctas is not None and self.ctas not in (1, *CLUSTERS):
            raise ValueError(f"ctas: expected one of {[1, *CLUSTERS]}, got {self.ctas}")
        if self.exchanges is not None and self.exchanges not in (1, 2):
            raise ValueError(f"exchanges: expected 1 or 2, got {self.exchanges}")
        if self.num_warps is not None and self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps: expected a power of two from 1 to 32, got {self.num_warps}")
        if not isinstance(self.device, (Device, type(None))):
            raise TypeError(f"device: expected a plan.Device, got {type(self.device).__name__}")


_pins: contextvars.ContextVar[Pins] = contextvars.ContextVar("novolstm_pins", default=Pins())


@contextlib.contextmanager
def forced(
    *,
    slices: int | None = None,
    block_b: int | None = None,
    block_k: int | None = None,
    resident: bool | None = None,
    exchange: str | None = None,
    ctas: int | None = None,
    exchanges: int | None = None,
    num_warps: int | None = None,
    split_k: bool | None = None,
    overlap: bool | None = None,
    chunk: int | None = None,
    max_spins: int | None = None,
    device: Device | None = None,
) -> Iterator[None]:
    """Pin choices of the plan inside the `with` block; what is left out stays as it was.

    Args:
        slices: hidden slices per batch tile.
        block_b: rows per batch tile, a power of two ≥ 16.
        block_k: units of h per tile of the K loop, a power of two ≥ 16.
        resident: keep the recurrent weights in shared memory (True) or stream them from L2 (False).
        exchange: "none" (one slice), "barrier", or "words" (resident weights only). "cluster" is refused: its kernels
            have a race as Triton 3.9.0 compiles them (kernels/README.md).
        ctas: thread blocks per cluster; 1, as long as clusters are refused.
        exchanges: exchanges per step of NovoLSTM's backward with several slices, 2, or 1: companion products
            (kernels/README.md) save the second one. Its forward needs two, the plain LSTM one.
        num_warps: warps per program, a power of two from 1 to 32.
        split_k: False lets the warps share out the columns of every tile; True, or nothing, gives each warp a part of K
            where a tile has few columns.
        overlap: make the input products of the next chunk on a stream of their own, under forward's recurrence of this
            one (on a GPU).
        chunk: time steps per chunk; of the torch backend, too.
        max_spins: for finding mistakes: how often a program looks in vain for what others publish before the call
            raises RuntimeError, which names who waited for whom, instead of waiting forever. Slow: every chunk is
            waited for. A look takes about a microsecond.
        device: plan as if for this device, whatever the tensors are on.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value that no plan can have. One that this layer or device cannot have raises in the call.
    """
    given = dict(
        slices=slices,
        block_b=block_b,
        block_k=block_k,
        resident=resident,
        exchange=exchange,
        ctas=ctas,
        exchanges=exchanges,
        num_warps=num_warps,
        split_k=split_k,
        overlap=overlap,
        chunk=chunk,
        max_spins=max_spins,
        device=device,
    )
    with in_force(dataclasses.replace(_pins.get(), **{k: v for k, v in given.items() if v is not None})):
        yield


@contextlib.contextmanager
def in_force(pins: Pins) -> Iterator[None]:
    """Put pins in force that `pinned` has returned, perhaps in another thread: autograd runs backward in its own."""
    token = _pins.set(pins)
    try:
        yield
    finally:
        _pins.reset(token)


def pinned() -> Pins:
    """Return the pins in force."""
    return _pins.get()


def constant_in_graphs(function: Callable) -> Callable:
    """Let torch.compile call a function once, when it traces, and keep what it returns.

    What torch.compiler.assume_constant_result does, without its import of the compiler, which costs seconds.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@constant_in_graphs
def _pinned_chunk() -> int | None:
    return _pins.get().chunk


def chunk_steps(batch: int, hidden: int, gates: int, itemsize: int, backend: str) -> int:
    """Return how many time steps run as one chunk, at most: a shorter sequence is a single one.

    The length takes no part, so that torch.compile does not compile again when it changes.

    On a GPU ("triton") a chunk fills a budget, for its pre-activations [chunk, B, G·H] are the largest buffer of a
    call. On a CPU ("torch") its buffers should stay in the caches: about 2^16 units, yet enough rows for the products
    that make the weights' gradients, and few enough steps that preparing them costs little.
    """
    if (chunk := _pinned_chunk()) is not None:
        return chunk
    if backend == "torch":
        least, most, wanted = 8, 64, _largest(256 // batch, 2**16 // (batch * hidden))
        return -_largest(-most, -_largest(least, wanted))
    return _largest(16, CHUNK_BYTES // (batch * hidden * gates * itemsize))


def _largest(a: int, b: int) -> int:
    """Return the larger one; traced with a batch of any size, an expression of that size."""
    # PyTorch 2.11's compiler does not trace sym_max of plain numbers; max becomes sym_max where it has to.
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)  # pyright: ignore[reportReturnType]


CHUNK_BYTES = 2**26
"""Budget for the pre-activations of one chunk on a GPU: a few hundred steps at usual sizes."""


def plan(
    hidden: int,
    batch: int,
    dtype: torch.dtype,
    device: Device,
    *,
    cell: str = "formula",
    directions: int = 1,
    pins: Pins | None = None,
    plans: "TunedPlans | None" = None,
) -> LaunchPlan:
    """Return how a layer is launched. Pure: equal arguments give equal plans.

    Args:
        hidden: units H.
        batch: rows B.
        dtype: dtype of x and the weights.
        device: properties of the GPU (`pins.device` outranks it).
        cell: its name in `novolstm_triton.cells.CELLS`.
        directions: directions that run side by side, 1 or 2, each with batch tiles of its own.
        pins: choices made beforehand; None means those of `forced`.
        plans: plans measured on devices, which outrank the model and are outranked by pins; None means those in force,
            see `novolstm_triton.tuned`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or pins that the device or the sizes do not allow; the message names the
            limit and the value.
    """
    pins = _pins.get() if pins is None else pins
    _check_arguments(hidden, batch, dtype, device, cell, directions, pins)
    device = pins.device or device
    # Here, because it reads files whose entries this module checks.
    from novolstm_triton import tuned

    if plans is None:
        plans = tuned.in_force()
    if not isinstance(plans, tuned.TunedPlans):
        raise TypeError(f"plans: expected a tuned.TunedPlans, got {type(plans).__name__}")
    sizes = (hidden, batch, dtype, device)

    def best(backward: bool) -> KernelPlan:
        choices = plans.choose(*sizes, cell=cell, backward=backward, pins=pins)
        kernel_plans = candidates(*sizes, cell=cell, directions=directions, backward=backward, pins=choices)
        # The model cannot resolve small differences: of plans nearly as fast, take the one with least waiting.
        fastest = min(kernel_plan.step_us for kernel_plan in kernel_plans)
        good = [kernel_plan for kernel_plan in kernel_plans if kernel_plan.step_us <= 1.125 * fastest]
        return min(good, key=lambda c: (c.slices, c.step_us, c.block_b))

    return LaunchPlan(forward=best(False), backward=best(True))


# From published microbenchmarks of H100 and A100: clocks, bytes per clock and multiprocessor, µs. To rank plans only.
_CLOCKS_PER_US = 1980.0
_SMEM_BYTES_PER_CLOCK = 128.0
_L2_BYTES_PER_CLOCK = 38.0
_FLOPS_PER_CLOCK = 2.0 * 1270
_BARRIER_US = 0.75
_BARRIER_US_PER_SLICE = 0.004
_CLUSTER_BARRIER_US = 0.3
_CLUSTER_BARRIERS = 4
_FIXED_US = 0.3
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS = 2048
"""Elements of the largest tile whose gates, statistics and gradients eight warps can keep in registers."""
_MOST_TILES = 2**16 - 1
"""Batch tiles of a launch: what CUDA allows along a grid's second axis."""
_POINTWISE_US_PER_ELEMENT = 9 / (16 * _CLOCKS_PER_US)


def candidates(
    hidden: int,
    batch: int,
    dtype: torch.dtype,
    device: Device,
    *,
    cell: str = "formula",
    directions: int = 1,
    backward: bool,
    pins: Pins,
) -> list[KernelPlan]:
    """Return the plans of one kernel that the device and the pins allow, in no particular order.

    Args:
        hidden: units H.
        batch: rows B.
        dtype: dtype of x and the weights.
        device: properties of the GPU; `pins.device` is not looked at.
        cell: its name in `novolstm_triton.cells.CELLS`.
        directions: directions that run side by side, 1 or 2.
        backward: whether the kernel is backward's or forward's.
        pins: choices made beforehand.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or there is no plan; the message names the limit and the value.
    """
    _check_arguments(hidden, batch, dtype, device, cell, directions, pins)
    _check_pins(hidden, device, pins)
    if pins.exchange == RACY:
        _check_cluster(hidden, device, pins)
    elif pins.ctas not in (None, 1):
        raise ValueError(f"ctas: expected 1, got {pins.ctas}: only a cluster has several thread blocks")
    itemsize = dtype.itemsize
    fitting, least_smem = [], None
    residencies = (True, False) if pins.resident is None else (pins.resident,)
    if pins.exchange in ("words", RACY):
        residencies = (True,)
    blocks_b = (16, 32, 64) if pins.block_b is None else (pins.block_b,)
    # Whoever pins a tile gets it, though it may spill.
    anything = device.backend == "interpreter" or pins.slices is not None or pins.block_b is not None
    for slicing, resident, block_b in itertools.product(_slicings(hidden, device, pins), residencies, blocks_b):
        # Products of a warp group take 64 rows and run at nearly twice the rate. Backward's time is reading dz from L2.
        slow = batch >= 1024 and _has_wgmma(device) and slicing.slices > 1 and block_b < 64 and not backward
        for block_k, num_stages in _loops_k(hidden, itemsize, slicing, resident, backward, pins):
            tile = (block_b, slicing.block_n, block_k, num_stages)
            sizes = (hidden, batch, itemsize, device, CELLS[cell], directions)
            candidate = _candidate(*sizes, slicing, tile, resident, backward, pins)
            least_smem = min(candidate.smem_bytes, least_smem or candidate.smem_bytes)
            if candidate.smem_bytes <= device.smem_bytes:
                spills = not _fits_registers(hidden, device, CELLS[cell], tile, slicing.ctas, resident, backward)
                fitting.append((0 if anything else 2 * spills + slow, candidate))
                break
    if not fitting:
        raise ValueError(
            f"no plan for hidden={hidden} fits {device.name}: the least shared memory under the pins is {least_smem} "
            f"bytes, the limit {device.smem_bytes}"
        )
    least = min(flaws for flaws, _ in fitting)
    return [candidate for flaws, candidate in fitting if flaws == least]


def _check_arguments(
    hidden: int, batch: int, dtype: torch.dtype, device: Device, cell: str, directions: int, pins: Pins
) -> None:
    for name, size in (("hidden", hidden), ("batch", batch)):
        check_int(size, name, most=MOST)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {reprlib.repr(dtype)}")
    for name, value, kind in (("device", device, Device), ("pins", pins, Pins)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a plan.{kind.__name__}, got {type(value).__name__}")
    if not isinstance(cell, str) or cell not in CELLS:
        raise ValueError(f"cell: expected one of {list(CELLS)}, got {reprlib.repr(cell)}")
    if directions not in (1, 2):
        raise ValueError(f"directions: expected 1 or 2, got {reprlib.repr(directions)}")


def _fits_registers(
    hidden: int,
    device: Device,
    cell: Cell,
    tile: tuple[int, int, int, int],
    ctas: int,
    resident: bool,
    backward: bool,
) -> bool:
    """Return whether a tile's gates, statistics and gradients stay in registers; the compilers were asked.

    Tiles of 64 rows are the critical ones: with resident weights a chain of products over several K tiles spills them.
    Forward, which holds one product per gate at once, also spills 64×32 on a tensor core without wgmma; backward spills
    all of them on one with it.
    """
    block_b, block_n, block_k, _ = tile
    if block_b * block_n // ctas * _tiles_alive(cell) > _ELEMENTS:
        return False
    if block_b < 64:
        return True
    critical = _has_wgmma(device) if backward else block_n >= 32 and not _has_wgmma(device)
    return not critical and not (resident and block_k < hidden)


def _tiles_alive(cell: Cell) -> int:
    """Return by what factor a step keeps more tiles than usual: with norms of f, g and o also their x̂ and dx̂."""
    return 2 if cell.gate_norms else 1


def _has_wgmma(device: Device) -> bool:
    return isinstance(device.arch, int) and 90 <= device.arch < 120


def _check_pins(hidden: int, device: Device, pins: Pins) -> None:
    if pins.slices is not None:
        if pins.slices > hidden:
            raise ValueError(f"slices={pins.slices}: a slice needs a unit, and the layer has hidden={hidden}")
        if pins.slices > device.multiprocessors:
            raise ValueError(
                f"slices={pins.slices}: slices wait for each other and must be resident together, and "
                f"{device.name} holds {device.multiprocessors}"
            )
        if pins.exchange not in (None, RACY) and (pins.exchange == "none") != (pins.slices == 1):
            wanted = "'none'" if pins.slices == 1 else "'barrier' or 'words'"
            raise ValueError(f"exchange={pins.exchange!r}: slices={pins.slices} needs {wanted}")
    elif pins.exchange in ("barrier", "words") and (hidden == 1 or device.multiprocessors == 1):
        raise ValueError(
            f"exchange={pins.exchange!r} needs two slices: hidden={hidden}, and {device.name} holds "
            f"{device.multiprocessors} programs at once"
        )
    if pins.num_warps is not None and pins.num_warps * device.warp_size > 1024:
        raise ValueError(
            f"num_warps={pins.num_warps}: a program has at most 1024 threads, and {device.name} has "
            f"{device.warp_size} in a warp"
        )
    if pins.exchange in ("words", RACY) and pins.resident is False:
        raise ValueError(f"exchange={pins.exchange!r} needs the weights on chip, and resident=False streams them")


def _check_cluster(hidden: int, device: Device, pins: Pins) -> None:
    if not isinstance(device.arch, int) or device.arch < 90 or device.arch >= 120:
        raise ValueError(f"exchange='cluster' needs compute capability 9.0 to 10.3, and {device.name} is {device.arch}")
    if pins.slices not in (None, 1):
        raise ValueError(f"slices={pins.slices}: a cluster is a single slice")
    if pins.ctas == 1:
        raise ValueError(f"ctas=1: exchange='cluster' needs one of {list(CLUSTERS)}")
    # Each block takes a tile of its own, and tl.dot takes no smaller one.
    least = 16 * (pins.ctas or CLUSTERS[0])
    if _tile(hidden) < least:
        raise ValueError(f"exchange='cluster': {least // 16} thread blocks need hidden > {least // 2}, got {hidden}")


class _Slicing(NamedTuple):
    """How the units are shared out."""

    slices: int
    units: int
    block_n: int
    ctas: int = 1


def _slicings(hidden: int, device: Device, pins: Pins) -> Iterator[_Slicing]:
    """Yield what the pins and the device's residency allow."""
    if pins.exchange == RACY:
        for ctas in CLUSTERS if pins.ctas is None else (pins.ctas,):
            if _tile(hidden) >= 16 * ctas:
                yield _Slicing(1, hidden, _tile(hidden), ctas)
        return
    if pins.slices is not None:
        units = -(-hidden // pins.slices)
        yield _Slicing(pins.slices, units, _tile(units))
        return
    if pins.exchange in (None, "none"):
        yield _Slicing(1, hidden, _tile(hidden))
    if pins.exchange != "none":
        for block_n in (16, 32, 64, 128, 256):
            slices = -(-hidden // block_n)
            if 1 < slices <= device.multiprocessors:
                yield _Slicing(slices, block_n, block_n)
        if pins.exchange is not None and hidden <= 16:
            yield _Slicing(2, -(-hidden // 2), 16)


def _loops_k(
    hidden: int, itemsize: int, slicing: _Slicing, resident: bool, backward: bool, pins: Pins
) -> Iterator[tuple[int, int]]:
    """Yield (block_k, num_stages), the best first; later ones take less shared memory."""
    if resident and pins.block_k is not None:
        yield pins.block_k, 1
    elif resident and slicing.slices == 1:
        # One tile that is h itself: it stays in registers.
        yield slicing.block_n, 1
    elif resident:
        # In fp32 a K tile of h is split into halves of its own for tf32x3, and larger ones spill.
        for largest in (512, 256, 128) if itemsize == 2 else (64,):
            yield _block_k(hidden, largest), 1
    else:
        sizes = (128 // itemsize, 64 // itemsize, 16) if pins.block_k is None else (pins.block_k,)
        yield from ((size, stages) for size, stages in itertools.product(sizes, (3, 2, 1)) if size >= 16)


def _candidate(
    hidden: int,
    batch: int,
    itemsize: int,
    device: Device,
    cell: Cell,
    directions: int,
    slicing: _Slicing,
    tile: tuple[int, int, int, int],
    resident: bool,
    backward: bool,
    pins: Pins,
) -> KernelPlan:
    (slices, units, _, ctas), (block_b, block_n, block_k, num_stages) = slicing, tile
    recurrent = cell.recurrent
    padded_k = -(-hidden // block_k) * block_k
    local = resident and slices == 1 and block_k == block_n
    tiles = directions * -(-batch // block_b)
    together = min(tiles, device.multiprocessors // slices if slices > 1 else _MOST_TILES)
    elements = block_b * block_n // ctas
    words = slices > 1 and pins.exchange == "words"
    # Fewest that keep every register on chip, as the compile report shows: on a tile of 16 columns further warps repeat
    # the product. On AMD more warps get fewer registers.
    crowded = elements * _tiles_alive(cell) > 512 or words or (backward and elements == 512 and not resident)
    crowded = crowded or (block_b == 32 and block_k < min(hidden, 512))
    if pins.num_warps is not None:
        num_warps = pins.num_warps
    elif device.backend == "hip":
        num_warps = 4
    elif local and ctas == 1 and elements > 1024:
        num_warps = 16
    else:
        num_warps = 8 if crowded or ctas > 1 else 4
    # Here the assembler spares registers for a second program on the multiprocessor, which never comes, and spills;
    # elsewhere a limit of its own choice serves it better.
    thrifty = resident if backward else not resident or (local and num_warps >= 8)
    exchanges = 2 if cell.normalised else 1
    if pins.exchanges and backward and slices > 1 and cell.normalised:
        exchanges = pins.exchanges

    # In fp32 "tf32x3" keeps two tf32 halves of every operand.
    operand_bytes = 8 if itemsize == 4 and device.backend == "cuda" else itemsize
    # A cluster shares out the weights and the work.
    weight_bytes = recurrent * padded_k * block_n * operand_bytes // ctas
    # Where 16 rows leave a warp only a few columns, its products are one chain, each waiting for the one before: a part
    # of K each gives it all columns. Forward has a chain for every gate, unless there are so few columns that warps
    # repeat the products of others. (So they do in a tile of 32 rows; but its parts would spill.)
    least_k = 8 if device.backend == "interpreter" else 16
    few_columns = resident and not local and ctas == 1 and block_b == 16 and (backward or block_n == 16)
    splits = few_columns and device.backend != "hip" and block_k >= least_k * num_warps and pins.split_k is not False
    parts = num_warps if splits else 1

    scratch, in_flight = 4096 + 8 * elements, 1
    tile_bytes = block_b * block_k * operand_bytes
    if words:
        # They are tested all at once.
        scratch += block_b * padded_k * operand_bytes
    elif resident and not local:
        # In forward, whose gates each have a sum, larger tiles do not leave registers to load the next one early.
        most = padded_k // block_k * (recurrent if backward else 1) if backward or block_b == 16 else 1
        in_flight = max(1, min(most, (device.smem_bytes - 2048 - weight_bytes) // tile_bytes))
        # What else needs space needs it before or after.
        scratch = max(scratch + tile_bytes, 2048 + in_flight * tile_bytes)
    else:
        scratch += tile_bytes
    if parts > 1:
        # The parts of a product, in forward of four products, are added through shared memory.
        scratch = max(scratch, 2048 + (1 if backward else 4) * 4 * parts * elements)
    if not resident:
        # Forward multiplies a tile of h by all gates' weights at once, backward takes gate by gate.
        tiles_in_flight = block_k * block_n * (1 if backward else recurrent)
        scratch += num_stages * (tiles_in_flight + block_b * block_k) * operand_bytes
    smem_bytes = scratch + (weight_bytes if resident else 0)

    rounds = -(-tiles // together) if slices > 1 else -(-tiles * ctas // device.multiprocessors)
    read = weight_bytes / (_SMEM_BYTES_PER_CLOCK if resident else _L2_BYTES_PER_CLOCK)
    # Products that feed each other get their warps along the longer side of the tile; on a shorter one work repeats.
    columns = block_n // 8 if block_n > block_b else block_b // 16
    busy = min(4, num_warps, num_warps if parts > 1 else columns)
    multiply = 2 * recurrent * block_b * padded_k * block_n / ctas / (_FLOPS_PER_CLOCK * busy / 4)
    step_us = _FIXED_US + max(read, multiply) / _CLOCKS_PER_US + elements * _POINTWISE_US_PER_ELEMENT
    if ctas > 1:
        step_us += _CLUSTER_BARRIERS * _CLUSTER_BARRIER_US
    if slices > 1:
        gathered = block_b * hidden * itemsize * (recurrent if backward else 1)
        step_us += exchanges * (_BARRIER_US + _BARRIER_US_PER_SLICE * slices)
        step_us += gathered / _L2_BYTES_PER_CLOCK / _CLOCKS_PER_US
    return KernelPlan(
        slices=slices,
        units=units,
        block_b=block_b,
        block_n=block_n,
        block_k=block_k,
        parts=parts,
        in_flight=in_flight,
        resident=resident,
        exchange=RACY if ctas > 1 else "none" if slices == 1 else pins.exchange or "barrier",
        ctas=ctas,
        exchanges=exchanges,
        tiles=tiles,
        tiles_per_launch=together,
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=min(255, 2**16 // (32 * num_warps)) if device.backend == "cuda" and thrifty else None,
        smem_bytes=smem_bytes,
        step_us=step_us * rounds,
    )


def _tile(units: int) -> int:
    """Return the least power of two that holds `units` and that tl.dot takes."""
    return max(16, 1 << (units - 1).bit_length())


def _block_k(hidden: int, largest: int) -> int:
    """Return the largest K tile ≤ `largest` that pads H little; small ones cost instructions, big ones registers."""
    sizes = [size for size in (16, 32, 64, 128, 256, 512) if size <= largest]
    return max(sizes, key=lambda size: (-math.ceil(-(-hidden // size) * size / hidden * 8), size))
