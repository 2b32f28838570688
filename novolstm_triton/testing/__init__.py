"""Testing tools for Triton kernels whose programs wait for each other, on a machine without a GPU.

`cooperative` runs an interpreted grid with its programs side by side, under a schedule of choice, and checks every
access to memory: races, reads of uninitialised memory, accesses outside a tensor, deadlocks. Needs greenlet (the
extra `testing`) and TRITON_INTERPRET=1 in the environment before triton is imported.
"""

from .allocations import poisoned, poisoned_allocations
from .cells import CellReport, Finding, check_cell
from .cooperative import Deadlock, ProgramError, Report, cooperative
from .happens_before import DataRace, GridError, OutOfBounds, ReadBeforeWrite, TwoWriters
from .schedules import POLICIES

__all__ = [
    "POLICIES",
    "CellReport",
    "DataRace",
    "Deadlock",
    "Finding",
    "GridError",
    "OutOfBounds",
    "ProgramError",
    "ReadBeforeWrite",
    "Report",
    "TwoWriters",
    "check_cell",
    "cooperative",
    "poisoned",
    "poisoned_allocations",
]
