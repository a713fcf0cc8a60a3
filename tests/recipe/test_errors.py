"""What is wrong with a recipe: everything at once, each with its key and a remedy."""

from __future__ import annotations

import tomllib

import pytest

from mlxtune.errors import RecipeError
from mlxtune.recipe.load import FOREIGN_NAMES, FOREIGN_VALUES, load_recipe

MINIMAL = """
name = "minimal"
[model]
path = "owner/model"
[[data]]
path = "train.jsonl"
"""


@pytest.fixture
def problems(recipe_file):
    """Key to (what, remedy) of all that is wrong in a recipe."""

    def find(text: str, *overrides: str) -> dict[str, tuple[str, str | None]]:
        with pytest.raises(RecipeError) as raised:
            load_recipe(recipe_file(text), overrides)
        found = raised.value.problems
        assert len({p.where for p in found}) == len(found)
        return {p.where: (p.what, p.remedy) for p in found}

    return find


@pytest.mark.parametrize("override", ["train.batch_size", "=3", "train.=3", "name.x=3"])
def test_an_override_of_no_key_is_refused(recipe_file, override):
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe_file(MINIMAL), [override])
    assert raised.value.where == "--set"


def test_an_override_is_checked_like_the_file(problems):
    assert problems(MINIMAL, "train.batch_size=many", "train.lerning_rate=1").keys() == {
        "train.batch_size",
        "train.lerning_rate",
    }


def test_all_errors_of_a_recipe_are_told_at_once(problems):
    text = """
name = "../escape"
[model]
quantize = 7
[lora]
rank = 0
dropout = 1.0
target_modules = []
[train]
batch_size = "16"
warmup_ratio = -0.1
lr_scheduler = "cosin"
packing = "yes"
lerning_rate = 1e-4
[eval]
val_size = 1.5
[nonsense]
"""
    assert problems(text).keys() == {
        "name",
        "model.path",
        "model.quantize",
        "lora.rank",
        "lora.dropout",
        "lora.target_modules",
        "data",
        "train.batch_size",
        "train.warmup_ratio",
        "train.lr_scheduler",
        "train.packing",
        "train.lerning_rate",
        "eval.val_size",
        "nonsense",
    }


def test_a_typo_gets_the_nearest_key(problems):
    found = problems(MINIMAL + "[train]\nlerning_rate = 1e-4\n")
    assert found == {"train.lerning_rate": ("unknown key", "did you mean learning_rate?")}


def test_a_typo_in_a_table_gets_the_nearest_table(problems):
    found = problems(MINIMAL + "[trian]\nepochs = 1\n")
    assert found == {"trian": ("unknown key", "did you mean train?")}


def test_a_wrong_key_in_a_data_table_is_the_only_problem(problems):
    found = problems(MINIMAL + 'pth = "x"\n')
    assert found == {"data[0].pth": ("unknown key", "did you mean path?")}


@pytest.mark.parametrize(
    ("table", "foreign", "ours"),
    [
        ("train", "per_device_train_batch_size", "train.batch_size"),
        ("train", "micro_batch_size", "train.batch_size"),
        ("lora", "lora_r", "lora.rank"),
        ("lora", "r", "lora.rank"),
        ("train", "sequence_len", "train.max_seq_length"),
        ("train", "num_train_epochs", "train.epochs"),
        ("train", "lr", "train.learning_rate"),
        ("train", "lr_scheduler_type", "train.lr_scheduler"),
        ("train", "iters", "train.max_steps"),
        ("model", "load_in_4bit", "model.quantize = 4"),
        ("checkpoint", "save_total_limit", "checkpoint.keep"),
        ("eval", "val_set_size", "eval.val_size"),
        ("train", "type", "[[data]] format"),
        ("lora", "use_dora", "lora.dora"),
        ("lora", "layers_to_transform", "lora.layers"),
        ("lora", "resume_adapter_file", "lora.init_from (its folder)"),
    ],
)
def test_the_names_of_other_trainers_are_known(problems, table, foreign, ours):
    text = MINIMAL.replace("[model]", f"[model]\n{foreign} = 1")
    if table != "model":
        text = MINIMAL + f"[{table}]\n{foreign} = 1\n"
    what, remedy = problems(text)[f"{table}.{foreign}"]
    assert what == "unknown key"
    assert remedy == f"here it is called {ours}"


def test_every_foreign_name_leads_to_a_key_there_is(recipe_file):
    values = load_recipe(recipe_file(f'objective = "dpo"\n{MINIMAL}')).model_dump()
    keys = {f"{table}.{key}" for table, v in values.items() if isinstance(v, dict) for key in v}
    keys |= {f"[{table}]" for table in values} | {"[[data]]", *values}
    assert {ours.split()[0] for ours in FOREIGN_NAMES.values()} <= keys


@pytest.mark.parametrize(
    ("key", "foreign", "ours"),
    [
        (key, foreign, ours)
        for key, values in FOREIGN_VALUES.items()
        for foreign, ours in values.items()
    ],
)
def test_the_values_of_other_trainers_are_known(problems, recipe_file, key, foreign, ours):
    assert problems(MINIMAL, f"{key}={foreign}")[key][1] == f"here it is called {ours}"
    load_recipe(recipe_file(MINIMAL), [f"{key}={ours.partition(',')[0]}"])


