"""What is said before a run: by a plan that fails, of what is out of reach, of odd records."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from transformers import AutoTokenizer

from mlxtune.bench import depth
from mlxtune.bench.facts import ModelFacts
from mlxtune.bench.forecast import forecast
from mlxtune.bench.graph import trace
from mlxtune.bench.lengths import Lengths, samples_of
from mlxtune.bench.machine import Machine, mac
from mlxtune.bench.plan import Planner
from mlxtune.bench.words import plan_lines
from mlxtune.data.batches import Part
from mlxtune.data.pack import pack
from mlxtune.errors import NoPlan, TargetError, TooLarge
from mlxtune.models.known import known_config
from mlxtune.train.corpus import Corpus
from mlxtune.train.notes import context_length
from support import models, program
from support.files import SHELL_TRAIN, write_jsonl
from support.plans import recipe_of

CONTEXT = 64
LONG, SHORT = "list all files " * 6, "ls"
RECIPE = '[model]\npath = "model"\n[[data]]\npath = "d.jsonl"\n[train]\nepochs = 1\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that was made for few tokens, and records of which two are longer."""
    folder = tmp_path_factory.mktemp("said")
    models.save_tiny_model(folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (folder / "model/config.json").write_text(json.dumps(config))
    rows = [{"prompt": LONG if n in (2, 5) else "files", "completion": SHORT} for n in range(8)]
    write_jsonl(folder / "d.jsonl", rows)
    (folder / "r.toml").write_text(RECIPE)
    return folder


def mlxtune(place, *arguments, status=0):
    done = program.mlxtune(*map(str, arguments), cwd=place)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


# --------------------------------------------------------- a plan that cannot be, or that fails


CLASSES = [
    {
        "messages": [
            {"role": "system", "content": ("Sort what is asked into classes. " * 11)[:350]},
            {"role": "user", "content": f"what is {chr(97 + n)}?"},
            {"role": "assistant", "content": "ABC"[n % 3]},
        ]
    }
    for n in range(24)
]


@pytest.mark.parametrize("rows", [CLASSES, [CLASSES[0]] * 8], ids=["classes", "alike"])
def test_a_run_of_short_answers_behind_a_system_prompt_has_its_memory_checked(place, rows):
    write_jsonl(place / "classes.jsonl", rows)
    (place / "classes.toml").write_text(RECIPE.replace("d.jsonl", "classes.jsonl"))
    run = place / f"classes-{len(rows)}"
    one = ("--set", "train.max_steps=1")
    done = mlxtune(place, "lora", "classes.toml", *one, "-o", run)
    assert "NOT CHECKED" not in done.stdout and "warning" not in done.stderr
    assert json.loads((run / "run.json").read_text())["plan"]["peak_memory_bytes"] > 0
    mlxtune(place, "plan", "classes.toml")


def forecast_of(place, *, force=False, told=None, **sections):
    recipe = recipe_of(model={"path": str(place / "model")}, **sections)
    corpus = Corpus((Part(samples_of([30] * 8)),), (), ())
    tell = (told if told is not None else []).append
    return forecast(
        recipe, corpus, 1, force=force, tell=tell, planning=lambda: nullcontext(lambda _: None)
    )


def fail(_self, *_args):
    raise ZeroDivisionError("integer modulo by zero")


def test_a_plan_that_fails_is_called_a_fault_and_says_what_was_not_checked(place, monkeypatch):
    monkeypatch.setattr(depth.StepEstimator, "step", fail)
    told = []
    kept, said = forecast_of(place, told=told)
    assert kept is None
    [warning] = [line for line in told if line.startswith("warning")]
    assert "ZeroDivisionError: integer modulo by zero" in warning
    assert "its memory was not checked" in warning and "may run out of memory" in warning
    assert "mlxtune plan RECIPE --debug" in warning
    assert any("NOT CHECKED" in line for line in said) and any("failed" in line for line in said)


def test_what_is_out_of_reach_is_refused_even_where_a_plan_fails(place, monkeypatch):
    monkeypatch.setattr(depth.StepEstimator, "step", fail)
    with pytest.raises(TooLarge, match="at least"):
        forecast_of(place, train={"memory_limit": 0.0003})


def test_an_architecture_whose_steps_mlx_cannot_write_down_gets_a_quiet_note(place, monkeypatch):
    import mlx.core as mx

    with pytest.raises(NoPlan) as without:  # of MLX itself: this cannot be exported
        trace(lambda x: [mx.custom_function(lambda y: y + 1)(x) * x.item()], mx.zeros(()))

    def impossible(*_args):
        raise without.value

    monkeypatch.setattr(depth.StepEstimator, "step", impossible)
    told = []
    kept, said = forecast_of(place, told=told)
    assert kept is None and not any(line.startswith("warning") for line in told)
    assert any(line.startswith("plan     none: ") for line in said)
    assert any("NOT CHECKED" in line for line in said)


def test_a_target_that_is_not_there_stops_the_run_as_it_would_without_a_plan(place):
    with pytest.raises(TargetError):
        forecast_of(place, lora={"target_modules": ["no_such_layer"]})


# --------------------------------------------------------------- what is out of reach, and how


@pytest.fixture
def no_step(monkeypatch):
    """Laying out a step of a large model takes a minute: nobody may."""
    monkeypatch.setattr("mlxtune.bench.step.StepModel.graph", fail)


def planner_of(budget, **model):
    lengths = Lengths((Part(samples_of([256] * 16)),), "tokenized", "16 records")
    facts = ModelFacts(known_config("Qwen/Qwen3-8B"), None, None, "a test")
    small = Machine("a small one", budget, gpu=True, rates=None, measured=False)
    return Planner(recipe_of(model=model), small, facts=facts, lengths=lengths)


def test_eight_billion_weights_in_four_gigabytes_are_refused_before_a_step_is_laid_out(no_step):
    plan = planner_of(4 * 10**9)()
    # Qwen3-8B: 8.19 billion parameters, 16 bits each.
    assert plan.weights_bytes == pytest.approx(2 * 8.19e9, rel=0.001)
    assert plan.at_least and not plan.fits and plan.peak_memory_bytes >= plan.weights_bytes
    said = "\n".join(plan_lines(plan))
    assert "at least 16.7" in said and "DOES NOT FIT" in said
    assert "weights, adapters and optimizer alone" in said
    assert "nothing in the recipe would make it fit" in said
    assert "activations" not in said and "time" not in said


@pytest.mark.slow
def test_what_fewer_bits_would_bring_within_reach_is_looked_at():
    planner = planner_of(12 * 10**9)
    plan = planner()
    assert plan.at_least and not plan.fits and planner.out_of_reach() is not None
    found = plan.together or next(each.changes for each in plan.advice if each.fits)
    assert "model.quantize" in found
    [bits] = [each for each in plan.advice if each.changes == {"model.quantize": 4}]
    # Of 6.95 billion weights in projections, from 16 bits to 4.5; embeddings stay.
    assert bits.saves_bytes == pytest.approx(6.95e9 * (16 - 4.5) / 8, rel=0.01)


def test_what_is_within_reach_is_laid_out():
    assert planner_of(100 * 10**9).out_of_reach() is None
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtune.bench.step.StepModel.graph", fail)
        planner_of(100 * 10**9)()


def test_a_plan_that_does_not_fit_has_an_exit_status_of_its_own(place):
    limit = ("--set", "train.memory_limit=0.001")
    assert "fits" in mlxtune(place, "plan", "r.toml", "--set", "train.max_steps=1").stdout
    assert "DOES NOT FIT" in mlxtune(place, "plan", "r.toml", *limit, status=3).stdout
    less = ("--set", "train.memory_limit=0.0003", "--json")
    found = json.loads(mlxtune(place, "plan", "r.toml", *less, status=3).stdout)
    assert found["fits"] is False and found["at_least"] is True
    enough = ("--set", "train.memory_limit=0.006", "--fit", "fits.toml")
    assert "written" in mlxtune(place, "plan", "r.toml", *enough).stdout


# ------------------------------------------------------------------- records, context, warmup


def test_a_record_over_the_limit_is_told_where_training_would_refuse_it(place):
    over = ("--set", f"train.max_seq_length={CONTEXT}")
    done = mlxtune(place, "plan", "r.toml", *over, status=1)
    assert "fits (estimate), but these records cannot be trained on as they are" in done.stdout
    assert "d.jsonl:3" in done.stderr and f"max_seq_length = {CONTEXT}" in done.stderr
    refused = mlxtune(place, "lora", "r.toml", *over, "-o", place / "refused", status=1)
    ends = [each.stderr.partition("d.jsonl:3")[2] for each in (refused, done)]
    assert ends[0] == ends[1]
    as_json = mlxtune(place, "plan", "r.toml", *over, "--json", status=1)
    assert "d.jsonl:3" in json.loads(as_json.stdout)["held_back"]
    (place / "cut.toml").write_text(RECIPE.replace('l"\n[train', 'l"\ntruncate = "drop"\n[train'))
    assert "cannot" not in mlxtune(place, "plan", "cut.toml", *over).stdout


def test_a_record_that_seems_too_long_is_told_without_a_tokenizer(tmp_path):
    rows = [{"prompt": "x " * (3000 if n == 4 else 3), "completion": "ls"} for n in range(5)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    recipe = recipe_of(data=[{"path": str(tmp_path / "d.jsonl")}], train={"max_seq_length": 256})
    facts = ModelFacts(models_config(), None, None, "a test")
    plan = Planner(recipe, mac("M2", 16), facts=facts)()
    [note] = [note for note in plan.notes if "max_seq_length" in note]
    assert note.startswith("about 1 records are longer") and "refuses" in note


def test_data_that_is_not_there_yet_is_no_fault_and_a_broken_row_is(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "ls", "completion": "ls"}\n{"prompt": \n')
    facts = ModelFacts(models_config(), None, None, "a test")
    for name, broken in (("bad.jsonl", True), ("none.jsonl", False)):
        recipe = recipe_of(data=[{"path": str(tmp_path / name)}])
        planner = Planner(recipe, mac("M2", 16), facts=facts)
        assert (planner.problem is not None) is broken
        assert (planner().held_back is not None) is broken
        if broken:
            assert "bad.jsonl:2" in str(planner.problem)


def test_blocks_are_counted_where_an_architecture_has_its_own_name_for_them():
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 64, "rotary_dim": 16}
    config = {"model_type": "gptj", "vocab_size": 128, "layer_norm_epsilon": 1e-5} | sizes
    assert depth._block_count(config) == 3 and depth.shallow(config, 3) == config
    with pytest.raises(NoPlan, match="how many blocks"):
        depth._block_count({"model_type": "llama"})


@pytest.mark.slow
def test_a_model_that_also_sees_is_planned_by_its_language_model():
    text = models_config() | {"model_type": "gemma3_text", "num_hidden_layers": 12, "head_dim": 16}
    text |= {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
    text |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 512}
    whole = {"model_type": "gemma3", "text_config": text, "vocab_size": text["vocab_size"]}
    recipe, batch = recipe_of(), pack(samples_of([20, 30]))
    found, alone = (depth.StepEstimator(recipe, c, None, "float32") for c in (whole, text))
    assert found.blocks == 12 and found.packing
    assert found.sizes.weights == pytest.approx(alone.sizes.weights, rel=0.01)
    assert found.step(batch).peak == pytest.approx(alone.step(batch).peak, rel=0.02)


@pytest.mark.slow
def test_a_model_whose_last_blocks_have_the_keys_of_others_is_planned():
    """As Gemma 4's small ones: the first few blocks by themselves are none."""
    config = {k: v for k, v in vars(models.tiny("gemma4_text", **models.GEMMA4).args).items() if v}
    config |= {"num_hidden_layers": 15, "num_kv_shared_layers": 5}
    config |= {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 3}
    estimator = depth.StepEstimator(recipe_of(), config, None, "float32")
    assert estimator.blocks == 15 and estimator.packing
    assert estimator.step(pack(samples_of([20, 30]))).peak > estimator.sizes.floor


def models_config():
    return {k: v for k, v in vars(models.tiny_llama().args).items() if v is not None}


def test_records_over_the_models_context_are_counted_once_by_all_three(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    rows = [json.loads(line) for line in (place / "d.jsonl").read_text().splitlines()]
    turns = [
        [
            {"role": "user", "content": r["prompt"]},
            {"role": "assistant", "content": r["completion"]},
        ]
        for r in rows
    ]
    lengths = [len(tokenizer.apply_chat_template(t, tokenize=True)["input_ids"]) for t in turns]
    count = sum(length > CONTEXT for length in lengths)
    assert count == 2
    said = f"{count} of 8 records are longer than the {CONTEXT} tokens that this model was made for"
    run = place / "run"
    for arguments in (
        ("plan", "r.toml"),
        ("data", "inspect", "r.toml", "--rows", 0),
        ("lora", "r.toml", "-o", run),
    ):
        shown = " ".join(mlxtune(place, *arguments).stdout.split())
        assert shown.count(said) == 1, arguments
        assert "max_seq_length = 64 and truncate" in shown


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({}, None),
        # As Qwen2.5's model card has it for long texts, and as Phi-3 and Llama 3.1 have it.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)  # fmt: skip
def test_a_models_context_is_what_its_config_says(config, context):
    assert context_length(config) == context


@pytest.mark.slow
def test_a_warmup_that_outlasts_the_run_is_told_with_the_rate_that_is_reached(place):
    warmup = ("--set", "train.warmup_steps=40", "--set", "train.max_steps=2")
    shown = mlxtune(place, "plan", "r.toml", *warmup).stdout
    assert "rises over 40 steps and the run has 2" in shown
    run = place / "warm"
    shown = mlxtune(place, "lora", "r.toml", *warmup, "--set", "log.steps=1", "-o", run).stdout
    assert "rises over 40 steps and the run has 2" in shown
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rates = [row["learning_rate"] for row in map(json.loads, lines) if "learning_rate" in row]
    assert f"ends at {max(rates):.2g} and never reaches 0.0002" in shown
    enough = ("--set", "train.warmup_steps=2", "--set", "train.max_steps=2")
    assert "rises over" not in mlxtune(place, "plan", "r.toml", *enough).stdout


def test_a_plan_says_what_is_left_to_the_system(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "t"\n[model]\npath = "HuggingFaceTB/SmolLM2-135M-Instruct"\n'
        f'[[data]]\npath = "{SHELL_TRAIN}"\n'
    )
    for memory, left in ((8, "3.72 GB of 8.59 GB"), (16, "7.44 GB of 17.18 GB")):
        said = program.mlxtune(
            "plan", str(recipe), "--chip", "M1", "--memory", str(memory), cwd=tmp_path
        ).stdout
        lines = said.splitlines()
        [at] = [n for n, line in enumerate(lines) if line.startswith("memory ")]
        assert lines[at + 1].split(" are left")[0].strip() == left
