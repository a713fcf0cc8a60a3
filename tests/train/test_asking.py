"""How a run asks its model: settled by the data, kept with the run, the same ever after."""

from __future__ import annotations

import json
from datetime import date

import pytest
from transformers import AutoTokenizer

from mlxtune.data.records import Turn
from mlxtune.data.template_values import TemplateValues, variables_of, without_values
from mlxtune.errors import OutputExists, RecipeError
from mlxtune.export.bundle import export_run, exported_before
from mlxtune.fuse import fuse_run
from mlxtune.gguf.reader import GGUFFile
from mlxtune.models.load import restore_template
from mlxtune.recipe.load import dump_recipe, parse_recipe
from mlxtune.train import asking
from mlxtune.train.asking import asked_as, settled
from mlxtune.train.inspection import inspect_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.model import tokenizer_of
from mlxtune.train.resume import resumable
from mlxtune.train.session import fine_tune
from support import templates
from support.files import write_jsonl

# Asks for thoughts unless it is told not to, and writes the date.
TEMPLATE = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
PLAIN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
THOUGHT = [PLAIN[0], PLAIN[1] | {"reasoning_content": "c"}]
INSIDE = [PLAIN[0], {"role": "assistant", "content": "<think>c</think>b"}]


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    def make(*rows, data=None, **model):
        (tmp_path / "chat.jinja").write_text(model.pop("template", TEMPLATE))
        path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows] * 4)
        section = {"path": str(tiny_folder), "chat_template": str(tmp_path / "chat.jinja")}
        values = {
            "name": "x",
            "model": section | model,
            "data": [{"path": str(path)} | (data or {})],
            "train": {"max_steps": 2, "batch_size": 4},
            "checkpoint": {"steps": 1},
        }
        return parse_recipe(values, where="test")

    return make


@pytest.fixture
def today(monkeypatch):
    """A clock that can be set."""

    class Day(date):
        now = date(2026, 1, 2)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr(asking, "date", Day)
    return Day


@pytest.mark.parametrize(
    ("rows", "thinking"),
    [([PLAIN], False), ([PLAIN, THOUGHT], True), ([INSIDE], True)],
    ids=["none", "some", "inside the content"],
)
def test_the_data_decide_whether_the_model_is_asked_to_think(recipe, rows, thinking):
    made = settled(recipe(*rows))
    assert made.recipe.model.chat_template_kwargs == {"enable_thinking": thinking}
    [note] = [note for note in made.notes if "enable_thinking" in note]
    assert f"enable_thinking = {str(thinking).lower()}" in note
    assert ("as records have reasoning" if thinking else "as no record has reasoning") in note
    assert settled(made.recipe).recipe == made.recipe  # once is enough
    prompt = made.renderer().text((Turn("user", "a"),), ask=True)
    assert prompt.endswith("<|assistant|>" if thinking else "<|assistant|><think></think>")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("meta-llama-Llama-3.1-8B-Instruct", {}, {"date_string": "26 Jul 2024"}),
        ("LFM2.5-8B-A1B", {}, {"preserve_thinking": False}),
        (
            "GLM-4.7-Flash",
            {"enable_thinking": True},
            {"enable_thinking": True, "clear_thinking": True},
        ),
        ("GLM-4.7-Flash", {"clear_thinking": False}, {"clear_thinking": False}),
    ],
)
def test_what_llama_cpp_would_tell_the_template_otherwise_is_kept(recipe, name, given, kept):
    """Today's date, and to write the reasoning of earlier answers."""
    made = settled(recipe(PLAIN, template=templates.source(name), chat_template_kwargs=given))
    values = made.recipe.model.chat_template_kwargs
    assert values == kept | {n: v for n, v in values.items() if n == "enable_thinking"}
    told = [note for note in made.notes if "its publisher's defaults" in note]
    assert len(told) == bool(kept.keys() - given.keys())


def test_reasoning_that_is_dropped_is_not_asked_for(recipe):
    made = settled(recipe(THOUGHT, data={"reasoning": "drop"}))
    assert made.recipe.model.chat_template_kwargs == {"enable_thinking": False}


def test_the_recipe_has_the_last_word_and_a_key_that_is_not_used_is_refused(recipe):
    given = recipe(PLAIN, chat_template_kwargs={"enable_thinking": True})
    assert settled(given).recipe.model.chat_template_kwargs == {"enable_thinking": True}
    assert parse_recipe(json.loads(given.model_dump_json()), where="") == given
    with pytest.raises(RecipeError, match="no variable 'thinking': it uses enable_thinking"):
        settled(recipe(PLAIN, chat_template_kwargs={"thinking": True}))
    bare = recipe(PLAIN, template=TEMPLATE.partition("{% if enable_thinking")[0] + "{% endif %}")
    assert settled(bare).recipe.model.chat_template_kwargs == {}
    with pytest.raises(RecipeError, match="it uses none"):
        settled(
            bare.model_copy(
                update={"model": bare.model.model_copy(update={"chat_template_kwargs": {"x": 1}})}
            )
        )


