"""The workers' device: what it is, and whether it still works.

Imports torch where it is needed, so that a worker lives to report what keeps it from being imported.
"""

import os
import platform
import subprocess
from collections.abc import Callable

from .tasks import Task


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Return to the GPU the memory that nothing uses."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def unusable(device: str) -> str:
    """Return what keeps the GPU from going on after an error; empty if nothing does."""
    try:
        synchronize(device)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def describe(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Return the environment of the run."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return dict(failure="no CUDA device; --device cpu runs a smoke test of this script in Triton's interpreter")
    import triton

    from .library import launch

    settings = dict(
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        matmul_allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        matmul_allow_bf16_reduced_precision_reduction=torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        matmul_allow_fp16_reduced_precision_reduction=torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        cudnn_allow_tf32=torch.backends.cudnn.allow_tf32,
        l2_flushed=False,
    )
    software = dict(torch=torch.__version__, triton=triton.__version__, python=platform.python_version())
    software["cpus"] = os.cpu_count()
    if device == "cpu":
        return dict(device="cpu-interpreter", driver=None, cudnn=None, multiprocessors=1, **software, **settings)
    properties = torch.cuda.get_device_properties(0)
    plan_device = launch._device(torch.device("cuda", 0))
    return dict(
        device=properties.name,
        driver=nvidia_smi("driver_version"),
        nvidia_smi=nvidia_smi(
            "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
        ),
        **software,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        arch=plan_device.arch,
        multiprocessors=properties.multi_processor_count,
        smem_bytes=plan_device.smem_bytes,
        total_memory_mib=properties.total_memory >> 20,
        **settings,
    )


def nvidia_smi(fields: str) -> str | None:
    """Return what nvidia-smi says of the first GPU; None without one."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
