"""Plans: what a step takes, from its graph, against steps that are run."""

from __future__ import annotations

import gc
import json
import platform
import re
from contextlib import nullcontext

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlxtune.arrays import custom_gradient
from mlxtune.bench import cost, machine
from mlxtune.bench.chips import CHIPS
from mlxtune.bench.compare import BEGIN, END, renewed
from mlxtune.bench.depth import StepEstimator, shallow
from mlxtune.bench.facts import ModelFacts, model_facts
from mlxtune.bench.graph import trace
from mlxtune.bench.lengths import Lengths, lengths_of_recipe, samples_of
from mlxtune.bench.machine import Machine, mac, published_rates, this_machine
from mlxtune.bench.measure import measure_machine
from mlxtune.bench.memory import peak_memory
from mlxtune.bench.plan import Planner, with_changes
from mlxtune.bench.results import read_figures, write_figures
from mlxtune.bench.step import StepModel
from mlxtune.bench.words import summary_lines
from mlxtune.bench.workloads import Workload
from mlxtune.cli.bench import rates_text
from mlxtune.cli.plan import plan as plan_command
from mlxtune.data.batches import Part
from mlxtune.data.pack import pack, pad
from mlxtune.device import as_on_gpu, cores_of, gpu_cores
from mlxtune.errors import ChipError, ModelError, RunError
from mlxtune.models.known import known_config
from mlxtune.recipe.load import load_recipe
from support import models, program
from support.compare import random_groups
from support.files import ROOT, SHELL_TRAIN, write_jsonl
from support.models import SMOLLM2
from support.plans import LLAMA, recipe_of

GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "sliding_window": 128,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 32,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "max_position_embeddings": 1024,
}
QWEN = LLAMA | {"model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6}
QWEN |= {"max_position_embeddings": 1024}


def mlxtune(*arguments, ok=True):
    done = program.mlxtune(*map(str, arguments), cwd=ROOT)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "sections"),
    [
        (LLAMA, {}),
        slow(LLAMA, {"train": {"gradient_checkpointing": True}}),
        slow(LLAMA, {"model": {"quantize": 4}, "train": {"optimizer": "adamw_8bit"}}),
        slow(LLAMA, {"model": {"quantize": "nf4"}, "lora": {"dora": True}}),
        slow(LLAMA, {"lora": {"rank": 64, "dropout": 0.1}, "train": {"packing": False}}),
        slow(LLAMA, {"lora": {"layers": 2}, "train": {"optimizer": "muon"}}),
        slow(GEMMA, {}),
        slow(QWEN, {"train": {"gradient_checkpointing": True, "optimizer": "adafactor"}}),
        (LLAMA, {"objective": "dpo"}),
        slow(GEMMA, {"objective": "dpo", "dpo": {"sft_weight": 0.5}, "lora": {"dropout": 0.1}}),
    ],
    ids=[
        *("plain", "twice", "qlora", "dora", "padded", "last-blocks", "windows", "qwen"),
        *("pairs", "pairs-windows"),
    ],
)
def test_the_planned_peak_is_the_peak_of_a_step(config, sections):
    recipe = recipe_of(**sections)
    model = StepModel(recipe, config, None, "float32")
    samples = samples_of((300, 280, 310, 120, 90, 250))
    if "objective" in sections:
        samples = random_groups((250, 180, 300), (40, 60))
    batch = (pack if model.packing else pad)(samples)
    twice = range(model.blocks if recipe.train.gradient_checkpointing is True else 0)
    planned = peak_memory(model.graph(batch, twice))
    gc.collect()
    others = mx.get_active_memory()  # of tests before this one
    model.materialize()
    measured = model.measure(batch, twice, steps=2).peak - others
    assert planned == pytest.approx(measured, rel=0.1)


def test_nothing_is_computed_for_a_plan():
    recipe = recipe_of(model={"quantize": 4})
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    estimator = StepEstimator(recipe, known_config("Qwen/Qwen3-8B"), None, "bfloat16")
    total = estimator.step(pack(samples_of((512, 400))))
    assert total.peak > 4e9
    assert mx.get_peak_memory() - before < 50e6


