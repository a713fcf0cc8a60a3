"""How much memory mlxtune may take, so that the system and other programs keep what they need."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx

GB = 10**9
# Of a machine's memory, what is left to others where the device names no limit of its own.
_OTHERS = 0.2
# Metal recommends two thirds and more of a Mac's memory to the GPU. On Macs with no more than
# this, that leaves macOS so little that it swaps or kills programs; then a part of it is taken.
_SMALL_MAC = 24 << 30
_OF_SMALL = 0.85


def machine_memory() -> int:
    """Bytes of memory: the GPU's own where it has some, else the machine's."""
    info = mx.device_info()
    # CUDA says how much memory the GPU has.
    total = info.get("total_memory") or info.get("memory_size")
    return int(total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def budget_of_mac(total: int, recommended: int) -> int:
    """Bytes that a Mac can spare.

    Args:
        total: bytes of its memory.
        recommended: Metal's recommended working set, bytes.
    """
    return int((_OF_SMALL if total <= _SMALL_MAC else 1.0) * recommended)


def memory_budget(limit: float | None = None) -> int:
    """Bytes that a verb may take: training, evaluation, chat, fusing or calibration.

    Args:
        limit: GB, as a recipe says; None for what the device can spare: on Metal its recommended
            working set (0.85 of it on Macs of up to 24 GB), four fifths of the GPU's memory or
            of the machine's elsewhere.
    """
    if limit is not None:
        return int(limit * GB)
    total = machine_memory()
    if recommended := mx.device_info().get("max_recommended_working_set_size"):
        return budget_of_mac(total, int(recommended))
    return int((1 - _OTHERS) * total)


def keep_within(budget: int) -> None:
    """Make MLX free its caches, and wait for what is being computed, before it takes more.

    It is no hard limit: a step that needs more takes more. `mx.depends` orders operations but
    does not hold back how far ahead of the GPU they are laid out; this limit does.

    Args:
        budget: bytes.
    """
    mx.set_memory_limit(budget)


def wire_weights(budget: int) -> None:
    """Keep on Metal what is there now, a model's weights, from being paged out.

    To be called when the model is loaded. What a step allocates and frees is not wired: buffers
    are seldom reused when shapes change, and wired memory that changes all the time has brought
    whole Macs down (ml-explore/mlx issue 3186).

    Args:
        budget: bytes; no more than that is wired.
    """
    if mx.metal.is_available():
        allowed = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(mx.get_active_memory(), budget, allowed))


def freed_to_keep(active: int, peak: int, budget: int) -> int:
    """Bytes of freed buffers that are worth keeping between steps.

    At least what a step takes above what stays, so that the next one of its shape allocates
    nothing; and half of what is free besides, for steps of other shapes, whose buffers fit only
    if their sizes are within 32 KiB of each other. MLX itself keeps all that the memory limit
    leaves room for (ml-explore/mlx issue 3350).

    Args:
        active: bytes that are held between steps.
        peak: bytes of the largest step so far.
        budget: bytes for everything.
    """
    return max(0, peak - active, (budget - peak) // 2)


def sequences_within(model: Any, length: int, budget: int, *, most: int = 128) -> int:
    """How many sequences can be generated at once.

    Args:
        model: an mlx-lm model, loaded; it is run on one token to see what its cache takes.
        length: tokens of the longest, prompt and answer.
        budget: bytes, of the weights too.
        most: no more than that.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    before = mx.get_active_memory()
    logits = model(mx.array([[0]]), cache=cache)
    vocabulary = logits.shape[-1]
    mx.eval(logits, [entry.state for entry in cache])
    of_one = max(1, mx.get_active_memory() - before - logits.nbytes)
    # A cache grows by `_CACHE_STEP` tokens at a time, and is copied as it grows.
    steps = -(-max(1, length) // _CACHE_STEP)
    each = 2 * steps * of_one + _LOGITS_BYTES * vocabulary
    return int(max(1, min(most, (budget - before) // each)))


# Tokens that mlx-lm's caches grow by; what a sampler keeps for each logit, bytes.
_CACHE_STEP, _LOGITS_BYTES = 256, 16
