"""Gemma 3 270M itself, from the file that people have to the file that they ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxtune.export.bundle import export_run
from mlxtune.export.convert import convert
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune
from support import downloads
from support.files import SHELL_HELDOUT, SHELL_TRAIN, write_jsonl

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    try:
        return downloads.gemma(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf")
    except FileNotFoundError:
        pytest.skip(f"Gemma 3 270M is not here; get it with: {downloads.FETCH}")


def texts(path: Path, target: Path, count: int) -> Path:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()[:count])
    return write_jsonl(
        target, [{"text": f"{r['prompt']} => {r['expected_command']}"} for r in rows]
    )


def test_what_mlx_reads_of_it_is_what_llama_cpp_reads(gemma, tmp_path):
    """Its K-quants read by us, written as float16, run by llama.cpp against MLX."""
    made = convert(str(gemma), tmp_path / "m.gguf", file_type="f16").verified
    assert made.readback.worst_error < 1e-3
    assert made.llamacpp.places >= 40
    assert made.llamacpp.mean_kl < 1e-3 and made.llamacpp.top1 == 1


def test_qlora_on_it_is_shipped_as_it_was_trained(gemma, tmp_path):
    recipe = {
        "name": "gemma",
        "model": {"path": str(gemma)},
        "lora": {"rank": 4, "layers": 6},
        "data": [{"path": str(texts(SHELL_TRAIN, tmp_path / "train.jsonl", 48))}],
        "train": {"max_steps": 5, "batch_size": 4, "learning_rate": 2e-3},
        "eval": {"path": str(texts(SHELL_HELDOUT, tmp_path / "held.jsonl", 8)), "steps": 5},
    }
    run = fine_tune(parse_recipe(recipe, where="test"), tmp_path / "run", Silent())
    before, after = (e["held_out_loss"] for e in run.metrics() if "held_out_loss" in e)
    assert after < 0.8 * before
    shipped = export_run(run.path, file_type="q8_0").verified
    assert shipped.tried_on == "records" and shipped.llamacpp.places > 20
    assert shipped.llamacpp.mean_kl < 0.05 and shipped.llamacpp.top1 > 0.8