def test_other_wrong_values_are_answered_with_those_there_are(problems):
    what, remedy = problems(MINIMAL, "train.optimizer=adagrad")["train.optimizer"]
    assert "'adamw_8bit'" in what and remedy is None


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("train.optimizer=sgd", "train.adam_beta1=0.5", "adam_beta1 goes with adamw,"),
        ("train.optimizer=lion", "train.adam_epsilon=1e-6", "adam_epsilon goes with adamw,"),
        ("train.lr_scheduler=constant", "train.min_lr_ratio=0.1", "min_lr_ratio goes with"),
    ],
)
def test_a_key_without_effect_is_refused(problems, first, second, told):
    assert problems(MINIMAL, first, second)["train"][0].startswith(told)


def test_a_key_in_the_wrong_table_is_sent_to_its_own(problems):
    found = problems(MINIMAL + "[train]\nrank = 8\n[lora]\nbatch_size = 4\n")
    assert found["train.rank"][1] == "it belongs to another table: lora.rank"
    assert found["lora.batch_size"][1] == "it belongs to another table: train.batch_size"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.batch_size", '"16"'),
        ("train.batch_size", "16.5"),
        ("train.batch_size", "true"),
        ("train.learning_rate", '"1e-4"'),
        ("train.packing", "1"),
        ("model.revision", "3"),
        ("lora.target_modules", "3"),
        ("lora.target_modules", '"[q_proj"'),
        ("lora.layers", '"all"'),
        ("lora.layers", "0"),
        ("lora.layers", "true"),
        ("lora.layers", "[]"),
        ("lora.layers", "{last = 4}"),
        ("name", "3"),
    ],
)
def test_a_wrong_type_is_told_with_its_key_and_value(problems, key, value):
    [(where, (what, _))] = problems(MINIMAL, f"{key}={value}").items()
    assert where == key
    assert repr(tomllib.loads(f"v = {value}")["v"]) in what


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("[0, -1]", "-1 is neither a block number nor a range"),
        ("[0, 1.5]", "1.5 is neither a block number nor a range"),
        ("[true]", "true is neither a block number nor a range"),
        ('["8"]', "'8' is neither a block number nor a range"),
        ('["8-"]', "'8-' is neither a block number nor a range"),
        ('["8..15"]', "'8..15' is neither a block number nor a range"),
        ('["0-1-2"]', "'0-1-2' is neither a block number nor a range"),
        ('[3, "15-8"]', "'15-8' runs backwards"),
    ],
)
def test_a_wrong_block_in_a_list_is_named(problems, value, what):
    [(where, (told, _))] = problems(MINIMAL, f"lora.layers={value}").items()
    assert where == "lora.layers"
    assert what in told


@pytest.mark.parametrize(
    "override", ["lora.target_modules=3", "lora.target_modules=[]", "train=3", "data=3"]
)
def test_messages_speak_of_toml_and_not_of_python(problems, override):
    [(what, _)] = problems(MINIMAL, override).values()
    assert not any(word in what for word in ("tuple", "dictionary", "instance", "Section"))


@pytest.mark.parametrize(
    "key",
    ["train.epochs", "train.learning_rate", "train.max_grad_norm", "lora.alpha", "eval.val_size"],
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_has_to_be_finite(problems, key, value):
    assert problems(MINIMAL, f"{key}={value}").keys() == {key}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("my run", "has a space in it: letters, digits, '.', '_' and '-' may be, as in 'my-run'"),
        ("../escape", "has '/' in it"),
        ("été", "has 'é' in it"),
        ("-x", "has to begin with a letter or a digit"),
        ("", "has to begin with a letter or a digit"),
    ],
)
def test_what_is_wrong_with_a_name_is_said_in_words(problems, name, what):
    told, _ = problems(MINIMAL.replace("minimal", name))["name"]
    assert told.startswith(what) and told.endswith(f"(it is {name!r})")
    assert "pattern" not in told


def test_no_message_shows_a_regular_expression(problems):
    judge = '[judge]\nendpoint = "localhost"\nmodel = "m"\nrubric = "r"\n'
    found = problems(MINIMAL + judge, "prep.phone_region=usa")
    assert found["judge.endpoint"][0].startswith("should be an address that begins with http://")
    assert found["prep.phone_region"][0].startswith("should be a country's two capital letters")


def test_data_as_a_path_is_told_how_it_is_written(problems):
    found = problems('data = "a.jsonl"\n[model]\npath = "m"\n')
    assert found["data"][1] == 'write [[data]] and below it path = "a.jsonl"'


def test_a_table_of_data_in_single_brackets_is_told(problems):
    assert problems(MINIMAL.replace("[[data]]", "[data]"))["data"][1] == "write [[data]]"


def test_invalid_toml_is_told_with_its_line(recipe_file):
    path = recipe_file('name = "x"\n[model\n')
    with pytest.raises(RecipeError, match=r"not valid TOML.*line 2") as raised:
        load_recipe(path)
    assert raised.value.where == str(path)


def test_a_missing_recipe_is_told_with_its_place(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe") as raised:
        load_recipe(tmp_path / "none.toml")
    assert raised.value.where == str(tmp_path / "none.toml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
