"""The machine that figures are of."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures are of, and how busy it was before."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
        processor = names[0] if names else processor
    preloaded = os.environ.get("LD_PRELOAD", "").split()
    return {
        "platform": platform.platform(),
        "processor": processor,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "blas": [Path(path).name for path in preloaded],
        "load": os.getloadavg()[0],
    }