@pytest.mark.slow
def test_two_shallow_models_say_what_a_deep_one_takes():
    config = LLAMA | {"num_hidden_layers": 24}
    batch = pack(samples_of((300, 200, 100)))
    for sections in ({}, {"train": {"gradient_checkpointing": True}}):
        recipe = recipe_of(**sections)
        twice = 24 * bool(sections)
        got = StepEstimator(recipe, config, None, "float32").step(batch, twice)
        whole = StepModel(recipe, config, None, "float32").graph(batch, range(twice))
        assert got.peak == pytest.approx(peak_memory(whole), rel=0.02)


@pytest.mark.slow
def test_a_checkpointed_block_keeps_its_input_and_nothing_else():
    recipe, batch, peaks = recipe_of(lora={"rank": 1}), pack(samples_of((1000,))), []
    for blocks in (6, 14):
        model = StepModel(recipe, LLAMA | {"num_hidden_layers": blocks}, None, "float32")
        model.materialize()
        gc.collect()
        own = mx.get_active_memory()
        peaks.append(model.measure(batch, range(blocks), steps=2).peak - own)
        assert not any("Checkpointed" in type(layer).__name__ for layer in model.model.layers)
    assert (peaks[1] - peaks[0]) / 8 == pytest.approx(1000 * 256 * 4, rel=0.2)


def test_a_function_with_a_gradient_of_its_own_is_traced_with_it():
    @custom_gradient(lambda x, cotangent, _y: cotangent @ mx.ones((8, 3)))
    def project(x):
        return mx.exp(x @ mx.ones((3, 8)))

    def loss(x):
        return mx.square(project(mx.sin(x))).sum()

    graph = trace(lambda x: mx.value_and_grad(loss)(x), mx.zeros((5, 3)))
    kinds = [operation.name for operation in graph.order]
    assert kinds.count("Matmul") == 2  # one forward, one back; none of the marker
    assert "Exp" in kinds and "Cos" in kinds and "CustomTransforms" in kinds
    assert graph.shapes[graph.outputs[1]].dims == (5, 3)
    # Every array is an argument, a constant or comes out of an operation before it is used.
    known = {*graph.inputs, *(n for n in graph.shapes if n not in graph.operations)}
    for operation in graph.order:
        assert set(operation.inputs) <= known
        known |= set(operation.outputs)


def in_flight(dtype: mx.Dtype, size: int) -> float:
    """Results of a chain of exponentials that exist at one time on a GPU, at most."""

    def chain(x):
        for _ in range(2000):
            x = mx.exp(x[::-1])  # which does not lie as its result does, so cannot become it
        return [x]

    with as_on_gpu():
        x = mx.zeros((size,), dtype)
        return peak_memory(trace(chain, x)) / x.nbytes


def test_a_gpu_is_handed_so_many_operations_or_elements_ahead():
    """As `CommandEncoder::needs_commit` of MLX's Metal backend: bytes do not matter."""
    few, many = in_flight(mx.float32, 1 << 22), in_flight(mx.float32, 16)
    assert in_flight(mx.bfloat16, 1 << 22) == few
    # A buffer is full with the 10th new array of 4 Mi elements after the first that it reads.
    assert few == pytest.approx(11 * 10, abs=12)
    assert many == pytest.approx(11 * 41, abs=42)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_rate_of_exponentials_is_that_of_the_operation_that_training_takes(monkeypatch, gpu):
    measured = []
    monkeypatch.setattr(cost, "seconds_of", lambda function: measured.append(function) or 1.0)
    with as_on_gpu() if gpu else nullcontext():
        cost.measure_rates()
        graphs = [trace(lambda x, f=f: [x + f().sum()], mx.zeros(1)) for f in measured]
    names = {operation.name for graph in graphs for operation in graph.order}
    assert ("Exp" in names, "Power" in names) == (gpu, not gpu)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ModelError, match="how many blocks"):
        StepEstimator(recipe_of(), {"model_type": "llama"}, None, "float32")


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 2}])
def test_the_config_without_sizes_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    recipe = recipe_of(model={"path": str(tmp_path)})
    lengths = Lengths((Part(samples_of([40])),), "tokenized", "1 record")
    with pytest.raises(ModelError) as error:
        Planner(recipe, mac("M2", 16), lengths=lengths).estimate(recipe)
    assert error.value.where == f"config.json of {tmp_path}"


