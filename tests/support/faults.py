"""A GPU that fails, for the program as a process: functions that raise what MLX raises.

The texts are MLX's own, as its source forms them (ml-explore/mlx, commit 846d176): of
`[METAL]` in mlx/backend/metal/device.cpp, with Metal's description of the error as
ml-explore/mlx issue 3267 and ollama issue 17902 quote it; of `[metal::malloc]` and `[malloc]` in
mlx/backend/metal/allocator.cpp; of CUDA in mlx/backend/cuda/utils.cpp, around the calls of
mlx/backend/cuda/allocator.cpp and cublas_utils.cpp.

    python -m support.faults FAULT ARGUMENTS…    # the program with a fault, as JSON
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import reduce
from importlib import import_module
from typing import Any

_METAL = "[METAL] Command buffer execution failed: {} ({}:kIOGPUCommandBufferCallbackError{})."
MEMORY = _METAL.format("Insufficient Memory", "00000008", "OutOfMemory")
WATCHDOG = _METAL.format("Impacting Interactivity", "0000000e", "ImpactingInteractivity")
TIMEOUT = _METAL.format("Caused GPU Timeout Error", "00000002", "Timeout")
PAGE_FAULT = _METAL.format("Caused GPU Address Fault Error", "0000000b", "PageFault")
BUFFER = (
    "[metal::malloc] Attempting to allocate 20401094656 bytes which is greater than the maximum "
    "allowed buffer size of 9534832640 bytes."
)
RESOURCES = "[metal::malloc] Resource limit (499000) exceeded."
MALLOC = "[malloc] Unable to allocate 2147483648 bytes."
CUDA_MEMORY = "cudaMallocAsync(&data, size, stream) failed: out of memory"
CUBLAS_MEMORY = "cublasLtCreate(&storage.handle) failed with code: 3."
CUDA_FAULT = "cudaMallocManaged(&data, size) failed: an illegal memory access was encountered"


@dataclass(frozen=True)
class Failing:
    """A function that fails from one of its calls on.

    Attributes:
        place: `module:name` of the function, or `module:Class.name`.
        call: the first call that fails, from 1.
        text: what it raises; empty for Python's MemoryError.
    """

    place: str
    call: int
    text: str


def install(fault: dict[str, Any]) -> None:
    """Put a function that fails in the place of the one that is there."""
    failing = Failing(**fault)
    module, _, path = failing.place.partition(":")
    *outer, name = path.split(".")
    owner = reduce(getattr, outer, import_module(module))
    original, calls = getattr(owner, name), 0

    def instead(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < failing.call:
            return original(*arguments, **named)
        raise RuntimeError(failing.text) if failing.text else MemoryError

    setattr(owner, name, instead)


def as_json(fault: Failing) -> str:
    return json.dumps(asdict(fault))


if __name__ == "__main__":
    from mlxtune.cli import main

    install(json.loads(sys.argv.pop(1)))
    main()
