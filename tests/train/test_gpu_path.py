"""The way that training takes on a GPU, computed on a CPU, gives what the CPU's way gives.

Steps compiled, few shapes, a GPU's chunks and blocks, MLX's cross-entropy.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxtune.device import as_on_gpu
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from mlxtune.train.shapes import Shapes

pytestmark = pytest.mark.slow

# Packed and padded; float and quantized weights; recomputed blocks; three optimizers.
WAYS = {
    "lora": {},
    "affine": {"model": {"quantize": 4}, "train": {"gradient_accumulation_steps": 2}},
    "nf4": {
        "model": {"quantize": "nf4"},
        "train": {"gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    },
    "padded": {"train": {"packing": False, "optimizer": "lion", "learning_rate": 1e-4}},
}


@pytest.mark.parametrize("name", WAYS)
def test_a_run_on_the_gpus_way_is_the_cpus(name, recipe, few, tmp_path, monkeypatch):
    given = {section: dict(values) for section, values in WAYS[name].items()}
    given.setdefault("model", {})["quantized_matmul"] = "expand"  # measured on GPUs otherwise
    given.setdefault("train", {})["max_steps"] = 6
    compiled: list[bool] = []
    fit = Shapes.fit

    def counted(self, *of):
        batch, known = fit(self, *of)
        compiled.append(known)
        return batch, known

    monkeypatch.setattr(Shapes, "fit", counted)
    ends = {}
    for way in ("cpu", "gpu"):
        checked = recipe(few, log={"steps": 1}, **given)
        if way == "cpu":
            run = fine_tune(checked, tmp_path / way, Silent())
            assert not compiled
        else:
            with as_on_gpu():
                run = fine_tune(checked, tmp_path / way, Silent())
            assert compiled and all(compiled)
        losses = [entry["loss"] for entry in run.metrics() if "loss" in entry]
        held_out = [e["held_out_loss"] for e in run.metrics() if "held_out_loss" in e]
        ends[way] = losses, held_out, mx.load(str(run.adapter / "adapters.safetensors"))
    (losses, held_out, adapter), (others, others_held_out, other_adapter) = ends.values()
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert others == pytest.approx(losses, rel=2e-4)
    assert others_held_out == pytest.approx(held_out, rel=2e-4)
    assert adapter.keys() == other_adapter.keys()
