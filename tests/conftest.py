"""What tests share: a tiny random model, a real one, and a finished run of each."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import psutil
import pytest

pytest.register_assert_rewrite("support")
from support import process  # noqa: E402  (before MLX is imported)

process.prepare()
from mlxtune.processes import cores  # noqa: E402
from support.files import ROOT, SHELL_HELDOUT, SHELL_TRAIN, beside, write_jsonl  # noqa: E402
from support.once import Once  # noqa: E402

pytest_plugins = ["support.browser", "support.budget", "support.leftovers"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where tests run: not in the process that hands them out, which is to begin at once."""
    handed_out = session.config.getoption("numprocesses", None)
    if handed_out and not hasattr(session.config, "workerinput"):
        return
    from support import machine

    machine.remember()


def pytest_xdist_auto_num_workers() -> int:
    """One process for each core and for every 4 GB of memory; more than four gain little."""
    return max(1, min(cores(), psutil.virtual_memory().total // (4 << 30), 4))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that processes end together, and those of the long real run
    before all others: one process makes it while the other has work that does not wait for it."""

    def later(item: pytest.Item) -> tuple[bool, bool]:
        of_run = "shell_run" in item.nodeid or "shell_run" in item.fixturenames
        return not of_run, item.get_closest_marker("slow") is None

    items.sort(key=later)


def pytest_collection_finish() -> None:
    """What is there to stay is no longer looked through for garbage: a tenth of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def recipe_file(tmp_path):
    """Writes text as a recipe."""

    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Once:
    """Makes a folder once for all workers; see `Once`."""
    own = tmp_path_factory.getbasetemp()
    return Once(own / "once" if worker_id == "master" else own.parent / "once")


@pytest.fixture(scope="session")
def smollm2():
    """The real model, packed, with our layers. Do not change it."""
    from mlxtune.recipe.schema import ModelSection
    from mlxtune.train.model import load_base
    from support.models import SMOLLM2

    return load_base(ModelSection(path=SMOLLM2))


@pytest.fixture(scope="session")
def nl2bash() -> Path:
    """Real pairs that are not part of this project (MIT)."""
    return beside("nl2bash.jsonl")


@pytest.fixture(scope="session")
def tiny_folder(once) -> Path:
    """A random two-block llama with a tokenizer of bytes, as a folder."""
    from support.models import save_tiny_model

    return once("tiny model", save_tiny_model)


@pytest.fixture(scope="session")
def tiny_run(once, recipe, few) -> Path:
    """A finished run of the tiny model: 6 steps of 4. Do not change it."""
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune

    settings = recipe(few, eval={"path": str(SHELL_HELDOUT), "max_samples": 8})
    return once("tiny run", lambda path: fine_tune(settings, path, Silent()))


@pytest.fixture(scope="session")
def trained_folder(once, recipe, few) -> Path:
    """The tiny model after ten good steps, as a folder: one that training can make worse."""
    from mlxtune.fuse import fuse_run
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune

    def make(path: Path) -> None:
        settings = recipe(few, train={"learning_rate": 3e-2, "max_steps": 10})
        fine_tune(settings, path / "run", Silent())
        fuse_run(path / "run", path / "model")

    return once("trained tiny model", make) / "model"


@pytest.fixture(scope="session")
def worse_run(once, recipe, few, trained_folder) -> Path:
    """A finished run that made its model worse, at an absurd rate. Do not change it."""
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune

    settings = recipe(
        few,
        name="worse",
        model={"path": str(trained_folder)},
        eval={"path": str(SHELL_HELDOUT), "max_samples": 8, "steps": 2},
        train={"learning_rate": 1.0},
    )
    return once("worse run", lambda path: fine_tune(settings, path, Silent()))


@pytest.fixture(scope="session")
def brief_run(once) -> Path:
    """A finished real run, a short one: SmolLM2's last blocks, 6 steps of 3."""
    sizes = ("lora.layers=2", "data.max_samples=18", "train.max_steps=6", "train.batch_size=3")
    return _quickstart(once, "brief", *sizes, "log.steps=2", "eval.max_samples=3")


@pytest.fixture(scope="session")
def shell_run(once) -> Path:
    """A finished real run: SmolLM2 on 28 intents of the shell data, 30 steps of 6."""
    sizes = ("data.max_samples=168", "train.max_steps=30", "train.batch_size=6")
    return _quickstart(once, "shell", *sizes, "log.steps=10", "eval.max_samples=28")


def _quickstart(once: Once, name: str, *changes: str) -> Path:
    from mlxtune.recipe.load import load_recipe
    from mlxtune.train.metrics import Silent
    from mlxtune.train.session import fine_tune
    from support.models import SMOLLM2

    paths = (f"model.path={SMOLLM2}", f"data.path={SHELL_TRAIN}", f"eval.path={SHELL_HELDOUT}")
    given = [f"name={name}", *paths, *changes]
    recipe = load_recipe(ROOT / "recipes/quickstart.toml", given)
    return once(name, lambda path: fine_tune(recipe, path, Silent()))


@pytest.fixture(scope="session")
def recipe(tiny_folder):
    """A recipe for a short run of the tiny model, with some of it changed."""
    from mlxtune.recipe.load import parse_recipe

    def make(data, **sections):
        values = {
            "name": "t",
            "model": {"path": str(tiny_folder)},
            "lora": {"rank": 4},
            "data": data if isinstance(data, list) else [{"path": str(data)}],
            # Checkpointing is not left to be found out by measuring, which takes as long again.
            "train": {
                "batch_size": 4,
                "max_steps": 6,
                "learning_rate": 1e-2,
                "gradient_checkpointing": False,
            },
            "log": {"steps": 1},
        }
        for name, section in sections.items():
            old = values.get(name, {})
            values[name] = {**old, **section} if isinstance(section, dict) else section
        return parse_recipe(values, where="test")

    return make


@pytest.fixture(scope="session")
def few(once) -> Path:
    """Some of the shell data's records."""

    def write(folder: Path) -> None:
        lines = SHELL_TRAIN.read_text().splitlines()[::21]
        write_jsonl(folder / "few.jsonl", map(json.loads, lines))

    return once("few", write) / "few.jsonl"


@pytest.fixture(scope="session")
def pairs(once) -> Path:
    """Preference pairs: requests of the shell data, their commands, and those of others."""

    def write(folder: Path) -> None:
        rows = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[::21]]
        others = [*rows[7:], *rows[:7]]
        write_jsonl(
            folder / "pairs.jsonl",
            [
                {
                    "prompt": row["prompt"],
                    "chosen": row["expected_command"],
                    "rejected": other["expected_command"],
                }
                for row, other in zip(rows, others, strict=True)
                if row["expected_command"] != other["expected_command"]
            ],
        )

    return once("pairs", write) / "pairs.jsonl"
