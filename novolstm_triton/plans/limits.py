"""What a device, the sizes of a layer and the pins allow."""

import reprlib

import torch

from novolstm_triton.cells import CELLS, Cell, with_kernels
from novolstm_triton.checks import check_int
from novolstm_triton.plans.device import MOST, Device
from novolstm_triton.plans.pins import CLUSTERS, RACY, Pins

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS = 2048
"""Elements of the largest tile whose gates, statistics and gradients eight warps can keep in registers."""


def check_arguments(
    hidden: int, batch: int, dtype: torch.dtype, device: Device, cell: str, directions: int, pins: Pins
) -> None:
    """Raise TypeError or ValueError for an argument of `plan` that is wrong by itself."""
    for name, size in (("hidden", hidden), ("batch", batch)):
        check_int(size, name, most=MOST)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {reprlib.repr(dtype)}")
    for name, value, kind in (("device", device, Device), ("pins", pins, Pins)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a plan.{kind.__name__}, got {type(value).__name__}")
    if not isinstance(cell, str) or cell not in CELLS:
        raise ValueError(f"cell: expected one of {with_kernels()}, got {reprlib.repr(cell)}")
    CELLS[cell].check_kernels()
    if directions not in (1, 2):
        raise ValueError(f"directions: expected 1 or 2, got {reprlib.repr(directions)}")


def check_pins(hidden: int, device: Device, pins: Pins) -> None:
    """Raise ValueError if no plan of this layer on this device has the pins."""
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


def check_cluster(hidden: int, device: Device, pins: Pins) -> None:
    """Raise ValueError if no cluster of the device computes the layer under the pins."""
    if not isinstance(device.arch, int) or device.arch < 90 or device.arch >= 120:
        raise ValueError(f"exchange='cluster' needs compute capability 9.0 to 10.3, and {device.name} is {device.arch}")
    if pins.slices not in (None, 1):
        raise ValueError(f"slices={pins.slices}: a cluster is a single slice")
    if pins.ctas == 1:
        raise ValueError(f"ctas=1: exchange='cluster' needs one of {list(CLUSTERS)}")
    # Each block takes a tile of its own, and tl.dot takes no smaller one.
    least = 16 * (pins.ctas or CLUSTERS[0])
    if tile_of(hidden) < least:
        raise ValueError(f"exchange='cluster': {least // 16} thread blocks need hidden > {least // 2}, got {hidden}")


def fits_registers(
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
    if block_b * block_n // ctas * tiles_alive(cell) > _ELEMENTS:
        return False
    if block_b < 64:
        return True
    critical = has_wgmma(device) if backward else block_n >= 32 and not has_wgmma(device)
    return not critical and not (resident and block_k < hidden)


def tiles_alive(cell: Cell) -> int:
    """Return by what factor a step keeps more tiles than usual."""
    return cell.load_kernels().tiles_alive


def has_wgmma(device: Device) -> bool:
    """Return whether the tensor cores take products of a whole warp group, of 64 rows."""
    return isinstance(device.arch, int) and 90 <= device.arch < 120


def tile_of(units: int) -> int:
    """Return the least power of two that holds `units` and that tl.dot takes."""
    return max(16, 1 << (units - 1).bit_length())
