"""Choices that are taken out of a plan's hands."""

import contextlib
import contextvars
import dataclasses
import reprlib
from collections.abc import Iterator

from novolstm_triton.checks import check_int
from novolstm_triton.plans.device import MOST, Device

EXCHANGES = ("none", "barrier", "words")
"""How hidden slices exchange data: a single slice does not; a counter barrier, the default; self-validating words."""

RACY = "cluster"
"""A single slice that a cluster of thread blocks computes together, through each other's shared memory: refused.

Only pins with `allow_races` take it, to see what compilers make of it.
"""

CLUSTERS = (2, 4, 8, 16)
"""Thread blocks that a cluster may have: eight everywhere, sixteen where the driver allows the non-portable size."""


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
