"""What a timing means nothing without: the machine, in words that name nobody's."""

import os
import platform
from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """The processor and the versions; pytest-benchmark's own list has the host's name."""
    cpu = machine_info.get("cpu", {}).get("brand_raw") or platform.processor()
    machine_info.clear()
    machine_info |= {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }
