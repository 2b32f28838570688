"""GPUs as a plan sees them."""

import dataclasses
import reprlib

from novolstm_triton.checks import check_int

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

DEVICES = (H100, H200, B200, A100, RTX_4090, MI300X)
"""GPUs to plan for without having one."""

INTERPRETER = Device("interpreter", "interpreter", "cpu", 1, 2**40)
"""Triton's interpreter: it runs one program after another, so programs cannot wait for each other."""
