"""The plan of a layer: of all that fit, the one measured to be fastest, else the one modelled to be."""

import dataclasses
from typing import TYPE_CHECKING

import torch

from novolstm_triton.plans.device import Device
from novolstm_triton.plans.limits import check_arguments
from novolstm_triton.plans.model import KernelPlan, candidates
from novolstm_triton.plans.pins import Pins, pinned

if TYPE_CHECKING:
    from novolstm_triton.plans.tuned import TunedPlans


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """How a layer is launched."""

    forward: KernelPlan
    backward: KernelPlan


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
    """Return how a layer is launched.

    Equal arguments give equal plans. Left out, `pins` and `plans` are read from what is in force, `plans` at its first
    use from files; nothing else is read, and no device is needed.

    Args:
        hidden: units H.
        batch: rows B.
        dtype: dtype of x and the weights.
        device: properties of the GPU (`pins.device` outranks it).
        cell: its name in `novolstm_triton.cells.CELLS`.
        directions: directions that run side by side, 1 or 2, each with batch tiles of its own.
        pins: choices made beforehand; None means those of `forced`.
        plans: plans measured on devices, which outrank the model and are outranked by pins; None means those in force,
            see `novolstm_triton.plans.tuned`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or pins that the device or the sizes do not allow; the message names the
            limit and the value.
    """
    pins = pinned() if pins is None else pins
    check_arguments(hidden, batch, dtype, device, cell, directions, pins)
    device = pins.device or device
    # Here: of those who import this package, few have a GPU to plan for.
    from novolstm_triton.plans import tuned

    plans = tuned.in_force() if plans is None else plans
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
