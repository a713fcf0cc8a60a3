"""Recipes: defaults, overrides, presets, and the way to disk and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlxtune.errors import OutputExists, RecipeError
from mlxtune.evaluate.suite import Suite
from mlxtune.recipe.keys import table_in, values_of
from mlxtune.recipe.load import dump_recipe, load_recipe, parse_recipe
from mlxtune.recipe.presets import presets, write_preset
from mlxtune.recipe.schema import Recipe
from support.files import ROOT
from support.properties import examples

MINIMAL = """
name = "minimal"
[model]
path = "owner/model"
[[data]]
path = "train.jsonl"
"""

DEFAULTS = {
    "name": "minimal",
    "seed": 0,
    "objective": "sft",
    "model": {
        "path": "owner/model",
        "revision": None,
        "dtype": "auto",
        "quantize": None,
        "double_quantization": True,
        "dequantize": False,
        "quantized_matmul": "auto",
        "chat_template": None,
        "chat_template_kwargs": {},
        "chat_template_date": None,
    },
    "lora": {
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "target_modules": ("all-linear",),
        "exclude_modules": (),
        "layers": None,
        "rslora": False,
        "dora": False,
        "init_from": None,
    },
    "data": (
        {
            "path": "train.jsonl",
            "format": "auto",
            "columns": {},
            "split": None,
            "subset": None,
            "system": None,
            "max_samples": None,
            "epochs": None,
            "weight": None,
            "roles_to_train": ("assistant",),
            "train_on_inputs": False,
            "truncate": "error",
            "unusable": "error",
            "missing_reasoning": "empty",
            "reasoning": "refuse",
            "reasoning_tags": ("<think>", "</think>"),
            "left_out": "refuse",
        },
    ),
    "train": {
        "epochs": 3.0,
        "max_steps": None,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "warmup_steps": None,
        "decay_ratio": 0.1,
        "min_lr_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optimizer": "adamw",
        "adam_beta1": None,
        "adam_beta2": None,
        "adam_epsilon": None,
        "adam_bias_correction": None,
        "lora_plus_ratio": 1.0,
        "neftune_noise_alpha": 0.0,
        "max_seq_length": 2048,
        "packing": True,
        "gradient_checkpointing": "auto",
        "memory_limit": None,
        "wired_memory": True,
    },
    "eval": {
        "path": None,
        "format": "auto",
        "columns": {},
        "split": None,
        "subset": None,
        "max_samples": None,
        "val_size": 0.0,
        "max_overlap": 0.1,
        "steps": None,
        "patience": None,
        "suite": None,
    },
    "dpo": None,
    "judge": None,
    "checkpoint": {"steps": 100, "keep": 2},
    "log": {"steps": 5, "report_to": ()},
    "export": {
        "quantize": "auto",
        "engine": "auto",
        "to": None,
        "name": None,
        "num_ctx": None,
        "temperature": None,
        "system": None,
        "license": None,
    },
    "prep": {
        "drop_unreadable": True,
        "fix_encoding": True,
        "drop_refusals": True,
        "drop_empty": True,
        "drop_echo": True,
        "languages": (),
        "min_chars": None,
        "max_chars": None,
        "scrub": (),
        "phone_region": "US",
        "dedup": "near",
        "dedup_threshold": 0.85,
        "dedup_permutations": 128,
        "dedup_shingle": 5,
        "val_size": 0.0,
        "group_by": None,
        "balance_by": "category",
    },
}


def test_what_is_left_out_has_its_default(recipe_file):
    assert load_recipe(recipe_file(MINIMAL)).model_dump() == DEFAULTS


def test_a_recipe_without_a_name_is_called_after_its_file(recipe_file):
    assert load_recipe(recipe_file(MINIMAL.replace('name = "minimal"', ""))).name == "recipe"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.batch_size = 3", "train", "batch_size", 3),
        ("train.epochs=2", "train", "epochs", 2.0),
        ("train.packing=false", "train", "packing", False),
        ("model.path=other/model-2", "model", "path", "other/model-2"),
        ('model.path="other/model-2"', "model", "path", "other/model-2"),
        (
            'lora.target_modules=["q_proj", "v_proj"]',
            "lora",
            "target_modules",
            ("q_proj", "v_proj"),
        ),
        ("train.lr_scheduler=linear", "train", "lr_scheduler", "linear"),
        ("lora.layers=4", "lora", "layers", 4),
        ('lora.layers=[0, 1, "8-15"]', "lora", "layers", (0, 1, "8-15")),
        ("lora.init_from=runs/earlier", "lora", "init_from", "runs/earlier"),
    ],
)
def test_set_overrides_a_key(recipe_file, override, section, key, value):
    changed = load_recipe(recipe_file(MINIMAL), [override]).model_dump()
    assert changed == DEFAULTS | {section: DEFAULTS[section] | {key: value}}


def test_steps_of_warmup_take_the_place_of_the_share(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL), ["train.warmup_steps=100"])
    assert (recipe.train.warmup_steps, recipe.train.warmup_ratio) == (100, None)
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(MINIMAL), ["train.warmup_steps=100", "train.warmup_ratio=0.03"])
    assert "warmup_steps and warmup_ratio exclude each other" in caught.value.problems[0].what


def test_set_reaches_into_the_only_data_table(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL), ["data.path=other.jsonl"])
    assert [source.path for source in recipe.data] == ["other.jsonl"]


def test_set_refuses_to_choose_among_data_tables(recipe_file):
    with pytest.raises(RecipeError, match="no single table"):
        load_recipe(recipe_file(MINIMAL + '[[data]]\npath = "b.jsonl"\n'), ["data.path=c.jsonl"])


def test_the_last_override_of_a_key_counts(recipe_file):
    assert load_recipe(recipe_file(MINIMAL), ["seed=1", "seed=2"]).seed == 2


def test_scale_is_alpha_over_rank_or_over_its_root(recipe_file):
    path = recipe_file(MINIMAL + "[lora]\nrank = 16\nalpha = 32\n")
    assert load_recipe(path).lora.scale == 2
    assert load_recipe(path, ["lora.rslora=true"]).lora.scale == 8


texts = st.text(min_size=1, max_size=12)
positive = st.floats(min_value=1e-12, max_value=1e12)
counts = st.integers(min_value=1, max_value=2**31)
shares = st.floats(min_value=0, max_value=1, exclude_max=True)
blocks = st.one_of(
    st.integers(0, 99),
    st.tuples(st.integers(0, 9), st.integers(10, 99)).map("{0[0]}-{0[1]}".format),
)
recipes = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"path": texts},
            optional={
                "revision": texts,
                "quantize": st.sampled_from([2, 3, 4, 5, 6, 8, "nf4", "mxfp8"]),
                "chat_template": texts,
            },
        ),
        "data": st.lists(st.fixed_dictionaries({"path": texts}), min_size=1, max_size=3),
    },
    optional={
        "seed": st.integers(min_value=0, max_value=2**63 - 1),
        "lora": st.fixed_dictionaries(
            {"rank": counts, "alpha": positive, "dropout": shares},
            optional={
                "target_modules": st.lists(texts, min_size=1, max_size=3),
                "exclude_modules": st.lists(texts, max_size=3),
                "layers": st.one_of(counts, st.lists(blocks, min_size=1, max_size=3)),
                "rslora": st.booleans(),
                "dora": st.booleans(),
                "init_from": texts,
            },
        ),
        "train": st.fixed_dictionaries(
            {"epochs": positive, "learning_rate": positive, "warmup_ratio": shares},
            optional={"max_steps": counts, "packing": st.booleans()},
        ),
        "eval": st.one_of(
            st.fixed_dictionaries({"path": texts}),
            st.fixed_dictionaries({"val_size": st.one_of(shares, counts.map(float))}),
        ),
    },
)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dumped") / "recipe.toml"


@examples(100)
@given(recipes)
def test_a_dumped_recipe_reads_back_equal(dumped, values):
    recipe = parse_recipe(values, where="test")
    dumped.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(dumped) == recipe


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_valid_recipe_that_says_what_it_is_for(tmp_path, name):
    write_preset(tmp_path / "recipe.toml", name)
    load_recipe(tmp_path / "recipe.toml")
    assert len(presets()[name]) > 20


def test_the_default_preset_shows_every_key(tmp_path):
    write_preset(tmp_path / "recipe.toml", "default")
    head, *tables = (tmp_path / "recipe.toml").read_text().split("\n[")
    shown = {"": head} | {table.split("]")[0].strip("["): table for table in tables}
    for table, section in DEFAULTS.items():
        keys = section[0] if isinstance(section, tuple) else section
        for key in keys if isinstance(keys, dict) else ():
            assert re.search(rf"^(# )?{key} = ", shown[table], re.MULTILINE), f"{table}.{key}"


def test_the_default_preset_says_what_the_defaults_are(tmp_path):
    write_preset(tmp_path / "recipe.toml", "default")
    written = load_recipe(tmp_path / "recipe.toml").model_dump()
    chosen = {"name": written["name"], "data": written["data"]}
    chosen["model"] = DEFAULTS["model"] | {"path": written["model"]["path"]}
    # The one deviation, which the file's first line announces.
    chosen["eval"] = DEFAULTS["eval"] | {"val_size": 0.05}
    assert written == DEFAULTS | chosen
    assert [source["format"] for source in written["data"]] == ["auto"]


def test_an_unknown_preset_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(RecipeError, match="default, qlora, quickstart"):
        write_preset(tmp_path / "recipe.toml", "nope")
    assert list(tmp_path.iterdir()) == []


def test_a_preset_replaces_a_file_only_when_told_to(recipe_file):
    path = recipe_file(MINIMAL)
    with pytest.raises(OutputExists):
        write_preset(path, "quickstart")
    assert path.read_text() == MINIMAL
    write_preset(path, "quickstart", overwrite=True)
    assert load_recipe(path).name == "quickstart"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_of_the_project_loads(path):
    assert load_recipe(path).name == path.stem


def test_the_quickstart_recipe_is_the_quickstart_preset(tmp_path):
    write_preset(tmp_path / "recipe.toml", "quickstart")
    there = (ROOT / "recipes/quickstart.toml").read_text()
    assert (tmp_path / "recipe.toml").read_text() == there


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my second recipe", "my-second-recipe"),
        ("résumé (1)", "resume-1"),
        ("рецепт", "run"),
        ("-_.x", "x"),
        ("as.is-1_2", "as.is-1_2"),
    ],
)
def test_a_run_is_called_after_its_file_whatever_that_is_called(tmp_path, file, name):
    path = tmp_path / f"{file}.toml"
    path.write_text('[model]\npath = "m"\n[[data]]\npath = "d"\n')
    assert load_recipe(path).name == name


def test_every_list_of_texts_takes_a_single_one(recipe_file):
    """As PEFT's `target_modules="all-linear"`, and several as LLaMA-Factory's `lora_target`."""
    text = """