def test_a_mac_that_is_not_sold():
    with pytest.raises(ChipError, match="M2 is not sold with 12 GB"):
        mac("M2", 12)
    with pytest.raises(ChipError, match=r"32-core GPU\) is not sold with 64 GB"):
        mac("M4 Max 32", 64)


def test_without_cores_it_is_the_smallest_variant_that_has_the_memory():
    assert mac("M4 Max", 36).name.startswith("M4 Max (32-core")
    assert mac("M4 Max", 64).name.startswith("M4 Max (40-core")


def test_products_of_chips_with_matrix_units_are_not_those_of_their_alus():
    """The M5's ALUs say nothing of them; what was measured does, and of the others nothing."""
    rates = {str(chip): published_rates(chip) for chip in CHIPS if chip.name.startswith("M5")}
    assert rates["M5 (10-core GPU)"].products == ((1.0, 6.5e12),)
    assert rates["M5 (8-core GPU)"] is None and rates["M5 Pro (16-core GPU)"] is None


def test_a_limit_of_the_recipe_is_no_more_than_another_machine_has():
    recipe = recipe_of(train={"memory_limit": 20.0, "max_seq_length": 512})
    facts = ModelFacts(LLAMA, None, None, "a test")
    lengths = Lengths((Part(samples_of([400] * 16)),), "tokenized", "16 records")
    small = mac("M1", 8)
    plan = Planner(recipe, small, facts=facts, lengths=lengths)()
    assert plan.budget_bytes == small.budget
    less = with_changes(recipe, {"train.memory_limit": 1.0})
    assert Planner(less, small, facts=facts, lengths=lengths)().budget_bytes == 1e9


def test_workers_share_the_steps():
    facts = ModelFacts(LLAMA, None, None, "a test")
    lengths = Lengths((Part(samples_of([40] * 64)),), "tokenized", "64 records")
    recipe = recipe_of(train={"batch_size": 4, "epochs": 2})
    machine = mac("M2", 8)
    steps = [
        Planner(recipe, machine, facts=facts, lengths=lengths, workers=n)().steps for n in (1, 2)
    ]
    assert steps == [32, 16]


