"""What this machine is: chip, memory, versions, and what `mlxtune doctor` finds."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

from mlxtune.device import device_name, gpu_cores, on_cpu
from mlxtune.doctor import examine
from mlxtune.memory import memory_budget
from mlxtune.selfcheck.check import Found
from mlxtune.selfcheck.tiny import scratch
from mlxtune.watchdog import VARIABLE

_PACKAGES = ("mlxtune", "mlx", "mlx-metal", "mlx-lm", "numpy", "transformers", "tokenizers")
# Whether one is logged in at the hub, and how much tokens are kept, says nothing about the machine.
_PRIVATE = ("hub", "disk")


def this_machine() -> Found:
    """Chip, GPU cores, memory and versions."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Found(
        figures={
            "device": device_name(),
            "gpu": not on_cpu(),
            "gpu_cores": gpu_cores(),
            "processors": os.cpu_count(),
            "memory_bytes": total,
            "budget_bytes": memory_budget(None),
            "metal": mx.metal.is_available(),
            "device_info": dict(mx.device_info()),
            "macos": platform.mac_ver()[0],
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": _versions(),
            VARIABLE: os.environ.get(VARIABLE),
            "load": os.getloadavg()[0],
        }
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def findings() -> Found:
    """What `mlxtune doctor` finds; what training suffers from is an error."""
    found = [each for each in examine(scratch()) if each.topic not in _PRIVATE]
    told: list[dict[str, Any]] = [
        {"topic": each.topic, "state": each.state, "said": each.said} for each in found
    ]
    errors = tuple(f"{each.topic}: {each.said}" for each in found if each.state == "bad")
    return Found(figures={"findings": told, "platform": sys.platform}, errors=errors)
