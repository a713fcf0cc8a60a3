"""Tasks of lm-eval: what they measure, against mlx-lm on its own, and what is printed."""

from __future__ import annotations

import json
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner

from mlxtune.errors import MlxtuneError, ModelError
from mlxtune.evaluate import harness
from mlxtune.evaluate.harness import run_tasks
from mlxtune.evaluate.results import write_tasks
from support.files import write_jsonl
from support.models import save_with_unknown_tokens


def test_names_of_tasks_may_have_spaces_between_them(monkeypatch):
    verb = import_module("mlxtune.cli.evaluate")
    asked = []
    monkeypatch.setattr(verb, "prepare", lambda **_: None)
    monkeypatch.setattr(verb, "_tasks", lambda *arguments: asked.append(arguments[3]))
    assert CliRunner().invoke(verb.evaluate, ["m", "--tasks", " a, b,"]).exit_code == 0
    assert asked == [["a", "b"]]


def test_tasks_are_added_to_those_measured_before(tmp_path):
    one = {"lm_eval": "0.4.9", "results": {"a": {"acc,none": 0.5}, "b": {"acc,none": 0.1}}}
    two = {"lm_eval": "0.4.10", "results": {"b": {"acc,none": 0.2}}}
    write_tasks(one, tmp_path, limit=None, adapter=None)
    path = write_tasks(two, tmp_path, limit=7, adapter=None)
    value = json.loads(path.read_text())
    assert value["results"] == {"a": {"acc,none": 0.5}, "b": {"acc,none": 0.2}}
    assert [value["measured"][t]["limit"] for t in "ab"] == [None, 7]
    assert write_tasks(one, tmp_path, limit=None, adapter=tmp_path / "x").name == "lm-eval-x.json"


DATA = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
CHOICE = """task: spell
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""
GENERATION = """task: say
output_type: generate_until
generation_kwargs:
  until: ["<|im_end|>"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of choices, `spell`, and one of generation, `say`."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()

    def make(documents, said):
        for name, text, rows in (("spell", CHOICE, documents), ("say", GENERATION, said)):
            file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
            (folder / f"{name}.yaml").write_text((text + DATA).format(file=file))
        return folder

    return make


def logprob(model, tokens: list[int], first: int) -> float:
    """Of the tokens from `first` on, by one pass of the model over all of them."""
    rows = nn.log_softmax(model(mx.array(tokens)[None, :-1])[0].astype(mx.float32))
    of_each = mx.take_along_axis(rows, mx.array(tokens)[1:, None], axis=-1)
    return of_each[first - 1 :].sum().item()


def test_figures_of_tasks_are_those_of_mlx_lm(tiny_folder, tasks):
    model, tokenizer = mlx_lm.load(str(tiny_folder))

    def asked(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def best(question: str, choices: list[str]) -> int:
        start = tokenizer.encode(asked(question), add_special_tokens=False)
        scores = [
            logprob(model, start + tokenizer.encode(c, add_special_tokens=False), len(start))
            for c in choices
        ]
        assert abs(scores[0] - scores[1]) > 1e-3
        return scores.index(max(scores))

    # After a chat template lm-eval puts no space before a choice.
    documents = [
        {"question": q, "choices": [a, b], "answer": number % 2}
        for number, (q, a, b) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:], strict=False))
    ]
    right = [best(d["question"], d["choices"]) == d["answer"] for d in documents]
    assert 0 < sum(right) < len(right)
    prompts = [tokenizer.encode(asked(word), add_special_tokens=False) for word in WORDS]
    texts = [mlx_lm.generate(model, tokenizer, p, max_tokens=4) for p in prompts]
    said = [
        {"question": word, "answer": text if number < 2 else "nothing of the kind"}
        for number, (word, text) in enumerate(zip(WORDS, texts, strict=True))
    ]
    folder = tasks(documents, said)
    results = run_tasks(str(tiny_folder), ["spell", "say"], task_path=folder)["results"]
    assert results["spell"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert results["say"]["exact_match,none"] == pytest.approx(2 / len(WORDS))


def test_tasks_that_generate_print_json_alone(tiny_folder, tasks, tmp_path, monkeypatch, capfd):
    folder = tasks([], [{"question": "one", "answer": "x"}])
    (folder / "spell.yaml").unlink()
    verb = import_module("mlxtune.cli.evaluate")
    monkeypatch.setattr(verb, "prepare", lambda **_: None)
    monkeypatch.chdir(tmp_path)  # which is no checkout
    options = ["--tasks=say", f"--task-path={folder}", "--json"]
    verb.evaluate.main([str(tiny_folder), *options], standalone_mode=False)
    printed = capfd.readouterr()
    assert json.loads(printed.out)["results"]["say"]["exact_match,none"] == 0
    assert "batch_generate" in printed.err and "git" not in printed.err


@pytest.mark.parametrize("task", ["spell", "say"])
def test_a_task_whose_text_has_a_token_without_a_row_is_refused(task, tasks, tmp_path):
    first = save_with_unknown_tokens(tmp_path / "m")
    choices = [{"question": "an <image>", "choices": ["b", "c"], "answer": 0}]
    folder = tasks(choices, [{"question": "an <image>", "answer": "x"}])
    for name in {"spell", "say"} - {task}:
        (folder / f"{name}.yaml").unlink()
    with pytest.raises(ModelError, match=f"'<image>' has the id {first + 1}"):
        run_tasks(str(tmp_path / "m"), [task], task_path=folder)


def test_a_task_that_is_not_there(tiny_folder, tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder = tasks([{"question": "a", "choices": ["b", "c"], "answer": 0}], [])
    # Reading lm-eval's own thousands of task files takes seconds.
    few = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda *_arguments: few)
    with pytest.raises(MlxtuneError, match="no task 'spel'"):
        run_tasks(str(tiny_folder), ["spel"], task_path=folder)
