"""Versions of the package, of its dependencies and of the GPU's driver."""

import importlib.metadata
import platform
import subprocess

import torch

import novolstm_triton


def versions() -> dict[str, str]:
    """Return versions by name, "none" for what is not installed; imports no triton and touches no GPU."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return dict(
        novolstm_triton=novolstm_triton.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton,
        cuda=torch.version.cuda or "none",
        hip=torch.version.hip or "none",
        cudnn=str(cudnn or "none"),
        driver=_driver(),
    )


def _driver() -> str:
    """Return the version of the GPU's driver."""
    if torch.version.hip is None:
        command = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    else:
        command = ["cat", "/sys/module/amdgpu/version"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"
    return output or "none"
