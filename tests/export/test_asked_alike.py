"""The prompt that is trained is the one that other programs send, with no flag given.

transformers with the fused folder and llama.cpp's server with the template that the GGUF holds
are asked for it. What it is, is written by hand, as each publisher's template has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np
import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from mlxtune.data.records import Conversation, Turn
from mlxtune.data.render import Renderer
from mlxtune.evaluate.compare import compare_run
from mlxtune.export.convert import convert
from mlxtune.fuse import fuse_run
from mlxtune.recipe.load import parse_recipe
from mlxtune.train import asking
from mlxtune.train.asking import settled
from mlxtune.train.inspection import inspect_recipe
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support import templates
from support.chats import messages
from support.files import write_jsonl
from support.llama_server import LlamaServer
from support.runs import StopAt

SYSTEM, USER, NEXT = (
    Turn("system", "Be brief."),
    Turn("user", "Is it warm?"),
    Turn("user", "And tomorrow?"),
)
PLAIN = (SYSTEM, USER, Turn("assistant", "It is."), NEXT, Turn("assistant", "Colder."))
THOUGHT = (
    SYSTEM,
    USER,
    Turn("assistant", "It is.", reasoning="The sun shines."),
    NEXT,
    Turn("assistant", "Colder.", reasoning="Clouds come."),
)


@dataclass(frozen=True)
class Family:
    """How the last answer is asked for.

    Attributes:
        template: as it was published.
        plain: the prompt of a run on records without reasoning.
        thinking: that of one on records with reasoning.
        variables: that say so, in the order in which they are told; `…` is whether it thinks.
    """

    template: str
    plain: str
    thinking: str
    variables: dict


CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it warm?<|im_end|>\n"
    "<|im_start|>assistant\n{}It is.<|im_end|>\n<|im_start|>user\nAnd tomorrow?<|im_end|>\n"
    "<|im_start|>assistant\n{}"
)
GLM = "[gMASK]<sop><|system|>Be brief.<|user|>Is it warm?<|assistant|></think>It is.<|user|>"
GLM += "And tomorrow?<|assistant|>"
DEEPSEEK = "<s>Be brief.<｜User｜>Is it warm?<｜Assistant｜><think></think>It is."
DEEPSEEK += "<｜end▁of▁sentence｜><｜User｜>And tomorrow?<｜Assistant｜>"
GEMMA = (
    "<s><|turn>system\n{}Be brief.<turn|>\n<|turn>user\nIs it warm?<turn|>\n<|turn>model\n"
    "It is.<turn|>\n<|turn>user\nAnd tomorrow?<turn|>\n<|turn>model\n{}"
)
THINKS = {"enable_thinking": ...}
FAMILIES = {
    "qwen3": Family(
        "Qwen-Qwen3-0.6B",
        CHATML.format("", "<think>\n\n</think>\n\n"),
        CHATML.format("", ""),
        THINKS,
    ),
    "qwen3.5": Family(
        "Qwen3.5-4B",
        CHATML.format("", "<think>\n\n</think>\n\n"),
        CHATML.format("", "<think>\n"),
        THINKS,
    ),
    "glm-4.7": Family(
        "GLM-4.7-Flash", f"{GLM}</think>", f"{GLM}<think>", THINKS | {"clear_thinking": True}
    ),
    "deepseek-v3.1": Family(
        "deepseek-ai-DeepSeek-V3.1",
        f"{DEEPSEEK}<think></think>",
        f"{DEEPSEEK}<think>",
        THINKS,
    ),
    "gemma4": Family(
        "google-gemma-4-31B-it",
        GEMMA.format("", "<|channel>thought\n<channel|>"),
        GEMMA.format("<|think|>\n", ""),
        THINKS,
    ),
    "nemotron3": Family(
        "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        CHATML.format("<think></think>", "<think></think>"),
        CHATML.format("<think></think>\n", "<think>\n"),
        THINKS | {"truncate_history_thinking": True},
    ),
}


def settings(folder, name, turns, **sections):
    """A recipe for a short run of such a model on one conversation, which is written there."""
    (folder / "model").mkdir()
    templates.save_model(folder / "model", name)
    write_jsonl(folder / "data.jsonl", [{"messages": messages(turns)}] * 2)
    values = {
        "name": "t",
        "model": {"path": str(folder / "model")},
        "lora": {"rank": 2},
        "data": [{"path": str(folder / "data.jsonl")}],
        "train": {"batch_size": 2, "max_steps": 1, "gradient_checkpointing": False},
    }
    for section, changed in sections.items():
        values[section] = values.get(section, {}) | changed
    return parse_recipe(values, where="test")


def trained_prompt(run, turns):
    """The text before the last answer of a run's record."""
    renderer = settled(run.recipe()).renderer()
    sample = renderer.samples(Conversation(turns))[-1]
    trained = np.flatnonzero(sample.weights)
    answer = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)[-1]
    return renderer.decode(sample.tokens[: answer[0]])


