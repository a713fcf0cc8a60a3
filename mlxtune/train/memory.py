"""How many blocks are recomputed in the backward pass, so that training stays in its memory."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import flat, random_key, set_random_key
from mlxtune.data.pack import Batch
from mlxtune.errors import ModelError
from mlxtune.gpu_errors import fault_of, is_out_of_memory
from mlxtune.memory import freed_to_keep
from mlxtune.models.heads import language_model, training
from mlxtune.objectives import Objective
from mlxtune.train.step import LossFunction

# A budget is not used to the last byte: buffers are reused at other sizes.
_MARGIN = 0.95
# mlx-lm's name for how blocks with a window and without one follow each other.
_TURN = "sliding_window_pattern"


def keep_freed_buffers(budget: int) -> None:
    """Let MLX keep as many freed bytes as pays; see `freed_to_keep`.

    To be called between steps, when nothing is being computed: then what is held stays held,
    and the peak above it is what a step needs. CPUs keep nothing.

    Args:
        budget: bytes that training may take.
    """
    mx.set_cache_limit(freed_to_keep(mx.get_active_memory(), mx.get_peak_memory(), budget))


def blocks_to_checkpoint(
    model: nn.Module,
    batch: Batch,
    budget: int,
    state: int = 0,
    *,
    objective: Objective | None = None,
) -> int:
    """The fewest blocks to compute twice so that a step on `batch` stays within `budget`.

    What a block keeps is measured: what the peak of a pass rises by from a few of the
    model's blocks to a few more. Adapters, gradients and the optimizer are counted in.

    Args:
        model: with adapters in place.
        batch: the largest that will come.
        budget: bytes, of everything.
        state: bytes that the optimizer keeps.
        objective: what is trained for; by default supervised fine-tuning.

    Returns:
        All blocks, where there is not memory enough to measure a few.

    Raises:
        ModelError: the model does not run with fewer blocks, so nothing can be measured.
    """
    count = len(model.layers)
    # Blocks that look through a window stand between others, and the model asks for one of
    # each to make its masks: whole turns of them, or nothing is known of the rest.
    turn = _turn(model)
    few, more = (min(count, -(-blocks // turn) * turn) for blocks in (2, max(6, turn + 2)))
    try:
        least, most = (_peak(model, batch, blocks, objective) for blocks in (few, more))
    except _NotEnoughError:
        return count
    kept = max(1, (most - least) // max(1, more - few))
    # A checkpointed block keeps its input alone; one of them at a time is computed again.
    saved = max(1, kept - _input_bytes(model, batch))
    trained = sum(a.nbytes for a in flat(model.trainable_parameters()).values())
    without = mx.get_active_memory() + trained + state + least + (count - few) * kept
    excess = without - _MARGIN * budget
    if excess <= 0:
        return 0
    return min(count, 1 + math.ceil(excess / saved))


def _turn(model: nn.Module) -> int:
    """After how many blocks windows and full sight begin anew: a number, or `LLLG`."""
    named: Any = getattr(getattr(language_model(model), "args", None), _TURN, None)
    return max(1, len(named) if isinstance(named, str) else int(named or 1))


class _NotEnoughError(Exception):
    """A pass through a few blocks takes more memory than there is."""


def _peak(model: nn.Module, batch: Batch, blocks: int, objective: Objective | None) -> int:
    """Bytes that a pass through the first blocks takes beside what is there already."""
    loss = LossFunction(model, objective)
    arrays = loss.arrays(batch)
    body: Any = getattr(language_model(model), "model", None)
    layers = model.layers
    key = random_key()  # dropout draws, and the run begins where it would have
    try:
        mx.eval(arrays)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        body.layers = layers[:blocks]
        with training(model):  # or the loss would keep all logits
            mx.eval(nn.value_and_grad(model, loss)(arrays, batch.prefix, batch.packed))
        return max(0, mx.get_peak_memory() - before)
    except Exception as error:  # whatever an unknown architecture does without its blocks
        if is_out_of_memory(error):
            raise _NotEnoughError from error
        if fault_of(error) is not None:
            raise  # the GPU's, and no matter of the architecture
        raise ModelError(
            f"its memory cannot be measured block by block: {type(error).__name__}"
        ) from error
    finally:
        set_random_key(key)
        if body is not None:
            body.layers = layers


def _input_bytes(model: nn.Module, batch: Batch) -> int:
    """What the input of one block takes."""
    args: Any = getattr(language_model(model), "args", None)
    width = int(getattr(args, "hidden_size", 0))
    return batch.tokens.size * width * 4
