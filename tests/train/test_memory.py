"""Gradient checkpointing on demand: as little as fits, and what it is measured by."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3

from mlxtune.arrays import random_key
from mlxtune.data.pack import pack, pad
from mlxtune.errors import ModelError
from mlxtune.memory import GB
from mlxtune.models.enable import enable_packs
from mlxtune.models.heads import split_head
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.memory import _MARGIN as MARGIN
from mlxtune.train.memory import blocks_to_checkpoint, keep_freed_buffers
from mlxtune.train.step import LossFunction, batch_arrays
from support.compare import distance, random_samples
from support.models import tiny, with_adapters

BATCH = pack(random_samples([150, 140, 155, 145]))
KINDS = ("llama", pytest.param("gemma3_text", marks=pytest.mark.slow))


def model_of(kind: str = "llama") -> nn.Module:
    model = with_adapters(tiny(kind, num_hidden_layers=12, intermediate_size=256))
    enable_packs(model)
    return model


def loss_and_peak(model: nn.Module) -> tuple[mx.array, int]:
    """Of a pass, weights counted in."""
    arrays = batch_arrays(BATCH)
    mx.eval(arrays)
    step = nn.value_and_grad(model, LossFunction(model))
    mx.reset_peak_memory()
    (loss, _), gradients = step(arrays, BATCH.prefix, BATCH.packed)
    mx.eval(loss, gradients)
    return loss, mx.get_peak_memory()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_stays_within_the_budget_and_no_block_too_many_is_computed_twice(kind):
    gc.collect()
    others = mx.get_active_memory()  # of tests before this one
    free, most = (loss_and_peak(model_of(kind)) for _ in range(2))
    assert distance(free[0], most[0]) < 1e-6
    everything = model_of(kind)
    checkpoint_blocks(everything, range(12))
    _, least = loss_and_peak(everything)
    assert least - others < 0.7 * (free[1] - others)
    counts = []
    for share in (0.25, 0.75, 1.5):
        own = least - others + share * (free[1] - least)
        model = model_of(kind)
        # What other tests hold is in use, and has no need of a margin.
        count = blocks_to_checkpoint(model, BATCH, int(own + others / MARGIN))
        checkpoint_blocks(model, range(count))
        loss, peak = loss_and_peak(model)
        assert distance(loss, free[0]) < 1e-5
        assert peak - others < 1.02 * own
        counts.append(count)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    # As little as that: what is saved grows with the blocks, but for the margin.
    assert 6 <= counts[0] < 12
    assert 1 <= counts[1] <= 6


@pytest.mark.parametrize("pattern", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6))])
def test_padded_models_with_windows_are_measured_in_whole_turns(pattern):
    """mlx-lm's Gemma 3 asks its last block of a turn for the mask of all like it."""
    kind = {"num_hidden_layers": 12, "sliding_window_pattern": pattern, "sliding_window": 16}
    model = with_adapters(tiny("gemma3_text", **kind))
    batch = pad(random_samples([150, 140]))
    assert blocks_to_checkpoint(model, batch, 10 * GB) == 0
    assert blocks_to_checkpoint(model, batch, 1) == 12


def test_what_the_optimizer_keeps_is_counted():
    model = model_of()
    _, most = loss_and_peak(model_of())
    budget, state = int(1.2 * most), int(0.5 * most)
    assert blocks_to_checkpoint(model, BATCH, budget) == 0
    assert blocks_to_checkpoint(model, BATCH, budget, state) > 0


def test_a_model_as_it_was_loaded_is_measured_as_it_will_train():
    """In evaluation mode its loss would keep the logits of every token."""
    model = with_adapters(tiny("llama", num_hidden_layers=2, vocab_size=65_536))
    enable_packs(model)
    arrays = batch_arrays(BATCH)
    mx.eval(arrays)
    model.train()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, LossFunction(model))(arrays, BATCH.prefix, BATCH.packed))
    needed = mx.get_peak_memory() - before
    model.eval()
    budget = mx.get_active_memory() + int(1.3 * needed)
    assert blocks_to_checkpoint(model, BATCH, budget) == 0
    assert not any(module.training for module in model.modules())


def test_the_model_is_left_whole():
    model = model_of()
    before = model(mx.array([[1, 2, 3]]))
    blocks_to_checkpoint(model, BATCH, GB)
    assert len(model.layers) == 12
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), before).item()


def test_a_model_that_cannot_be_measured_says_so():
    model = model_of()
    original = type(model.model)

    class Whole(original):
        def __call__(self, *args, **kwargs):
            assert len(self.layers) == 12
            return original.__call__(self, *args, **kwargs)

    model.model.__class__ = Whole
    with pytest.raises(ModelError, match="block by block"):
        blocks_to_checkpoint(model, BATCH, GB)
    assert len(model.layers) == 12


@pytest.mark.parametrize(
    "text",
    [
        # As MLX has them in metal/device.cpp and metal/allocator.cpp.
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        "[metal::malloc] Attempting to allocate 20000000000 bytes which is greater than the "
        "maximum allowed buffer size of 9000000000 bytes.",
    ],
)
def test_where_memory_runs_out_while_it_is_measured_every_block_is_recomputed(monkeypatch, text):
    model = model_of()

    def fails(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(mx, "eval", fails)
    assert blocks_to_checkpoint(model, BATCH, GB) == len(model.layers)


def test_a_gpu_that_was_stopped_while_it_was_measured_is_told(monkeypatch):
    watchdog = "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:)."

    def fails(*_):
        raise RuntimeError(watchdog)

    model = model_of()
    monkeypatch.setattr(mx, "eval", fails)
    with pytest.raises(RuntimeError, match="Impacting"):
        blocks_to_checkpoint(model, BATCH, GB)


def test_as_much_is_kept_of_what_was_freed_as_a_step_needs(monkeypatch):
    limits = []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    held = mx.zeros((1 << 20,))
    mx.eval(held)
    mx.reset_peak_memory()
    mx.eval(mx.zeros((3 << 20,)) + 1)  # gone again
    keep_freed_buffers(budget=0)
    assert 3 << 22 <= limits[0] < (7 << 22) - held.nbytes
    keep_freed_buffers(budget=1 << 30)  # and half of what nobody needs
    assert limits[1] == ((1 << 30) - mx.get_peak_memory()) // 2


def test_models_that_also_see_keep_no_logits_either_and_can_be_measured():
    """mlx-lm holds their language model as a part."""
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 6}
    text |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 16, "vocab_size": 128, "sliding_window": 16}
    text |= {"sliding_window_pattern": 2}
    args = gemma3.ModelArgs.from_dict(
        {"model_type": "gemma3", "text_config": text, "vocab_size": 128}
    )
    mx.random.seed(0)
    model = gemma3.Model(args)
    mx.eval(model.parameters())
    body, head = split_head(model)
    assert body is model.language_model.model and head.vocabulary == 128
    tokens = mx.array([[1, 2, 3]])
    assert distance(head(body(tokens)), model(tokens)) < 1e-6
    model, key = with_adapters(model), random_key()
    batch = pad(random_samples([30, 28]))
    assert blocks_to_checkpoint(model, batch, 1) == 6  # no budget at all: every block
    assert mx.array_equal(random_key(), key).item()