def sent_prompts(run, folder, turns):
    """What transformers sends with the fused folder, and llama.cpp's server with the GGUF."""
    fuse_run(run.path, folder / "fused")
    convert(str(run.path), folder / "model.gguf", file_type="f32")
    asked = messages(turns[:-1])
    tokenizer = AutoTokenizer.from_pretrained(folder / "fused")
    by_transformers = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=False
    )
    fields = GGUFReader(folder / "model.gguf").fields
    template = fields["tokenizer.chat_template"].contents()
    with LlamaServer(folder, template) as server:
        return by_transformers, server.prompt(asked)


@pytest.mark.parametrize("thinking", [False, True], ids=["plain", "thinking"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("qwen3", "gemma4") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_a_thinking_model_is_asked_as_it_was_trained(name, thinking, tmp_path):
    family, turns = FAMILIES[name], THOUGHT if thinking else PLAIN
    recipe = settings(tmp_path, family.template, turns)
    run = fine_tune(recipe, tmp_path / "run", Silent())
    prompt = family.thinking if thinking else family.plain
    assert trained_prompt(run, turns) == prompt
    assert sent_prompts(run, tmp_path, turns) == (prompt, prompt)

    variables = {
        key: thinking if value is ... else value for key, value in family.variables.items()
    }
    assert Run.open(run.path).recipe().model.chat_template_kwargs == variables
    said = f"enable_thinking = {str(thinking).lower()}"
    why = "records have" if thinking else "no record has"
    note = f"the model is asked with {said}, as {why} reasoning (model.chat_template_kwargs)"
    assert note in inspect_recipe(recipe, rows=1).notes


LLAMA = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {}\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Is it warm?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt is.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd tomorrow?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture
def clock(monkeypatch):
    """Sets the day on which runs begin."""

    def turn_to(day):
        class Day(date):
            today = classmethod(lambda _: day)

        monkeypatch.setattr(asking, "date", Day)

    return turn_to


@pytest.fixture
def evaluated(monkeypatch):
    """The prompts with which an evaluation asks models."""
    asked, prompt = [], Renderer.prompt

    def told(renderer, *given):
        tokens = prompt(renderer, *given)
        asked.append(renderer.decode(tokens))
        return tokens

    monkeypatch.setattr(Renderer, "prompt", told)
    return asked


def test_a_run_keeps_the_date_that_its_template_writes(clock, evaluated, tmp_path):
    recipe = settings(
        tmp_path,
        "meta-llama-Llama-3.2-3B-Instruct",
        PLAIN,
        train={"max_steps": 2},
        eval={"path": str(tmp_path / "data.jsonl"), "max_overlap": 1.0},
    )
    prompt = LLAMA.format("02 Jan 2026")
    clock(date(2026, 1, 2))
    with pytest.raises(Interrupted):
        fine_tune(recipe, tmp_path / "run", StopAt(1))
    assert Run(tmp_path / "run").recipe().model.chat_template_date == "2026-01-02"
    clock(date(2026, 3, 4))
    run = fine_tune(recipe, tmp_path / "run", Silent(), resume=True)
    assert run.recipe().model.chat_template_date == "2026-01-02"
    assert trained_prompt(run, PLAIN) == prompt
    assert sent_prompts(run, tmp_path, PLAIN) == (prompt, prompt)
    compare_run(run.path)
    assert evaluated == [prompt] * 4  # of two records, each for two models
