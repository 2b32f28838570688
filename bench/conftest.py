"""What the JSON files of pytest-benchmark say of the machine: its device and versions, and nothing that names it."""

import os
import platform

import pytest
import torch

from novolstm_triton.app.environment import versions


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    brand = output_json["machine_info"].get("cpu", {}).get("brand_raw", platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {brand}"
    output_json["machine_info"] = dict(device=device, **versions())
    # Single times take megabytes.
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