@pytest.mark.parametrize("value", [{"a b": 1}, {"x": None}, {"x": {"y": 1}}, "no table"])
def test_values_that_no_template_takes_are_refused(recipe, value):
    with pytest.raises(RecipeError):
        recipe(PLAIN, chat_template_kwargs=value)
    with pytest.raises(RecipeError) as raised:
        recipe(PLAIN, chat_template_date="tomorrow")
    assert "such as 2026-01-31" in str(raised.value.problems[0])


def test_a_run_keeps_the_day_and_goes_on_with_it(recipe, today, tmp_path):
    asked = recipe(PLAIN)
    run = fine_tune(asked, tmp_path / "run", Silent())
    kept = run.recipe()
    assert kept.model.chat_template_date == "2026-01-02"
    assert kept.model.chat_template_kwargs == {"enable_thinking": False}
    today.now = date(2026, 3, 4)
    assert settled(asked).recipe.model.chat_template_date == "2026-03-04"
    # Goes on with the day of the run, though the recipe that is given again has none.
    on = asked_as(asked, kept)
    assert on.model.chat_template_date == "2026-01-02"
    longer = on.model_copy(
        update={"train": on.train.model_copy(update={"max_steps": 2})},
    )
    assert settled(longer).recipe.model == kept.model
    assert settled(kept).renderer().text((Turn("user", "a"),), ask=True).startswith("2026-01-02")


def test_an_interrupted_run_is_resumed_on_another_day(recipe, today, tmp_path):
    asked = recipe(PLAIN)
    run = fine_tune(asked, tmp_path / "run", Silent())
    whole = (run.adapter / "adapters.safetensors").read_bytes()
    # As if it had been killed after its first step.
    names = run.checkpoint_names()
    for path in sorted(run.path.glob("adapter*")):
        path.rename(tmp_path / path.name)
    run.write_status(status="interrupted")
    assert len(names) == 2
    import shutil

    shutil.rmtree(run.checkpoint(names[-1]))
    today.now = date(2026, 3, 4)
    assert not resumable(run.path, asked_as(asked, run.recipe())).changed
    again = fine_tune(asked, run.path, Silent(), resume=True)
    assert (again.adapter / "adapters.safetensors").read_bytes() == whole
    assert again.recipe().model.chat_template_date == "2026-01-02"


def test_inspect_says_how_the_model_is_asked(recipe, today):
    notes = "\n".join(inspect_recipe(recipe(PLAIN), rows=1).notes)
    assert "enable_thinking = false, as no record has reasoning" in notes
    assert "writes the date, here 2026-01-02 (model.chat_template_date)" in notes


def test_values_stand_at_the_top_of_the_template_and_come_out_again(recipe):
    made = settled(recipe(PLAIN, chat_template_date="2026-01-02")).recipe
    tokenizer = tokenizer_of(made.model)
    assert tokenizer.chat_template != TEMPLATE
    assert without_values(tokenizer.chat_template) == TEMPLATE
    again = TemplateValues({"enable_thinking": True}).written_into(tokenizer.chat_template)
    assert again.count("enable_thinking = ") == 1 and "2026" not in again
    restore_template(tokenizer)
    assert tokenizer.chat_template == TEMPLATE
    assert variables_of(TEMPLATE) == {"enable_thinking"}


def test_fuse_and_export_write_the_values_unless_the_template_is_kept(recipe, tmp_path):
    run = fine_tune(recipe(PLAIN, chat_template_date="2026-01-02"), tmp_path / "run", Silent())
    for keep in (False, True):
        fuse_run(run.path, tmp_path / f"fused {keep}", keep_template=keep)
        fused = AutoTokenizer.from_pretrained(tmp_path / f"fused {keep}").chat_template
        bundle = export_run(
            run.path, output=tmp_path / f"gguf {keep}", keep_template=keep, verify=False
        )
        gguf = GGUFFile(bundle.folder / "model.gguf").metadata["tokenizer.chat_template"]
        assert fused == gguf and without_values(fused) == TEMPLATE
        assert (fused == TEMPLATE) is keep
        assert ("enable_thinking = false" in fused.partition("values")[0]) is not keep
    # Handed over again, an export of the other kind is told from it.
    asked = {"output": tmp_path / "gguf True", "verify": False}
    assert exported_before(run.path, **asked, keep_template=True) is not None
    with pytest.raises(OutputExists, match="chat template is written otherwise"):
        exported_before(run.path, **asked)


@pytest.mark.parametrize("value", ["a\"b'\n{{ x }}{% y %}", ["a", "ü"], 1.5, True, "-%}"])
def test_any_value_is_written_so_that_the_template_reads_it(value):
    import jinja2

    template = TemplateValues({"x": value}).written_into("{{ x | tojson }}")
    assert json.loads(jinja2.Environment().from_string(template).render()) == value
    assert without_values(template) == "{{ x | tojson }}"


def test_what_is_kept_can_be_read_again(recipe):
    given = recipe(PLAIN, chat_template_kwargs={"a": [" \"', ü"], "b": 1.5, "c": False})
    import tomllib

    assert parse_recipe(tomllib.loads(dump_recipe(given)), where="") == given
