"""macOS's GPU watchdog, which may stop training while a display is on.

From macOS 26 on, work that keeps the GPU busy while the screen is drawn may be stopped with
`kIOGPUCommandBufferCallbackErrorImpactingInteractivity`. MLX's developers name a variable of
the GPU's driver that loosens its limit: https://github.com/ml-explore/mlx/issues/3267. It is
read when MLX first uses the GPU, so it is set when mlxtune is imported. The same thread has
Macs on which it was not enough, and on which the display had to sleep.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


def relax_watchdog() -> None:
    """On macOS set the variable to 1, for this process and those that it starts.

    A value that is there already stays, so `AGX_RELAX_CDM_CTXSTORE_TIMEOUT=0` keeps the
    watchdog's own limit.
    """
    if sys.platform == "darwin":
        os.environ.setdefault(VARIABLE, "1")


def is_relaxed() -> bool:
    """Whether the variable is set to 1."""
    return os.environ.get(VARIABLE) == "1"