FILES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_mac_that_it_is_for(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    [(chip, memory)] = re.findall(r"^# for: (M\d+(?: \w+)?), (\d+) GB$", head, re.MULTILINE)
    recipe = load_recipe(path)
    train = recipe.train
    # Whatever its records are: all as long as it allows.
    worst = samples_of([train.max_seq_length] * train.batch_size * 4)
    lengths = Lengths((Part(worst),), "worst case", "the longest that there may be")
    plan = Planner(recipe, mac(chip, int(memory)), lengths=lengths).estimate(recipe)
    assert plan.fits, f"{plan.peak_memory_bytes / 1e9:.1f} of {plan.budget_bytes / 1e9:.1f} GB"
    parts = plan.weights_bytes + plan.adapters_bytes + plan.gradients_bytes
    parts += plan.optimizer_bytes + plan.logits_bytes + plan.activations_bytes
    assert parts == plan.peak_memory_bytes
    assert plan.seconds_per_step is None or plan.seconds_per_step > 0


@pytest.mark.slow
def test_seventy_billion_weights_are_planned_from_their_config_alone(tmp_path):
    config = LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    config |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = recipe_of(model={"path": str(tmp_path), "quantize": 4})
    plan = Planner(recipe, mac("M2 Ultra", 128)).estimate(recipe)
    ends = 2 * 128256 * 8192  # embedding and head, which stay in bfloat16
    assert plan.weights_bytes == pytest.approx((70.55e9 - ends) * 4.5 / 8 + 2 * ends, rel=0.005)
    assert plan.blocks == 80 and plan.fits and plan.seconds_per_step > 1


@pytest.mark.slow
def test_what_does_not_fit_gets_advice_and_a_recipe_that_does():
    recipe = recipe_of(train={"max_seq_length": 512}, lora={"rslora": True, "rank": 64})
    facts = ModelFacts(LLAMA, None, None, "a test")
    lengths = Lengths((Part(samples_of([400] * 16)),), "tokenized", "16 records")

    def planner(budget, recipe=recipe):
        small = Machine("a small one", budget, gpu=True, rates=None, measured=False)
        return Planner(recipe, small, facts=facts, lengths=lengths)

    # Below what gradient checkpointing alone comes to.
    small, told = planner(int(1.5e8)), []
    plan = small(told.append)
    assert f"it does not fit; with lora.rank = {recipe.lora.rank // 2}, lora.alpha" in " ".join(
        told
    )
    assert not plan.fits and plan.seconds_per_step is None
    keys = {key for advice in plan.advice for key in advice.changes}
    assert {"train.batch_size", "model.quantize", "train.max_seq_length"} <= keys
    [less] = [a for a in plan.advice if "lora.rank" in a.changes]
    assert with_changes(recipe, less.changes).lora.scale == pytest.approx(recipe.lora.scale)
    odd = with_changes(recipe, {"train.batch_size": 5})
    [smaller] = [a for a in planner(int(5e7), odd)().advice if "train.batch_size" in a.changes]
    assert smaller.changes["train.gradient_accumulation_steps"] == 5
    for advice in plan.advice[:2]:
        other = small.estimate(with_changes(recipe, advice.changes))
        assert plan.peak_memory_bytes - other.peak_memory_bytes == advice.saves_bytes > 0
    fitted, better, changed = small.fitted()
    assert better.fits and fitted == with_changes(recipe, changed)
    assert fitted.train.batch_size < recipe.train.batch_size
    # Records longer than half the limit would stop the run; where they are cut it is halved.
    least = {"lora.rank": 4, "train.batch_size": 1, "model.quantize": 4}
    least |= {"train.gradient_checkpointing": True, "train.optimizer": "adamw_8bit"}
    hopeless = with_changes(recipe, least)
    too_little = planner(1).estimate(hopeless).peak_memory_bytes - 1
    with pytest.raises(ModelError, match="nothing makes it fit"):
        planner(too_little, hopeless).fitted()
    cuts = [source.model_copy(update={"truncate": "right"}) for source in recipe.data]
    cutting = hopeless.model_copy(update={"data": tuple(cuts)})
    assert planner(too_little, cutting).fitted()[2] == {"train.max_seq_length": 256}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    models.save_tiny_model(folder / "model")
    path = folder / "r.toml"
    path.write_text(
        f'# kept\nname = "r"\n[model]\npath = "{folder / "model"}"  # too\n'
        f'[[data]]\npath = "{SHELL_TRAIN}"\nmax_samples = 40\n[train]\nmax_steps = 1\n',
    )
    return path


def test_plan_prints_its_parts_and_json(recipe_file):
    shown = mlxtune("plan", recipe_file)
    assert "fits" in shown.stdout and "activations" in shown.stdout
    assert "40 records, tokenized" in shown.stdout and "estimate" in shown.stdout
    found = json.loads(mlxtune("plan", recipe_file, "--chip", "M2 Pro", "--json").stdout)
    assert found["fits"] and found["machine"].startswith("M2 Pro")
    assert found["peak_memory_bytes"] > found["weights_bytes"] > 0
    assert found["seconds_per_step"] > 0 and found["advice"] == []


def test_rates_are_remembered_until_they_are_asked_for_again(recipe_file, monkeypatch, tmp_path):
    rates, measured = this_machine(remembered=True).rates, []
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("MLXTUNE_BLAS", "off")
    monkeypatch.setattr(machine, "measure_rates", lambda: measured.append(1) or rates)
    monkeypatch.setattr(machine, "_efficiency", lambda _: 1.0)
    for arguments, times in (((), 1), ((), 1), (("--measure",), 2)):
        done = CliRunner().invoke(plan_command, [str(recipe_file), *arguments])
        assert done.exit_code == 0, done.output
        assert len(measured) == times
    refused = mlxtune("plan", recipe_file, "--chip", "M2", "--measure", ok=False)
    assert refused.returncode == 2


def test_fit_keeps_comments_and_writes_what_loads(recipe_file, tmp_path):
    output = tmp_path / "fits.toml"
    limit = ("--set", "train.memory_limit=0.008")
    shown = mlxtune("plan", recipe_file, *limit, "--fit", output)
    assert "changed" in shown.stdout
    text = output.read_text()
    assert "# kept" in text and "# too" in text
    assert load_recipe(output).train.memory_limit == 0.008
    assert Planner(load_recipe(output), this_machine(remembered=True))().fits
    refused = mlxtune("plan", recipe_file, "--fit", output, ok=False)
    assert "exists already" in refused.stderr


@pytest.mark.slow
def test_a_run_peaks_where_its_plan_said(tmp_path):
    # As many records as a step takes: each step is the largest that they can make.
    (tmp_path / "r.toml").write_text(
        f'[model]\npath = "{SMOLLM2}"\n[[data]]\npath = "{SHELL_TRAIN}"\nmax_samples = 8\n'
        "[train]\nbatch_size = 8\nmax_steps = 2\n[log]\nsteps = 1\n"
    )
    program.mlxtune_afresh("lora", "r.toml", cwd=tmp_path).check_returncode()
    planned = json.loads((tmp_path / "runs/r/run.json").read_text())["plan"]["peak_memory_bytes"]
    lines = (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()
    measured = max(json.loads(line).get("peak_memory_bytes", 0) for line in lines)
    assert planned == pytest.approx(measured, rel=0.1)


def test_records_are_counted_beyond_those_whose_lengths_are_estimated(tmp_path):
    rows = [{"prompt": "list files", "completion": "ls " + "-a " * (n % 9)} for n in range(5600)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    recipe = recipe_of(data=[{"path": str(tmp_path / "d.jsonl")}])
    lengths = lengths_of_recipe(recipe, None)
    assert lengths.basis == "estimated" and lengths.note.startswith("5600 records")
    assert sum(len(part.samples) for part in lengths.parts) == 5600
    assert len({len(sample.tokens) for sample in lengths.parts[0].samples}) > 4


def test_without_records_a_step_is_planned_and_no_number_of_them(tmp_path):
    facts = ModelFacts(LLAMA, None, None, "a test")
    for sections, steps in (({}, None), ({"train": {"max_steps": 7}}, 7)):
        recipe = recipe_of(data=[{"path": str(tmp_path / "none.jsonl")}], **sections)
        plan = Planner(recipe, mac("M2 Pro", 16), facts=facts)()
        assert plan.steps == steps and plan.seconds_per_step > 0
        assert "no such file" in plan.lengths
        told = summary_lines(plan)[1]
        assert ("the records say how many" in told) == (steps is None)


def test_an_unknown_chip_is_told_with_the_nearest(recipe_file):
    refused = mlxtune("plan", recipe_file, "--chip", "M2 Prro", ok=False)
    assert "M2 Pro" in refused.stderr and "Traceback" not in refused.stderr
    assert mlxtune("plan", recipe_file, "--memory", "16", ok=False).returncode == 2


def test_lora_refuses_what_cannot_fit_and_can_be_forced(recipe_file, tmp_path):
    run, limit = tmp_path / "run", ("--set", "train.memory_limit=0.001")
    refused = mlxtune("lora", recipe_file, *limit, "-o", run, ok=False)
    assert "this run needs about" in refused.stderr and "--force" in refused.stderr
    assert "what saves memory" in refused.stderr
    assert " 0.0 GB" not in refused.stderr and "1.0 MB are there for it" in refused.stderr
    assert not run.exists()
    forced = mlxtune("lora", recipe_file, *limit, "-o", run, "--force")
    assert "DOES NOT FIT" in forced.stdout
    plan = json.loads((run / "run.json").read_text())["plan"]
    assert plan["peak_memory_bytes"] > 0 and plan["seconds_per_step"] > 0


@pytest.mark.slow
def test_the_page_of_benchmarks_is_what_its_results_say():
    folder = ROOT / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert renewed(page, read_figures(folder / "results"), where="README.md") == page
    own = page.partition(BEGIN)[2].partition(END)[0]
    measured, _, estimated = own.partition("Estimated")
    assert not any(str(chip) in measured for chip in CHIPS)  # nobody has measured one yet
    assert "M2 Pro" in estimated


@pytest.mark.slow
def test_what_is_measured_takes_the_place_of_an_estimate(tmp_path, monkeypatch):
    """Of this machine, under the name of a Mac."""
    smollm2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
    small = Workload("tiny", smollm2, (8,), {"lora": {"layers": 1, "rank": 1}})
    monkeypatch.setattr("mlxtune.bench.measure.WORKLOADS", (small,))
    gc.collect()
    others = mx.get_active_memory()  # of tests before this one
    figures = measure_machine(this_machine(remembered=True))
    [row] = figures["workloads"]
    assert row["seconds"] > 0 and row["peak_bytes"] > 0
    assert row["planned_peak_bytes"] == pytest.approx(row["peak_bytes"] - others, rel=0.1)
    assert 0 < row["model_flops_utilisation"] < 2
    said = rates_text(figures["rates"]).split()
    assert said[0] == "products" and said[3] == "attention" and said.count("rows") == 3
    best = max(figures["rates"]["products"].values())
    shown = float(said[1]) * {"GFLOP/s": 1e9, "TFLOP/s": 1e12}[said[2]]
    assert shown == pytest.approx(best, rel=0.05)
    as_mac = figures | {"device": "Apple M2 Pro", "gpu_cores": 19}
    assert write_figures(as_mac, tmp_path).name == "bench-m2-pro-19-core-gpu.json"
    page = renewed("a " + BEGIN + END + " c", read_figures(tmp_path), where="page.md")
    measured, _, estimated = page.partition("Estimated")
    assert "| M2 Pro (19-core GPU) | tiny |" in measured
    assert "M2 Pro (19-core GPU)" not in estimated and "M2 Pro (16-core GPU)" in estimated
    assert "| M2 (8-core GPU)" in estimated
    (tmp_path / "bench-broken.json").write_text('{"device": "x"')
    with pytest.raises(RunError, match="not what `mlxtune bench` writes"):
        read_figures(tmp_path)


def test_cores_of_a_gpu_are_read_from_what_macos_says():
    told = {"SPDisplaysDataType": [{"_name": "Apple M2 Pro", "sppci_cores": "19"}]}
    assert cores_of(told) == 19
    assert cores_of({"SPDisplaysDataType": [{"_name": "a display"}]}) is None
    assert cores_of([]) is None
    assert (gpu_cores() is None) == (platform.system() != "Darwin")


def test_a_shallow_config_has_the_first_blocks():
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"], "sizes": [1, 2]}
    found = shallow(config, 2)
    assert found == {"num_hidden_layers": 2, "layer_types": ["a", "b"], "sizes": [1, 2]}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "llama", "num_hidden_layers": -2}', "says that the model has -2 blocks"),
        ('{"model_type": "llama", "num_hidden_layers": "two"}', "the model has 'two' blocks"),
        ('{"model_type": "foo", "num_hidden_layers": 2}', "no model of type 'foo'"),
        ("[1]", "not a list"),
        ("null", "not null"),
        ('{"num_hidden_layers": 2}', "which architecture"),
        ('{"model_type"', "no readable config"),
    ],
)
def test_a_config_that_is_wrong_is_told_in_words_with_its_place(tmp_path, config, said):
    (tmp_path / "config.json").write_text(config)
    recipe = recipe_of(model={"path": str(tmp_path)})
    lengths = Lengths((Part(samples_of([40])),), "tokenized", "1 record")
    with pytest.raises(ModelError, match=said) as error:
        Planner(recipe, mac("M2", 16), lengths=lengths).estimate(recipe)
    assert "config.json" in error.value.where and str(tmp_path) in error.value.where
    assert "missing" not in str(error.value)


def test_a_model_that_is_out_of_reach_is_told_so():
    with pytest.raises(ModelError, match="not in the local cache, and the hub") as error:
        model_facts(recipe_of(model={"path": "owner/nowhere"}))
    assert error.value.where == "owner/nowhere" and "Error" not in error.value.what
    assert "connect once to download it" in error.value.remedy
