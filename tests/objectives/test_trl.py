"""Steps of TRL's own DPOTrainer, with PEFT on SmolLM2 in float32, beside ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlxtune.data.batches import Part, Plan
from mlxtune.data.passes import Layout
from mlxtune.data.render import Renderer
from mlxtune.data.rules import Rules
from mlxtune.data.sources import Source
from mlxtune.data.tokens import tokenize
from mlxtune.export.convert import convert_to_folder
from mlxtune.recipe.load import parse_recipe
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.metrics import Silent
from mlxtune.train.model import tokenizer_of
from mlxtune.train.session import fine_tune
from mlxtune.train.subject import saved_adapter
from support.files import SHELL_TRAIN, write_jsonl
from support.models import SMOLLM2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="torch is compared on Linux"),
]
STEPS, PAIRS, BETA = 3, 6, 0.1
# Large enough to learn something, and no larger: what rounding leaves would grow with it.
RATES = {"sigmoid": 0.05, "ipo": 0.003}
MODULES = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """SmolLM2 as transformers reads it, in float32."""
    path = tmp_path_factory.mktemp("smollm2") / "model"
    convert_to_folder(SMOLLM2, path, dtype="float32")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    rows = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[: 20 * PAIRS : 20]]
    made = [
        {
            "prompt": row["prompt"],
            "chosen": row["expected_command"],
            "rejected": f"echo {other['expected_command']}",
        }
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", made)


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory) -> Path:
    """An adapter of PEFT: A random, and B, so that A moves at the first step too."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM")
    )
    path = tmp_path_factory.mktemp("begun")
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def store(folder, pairs):
    """The pairs in our tokens."""
    tokenizer = tokenizer_of(ModelSection(path=str(folder)))
    return tokenize(Source(str(pairs)), Renderer(tokenizer), Rules(form="pairs"))


def ours(folder, pairs, begun, path, loss_type):
    recipe = {
        "name": "t",
        "objective": "dpo",
        "model": {"path": str(folder)},
        "lora": {"rank": 4, "alpha": 8, "target_modules": MODULES, "init_from": str(begun)},
        "data": [{"path": str(pairs)}],
        "dpo": {"beta": BETA, "loss_type": loss_type},
        "train": {
            "batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": RATES[loss_type],
            "optimizer": "sgd",
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 0.0,
            "gradient_checkpointing": False,
        },
        "log": {"steps": 1},
    }
    return fine_tune(parse_recipe(recipe, where="test"), path, Silent())


def theirs(folder, begun, store, path, kind, accumulation):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = Plan([Part(store)], 2, 1, 0, Layout())
    steps = [[r for batch in step for r in batch.records] for step in plan.steps(0, STEPS)]
    order = [record for step in steps for record in dict.fromkeys(step)]
    by_side = {(sample.record, sample.side): sample for sample in store}

    def split(record: int, side: int) -> tuple[list[int], list[int]]:
        sample = by_side[record, side]
        begin, *_, last = np.flatnonzero(sample.weights).tolist()
        return sample.tokens[:begin].tolist(), sample.tokens[begin : last + 1].tolist()

    # As texts, of which TRL makes the tokens itself; it puts the end of the turn behind answers.
    rows = [
        {
            "prompt": tokenizer.decode(split(record, 0)[0]),
            "chosen": tokenizer.decode(split(record, 0)[1][:-1]),
            "rejected": tokenizer.decode(split(record, 1)[1][:-1]),
        }
        for record in order
    ]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, begun, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATES[kind], momentum=0.9)  # as ours
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = InOrder(
        model=model,
        args=DPOConfig(
            output_dir=str(path),
            per_device_train_batch_size=2 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            max_grad_norm=0.0,
            weight_decay=0.0,
            beta=BETA,
            loss_type=[kind],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, constant),
    )
    for row, record in zip(trainer.train_dataset, order, strict=True):
        prompt, chosen = split(record, 0)
        assert (row["prompt_ids"], row["chosen_ids"]) == (prompt, chosen)
        assert row["rejected_ids"] == split(record, 1)[1]
    trainer.train()
    trainer.model.save_pretrained(path / "adapter")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entries, path / "adapter"


@pytest.mark.parametrize(("kind", "accumulation"), [("sigmoid", 1), ("ipo", 1), ("sigmoid", 2)])
def test_three_steps_are_those_of_trls_trainer(
    folder, pairs, begun, store, tmp_path, monkeypatch, kind, accumulation
):
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))
    run = ours(folder, pairs, begun, tmp_path / "run", kind)
    want, adapter = theirs(folder, begun, store, tmp_path / "trl", kind, accumulation)
    got = [entry for entry in run.metrics() if "loss" in entry]
    assert len(got) == len(want) == STEPS
    moved = max(abs(entry["loss"] - want[0]["loss"]) for entry in want)
    assert moved > 1e-2, "nothing was learned that could differ"
    for one, other in zip(got, want, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-4)
        for name in ("chosen", "rejected", "margins"):
            key = f"rewards/{name}"
            assert one[key] == pytest.approx(other[key], abs=2e-3), key
        assert one["rewards/accuracies"] == pytest.approx(other["rewards/accuracies"])
        for name in ("logps/chosen", "logps/rejected"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    start, end = (saved_adapter(path).arrays for path in (begun, adapter))
    trained = saved_adapter(run.path).arrays
    assert trained.keys() == end.keys()
    steps = {name: array - start[name] for name, array in end.items()}
    largest = max(mx.abs(step).max().item() for step in steps.values())
    for name, array in trained.items():
        off = mx.abs(array - start[name] - steps[name]).max().item()
        assert off < 1e-3 * largest, name