name = "x"
[model]
path = "m"
[lora]
target_modules = "all-linear"
exclude_modules = "q_proj, v_proj"
layers = "8-15"
[[data]]
path = "d"
roles_to_train = "assistant"
[log]
report_to = "wandb"
[prep]
languages = "en"
scrub = "email,ip"
"""
    recipe = load_recipe(recipe_file(text))
    assert recipe.lora.target_modules == ("all-linear",)
    assert recipe.lora.exclude_modules == ("q_proj", "v_proj")
    assert recipe.lora.layers == ("8-15",)
    assert recipe.data[0].roles_to_train == ("assistant",)
    assert recipe.log.report_to == ("wandb",)
    assert (recipe.prep.languages, recipe.prep.scrub) == (("en",), ("email", "ip"))
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


def lists(schema):
    """The keys of a schema that hold lists of texts, at any depth."""
    for name, field in schema.model_fields.items():
        if (table := table_in(field.annotation)) is not None:
            yield from ((table, key) for table, key in lists(table))
        elif get_origin(field.annotation) is tuple and name != "reasoning_tags":  # a pair
            yield schema, name


@pytest.mark.parametrize(("table", "key"), list(lists(Recipe)) + list(lists(Suite)))
def test_no_list_was_left_out(table, key):
    value = next(iter(values_of(table.model_fields[key].annotation)), "word")
    given = {"name": "x"} if "name" in table.model_fields else {}
    try:
        made = table.model_validate(given | {key: value})
    except ValidationError as error:
        assert key not in {detail["loc"][0] for detail in error.errors()}
    else:
        assert getattr(made, key) == (value,)


def test_a_preset_is_filled_with_a_model_and_data(tmp_path):
    path = tmp_path / "recipe.toml"
    write_preset(path, "default")
    before = path.read_text().splitlines()
    write_preset(path, "default", model="./m", data="my data.csv", overwrite=True)
    recipe = load_recipe(path)
    assert (recipe.model.path, recipe.data[0].path) == ("./m", "my data.csv")
    assert recipe.name == "my-data" and "run goes to runs/my-data" in path.read_text()
    after = path.read_text().splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 3
    # Comments stay, in their column.
    assert {a.find("#") == b.find("#") for a, b in changed} == {True}


@pytest.mark.parametrize(
    ("data", "name"), [("hub:x/y", "y"), ("a/train.jsonl", "train"), ("data/*.jsonl", "run")]
)
def test_a_run_is_called_after_its_data(tmp_path, data, name):
    write_preset(tmp_path / "recipe.toml", "qlora", data=data)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert (recipe.data[0].path, recipe.name) == (data, name)


def test_a_preset_of_one_model_and_its_data_is_not_filled_with_others(tmp_path):
    with pytest.raises(RecipeError, match="its own model and data"):
        write_preset(tmp_path / "recipe.toml", "quickstart", model="m")
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        write_preset(tmp_path / "recipe.toml", "quickstrt")
    assert list(tmp_path.iterdir()) == []


def test_an_objective_brings_its_table_and_its_defaults(recipe_file):
    plain = load_recipe(recipe_file(MINIMAL))
    pairs = load_recipe(recipe_file(f'objective = "dpo"\n{MINIMAL}'))
    assert plain.dpo is None and (pairs.dpo.beta, pairs.dpo.loss_type) == (0.1, "sigmoid")
    assert (plain.train.learning_rate, plain.train.epochs) == (2e-4, 3)
    assert (pairs.train.learning_rate, pairs.train.epochs) == (5e-6, 1)
    own = load_recipe(recipe_file(f'objective = "dpo"\n{MINIMAL}[train]\nlearning_rate = 1e-3\n'))
    assert (own.train.learning_rate, own.train.epochs) == (1e-3, 1)
    for recipe in (plain, pairs, own):  # and comes back as it was
        assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[dpo]\nbeta = 0.2\n", '[dpo] goes with objective = "dpo", not "sft"'),
        ('[dpo]\nloss_type = "ipo"\nlabel_smoothing = 0.1\n', "goes with sigmoid"),
    ],
)
def test_a_table_of_an_objective_is_refused_where_it_has_no_effect(recipe_file, text, says):
    objective = "" if "goes with objective" in says else 'objective = "dpo"\n'
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe_file(f"{objective}{MINIMAL}{text}"))
    [problem] = raised.value.problems
    assert says in problem.what and "it is" not in problem.what
