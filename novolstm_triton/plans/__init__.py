"""How a layer is launched: from sizes and the properties of a device to a frozen plan, and pins on its choices.

The plan enumerates the tilings that a kernel accepts, drops those that do not fit the device, and takes the one whose
modelled time per step is least. A plan measured beforehand outranks the model; see `tuned`. No device is needed to
plan, and nothing is measured at run time.

`device` has GPUs, `pins` the choices that are made beforehand, `chunks` the length of a chunk, `limits` what fits,
`model` the plans of one kernel with their times, `tuned` measured ones, whose files are in `data`, `choice` the plan
itself. Users call this package `novolstm_triton.plan`.
"""

from novolstm_triton.plans.choice import LaunchPlan, plan
from novolstm_triton.plans.chunks import chunk_steps, constant_in_graphs
from novolstm_triton.plans.device import (
    A100,
    B200,
    DEVICES,
    H100,
    H200,
    INTERPRETER,
    MI300X,
    MOST,
    RTX_4090,
    Device,
)
from novolstm_triton.plans.model import KernelPlan, candidates
from novolstm_triton.plans.pins import CLUSTERS, EXCHANGES, RACY, Pins, forced, in_force, pinned

__all__ = [
    "A100",
    "B200",
    "CLUSTERS",
    "DEVICES",
    "EXCHANGES",
    "H100",
    "H200",
    "INTERPRETER",
    "MI300X",
    "MOST",
    "RACY",
    "RTX_4090",
    "Device",
    "KernelPlan",
    "LaunchPlan",
    "Pins",
    "candidates",
    "chunk_steps",
    "constant_in_graphs",
    "forced",
    "in_force",
    "pinned",
    "plan",
]
