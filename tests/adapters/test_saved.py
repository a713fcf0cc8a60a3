"""Adapters and checkpoints on disk: read by mlx-lm, and exact to the last bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxtune.adapters.peft import write_peft
from mlxtune.adapters.store import (
    adapter_arrays,
    fitted,
    load_adapter,
    read_adapter,
    save_adapter,
    start_from,
    write_mlx_lm,
)
from mlxtune.data.batches import Part, Plan
from mlxtune.data.passes import Layout
from mlxtune.errors import RunError
from mlxtune.layers.inject import add_lora, lora_layers, own_quantized_layers, projections
from mlxtune.models.enable import enable_packs
from mlxtune.models.targets import find_targets
from mlxtune.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from mlxtune.train.optim import make_optimizer
from mlxtune.train.run import checkpoints
from mlxtune.train.step import TrainStep
from support.compare import distance, random_samples, trainable
from support.models import tiny_llama, with_adapters

TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])
TARGETS = {
    "everything": (("all-linear",), None),
    "the last block": (("all-linear",), 1),
    "two projections": (("q_proj", "mlp.down_proj"), None),
    "one projection of the first block": (("0.self_attn.v_proj",), None),
    "the output layer too": (("q_proj", "lm_head"), 1),
}


def adapted(model: nn.Module, names=("all-linear",), layers=None, dora=False) -> nn.Module:
    """The model with random adapters of rank 4 on these targets."""
    paths = find_targets(dict(projections(model)), names, layers=layers, layer_count=2)
    with_adapters(model, paths, dora=dora)
    for _, layer in lora_layers(model):
        if dora:
            layer.m = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
    return model


def identical(got: dict[str, mx.array], want: dict[str, mx.array]) -> bool:
    assert got.keys() == want.keys()
    return all(
        got[n].dtype == want[n].dtype and mx.array_equal(got[n], want[n]).item() for n in want
    )


def write_model(folder: Path, model: nn.Module, **config) -> Path:
    """A model folder as Hugging Face lays it out."""
    folder.mkdir()
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(asdict(model.args) | config))
    return folder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", TARGETS)
def test_a_saved_adapter_comes_back_exactly(tmp_path, case, dora):
    trained = adapted(tiny_llama(tied=False), *TARGETS[case], dora=dora)
    save_adapter(tmp_path, trained, base="tiny")
    loaded = tiny_llama(tied=False)
    load_adapter(tmp_path, loaded)
    assert identical(adapter_arrays(loaded), adapter_arrays(trained))
    assert trainable(loaded).keys() == trainable(trained).keys()
    assert mx.array_equal(loaded(TOKENS), trained(TOKENS)).item()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", TARGETS)
def test_mlx_lm_loads_a_saved_adapter_and_computes_the_same(tmp_path, case, packed, dora, own):
    base, config = tiny_llama(tied=False), {}
    if packed:
        config = {"quantization": {"group_size": 32, "bits": 4}}
        nn.quantize(base, **config["quantization"])
    folder = write_model(tmp_path / "model", base, **config)
    own_quantized_layers(base)
    plain = base(TOKENS)
    trained = adapted(base, *TARGETS[case], dora=dora)
    assert distance(trained(TOKENS), plain) > 1e-3
    save_adapter(tmp_path, trained, base=str(folder))
    if not own:  # as `export --to mlx-lm` writes it
        write_mlx_lm(tmp_path, read_adapter(tmp_path))
        assert "mlxtune" not in json.loads((tmp_path / "adapter_config.json").read_text())
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs = mlx_lm.utils.load_adapters(theirs, str(tmp_path))
    theirs.eval()
    assert distance(theirs(TOKENS), trained(TOKENS)) < 1e-5


def trained_by_mlx_lm(model_folder: Path, folder: Path, *, dora: bool, layers: int, keys=None):
    """An adapter's folder as `mlx_lm.lora` writes it, and the model with it."""
    model, _ = mlx_lm.utils.load_model(model_folder)
    model.freeze()
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.1} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, layers, parameters, use_dora=dora)
    mx.random.seed(6)
    for _, layer in model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.05
        if "m" in layer:
            layer.m = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), trainable(model))
    config = {
        "model": str(model_folder),
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model.eval()
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("keys", [None, ["self_attn.v_proj", "mlp.up_proj"]])
@pytest.mark.parametrize("layers", [1, -1])
def test_an_adapter_of_mlx_lm_gives_its_logits_here(tmp_path, layers, keys, dora, packed):
    base, config = tiny_llama(), {}
    if packed:
        config = {"quantization": {"group_size": 32, "bits": 4}}
        nn.quantize(base, **config["quantization"])
    folder = write_model(tmp_path / "model", base, **config)
    theirs = trained_by_mlx_lm(folder, tmp_path / "theirs", dora=dora, layers=layers, keys=keys)
    ours, _ = mlx_lm.utils.load_model(folder)
    own_quantized_layers(ours)
    load_adapter(tmp_path / "theirs", ours)
    assert {type(m).kind for _, m in lora_layers(ours)} == {"dora" if dora else "lora"}
    assert identical(adapter_arrays(ours), trainable(theirs))
    assert distance(ours(TOKENS), theirs(TOKENS)) < 1e-5


def test_an_adapter_of_mlx_lm_goes_to_peft_and_back(tmp_path):
    folder = write_model(tmp_path / "model", tiny_llama())
    theirs = trained_by_mlx_lm(folder, tmp_path / "a", dora=True, layers=1)
    for name, write in (("b", write_peft), ("c", write_mlx_lm)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, read_adapter(tmp_path / ("a" if name == "b" else "b")))
    again, _ = mlx_lm.utils.load_model(folder)
    again = mlx_lm.utils.load_adapters(again, str(tmp_path / "c"))
    again.eval()
    assert mx.array_equal(again(TOKENS), theirs(TOKENS)).item()


def test_what_mlx_lm_trains_otherwise_is_refused_by_name(tmp_path):
    folder = write_model(tmp_path / "model", tiny_llama())
    trained_by_mlx_lm(folder, tmp_path / "a", dora=False, layers=1)
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"fine_tune_type": "full"}))
    with pytest.raises(RunError, match="not an adapter") as caught:
        load_adapter(tmp_path / "a", tiny_llama())
    assert "mlx_lm.fuse" in caught.value.remedy
    path.write_text(json.dumps(config | {"fine_tune_type": "lokr"}))
    with pytest.raises(RunError, match="'lokr' cannot be used here"):
        load_adapter(tmp_path / "a", tiny_llama())
    # Embeddings, which mlx-lm adapts on demand.
    trained_by_mlx_lm(folder, tmp_path / "b", dora=False, layers=1, keys=["model.embed_tokens"])
    with pytest.raises(RunError, match=r"goes on model\.embed_tokens"):
        load_adapter(tmp_path / "b", tiny_llama())


def test_paths_before_the_blocks_may_differ(tmp_path):
    """transformers 5 says model.language_model.layers, mlx-lm language_model.model.layers."""
    trained = adapted(tiny_llama())
    save_adapter(tmp_path, trained, base="tiny")
    saved = read_adapter(tmp_path)
    renamed = {n.replace("model.", "model.language_model.", 1): a for n, a in saved.arrays.items()}
    write_mlx_lm(tmp_path, replace(saved, arrays=renamed))
    loaded = tiny_llama()
    load_adapter(tmp_path, loaded)
    assert mx.array_equal(loaded(TOKENS), trained(TOKENS)).item()


def test_a_path_that_could_be_several_is_refused(tmp_path):
    save_adapter(tmp_path, adapted(tiny_llama(), ("q_proj",)), base="tiny")
    saved = read_adapter(tmp_path)
    towers = nn.Module()
    towers.text, towers.vision = tiny_llama().model, tiny_llama().model
    with pytest.raises(RunError, match=r"model\.layers\.0.*could be several here"):
        fitted(saved, towers)
    del towers.vision
    assert fitted(saved, towers).targets[0] == "text.layers.0.self_attn.q_proj"


# ------------------------------------------------------------------ starting from one


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_training_starts_with_what_the_adapter_computes(tmp_path, scale, dora):
    trained = adapted(tiny_llama(), ("q_proj", "up_proj"), dora=dora)  # with scale 2
    save_adapter(tmp_path, trained, base="tiny")
    model = tiny_llama()
    add_lora(model, projections(model), rank=4, scale=scale, dora=dora)
    start_from(read_adapter(tmp_path), model)
    assert distance(model(TOKENS), trained(TOKENS)) < 1e-5
    names = {name for name in trainable(model) if name.startswith("model.layers.0")}
    assert len(names) == 7 * (3 if dora else 2)


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        ({"rank": 8}, "has rank 4, and the recipe asks for 8", "set lora.rank = 4"),
        ({"dora": True}, "is lora, and the recipe asks for dora", "set lora.dora = false"),
        ({"names": ("v_proj",)}, r"0\.mlp\.down_proj, which the recipe leaves out", "widen"),
    ],
)
def test_an_adapter_that_does_not_fit_the_recipe_is_refused(tmp_path, change, what, remedy):
    save_adapter(tmp_path, adapted(tiny_llama(), ("down_proj", "v_proj")), base="tiny")
    options = {"rank": 4, "scale": 2.0} | change
    names = options.pop("names", ("all-linear",))
    model = tiny_llama()
    paths = find_targets(dict(projections(model)), names, layer_count=2)
    add_lora(model, paths, **options)
    with pytest.raises(RunError, match=what) as caught:
        start_from(read_adapter(tmp_path), model)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.popitem(), r"lacks lora_"),
        (lambda a: a.update({"model.layers.0.mlp.up_proj.extra": mx.zeros(1)}), "unknown array"),
        (lambda a: a.clear(), "empty"),
    ],
)
def test_missing_and_additional_arrays_are_named(tmp_path, change, what):
    save_adapter(tmp_path, adapted(tiny_llama()), base="tiny")
    arrays = dict(mx.load(str(tmp_path / "adapters.safetensors")))
    change(arrays)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    with pytest.raises(RunError, match=what):
        load_adapter(tmp_path, tiny_llama())


def test_an_adapter_of_another_model_is_refused_with_the_name_of_its_own(tmp_path):
    save_adapter(tmp_path, adapted(tiny_llama(dims=64)), base="somebody/else")
    with pytest.raises(RunError) as caught:
        load_adapter(tmp_path, tiny_llama(dims=96))
    assert caught.value.where == str(tmp_path)
    shallow = tiny_llama()
    shallow.model.layers = shallow.model.layers[:1]
    with pytest.raises(RunError, match=r"model\.layers\.1\.") as caught:
        load_adapter(tmp_path, shallow)
    assert "somebody/else" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    "damage", ["missing", "no json", "a list", "no targets", "bad rank", "bad count"]
)
def test_a_folder_without_a_readable_config_is_refused(tmp_path, damage):
    save_adapter(tmp_path, adapted(tiny_llama()), base="tiny")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    elif damage == "no json":
        path.write_text(path.read_text()[:40])
    elif damage == "a list":
        path.write_text("[1]")
    elif damage == "no targets":
        path.write_text(json.dumps(config | {"mlxtune": {}}))
    elif damage == "bad count":
        path.write_text(json.dumps(config | {"num_layers": "all"}))
    else:
        config["lora_parameters"]["rank"] = "many"
        path.write_text(json.dumps(config))
    with pytest.raises(RunError) as caught:
        load_adapter(tmp_path, tiny_llama())
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("layout", ["own", "mlx-lm", "peft"])
def test_values_that_are_no_numbers_are_refused_by_their_tensor(tmp_path, layout, value):
    model = adapted(tiny_llama())
    save_adapter(tmp_path, model, base="base")
    if layout != "own":
        adapter = read_adapter(tmp_path)
        (tmp_path / "adapters.safetensors").unlink()
        (write_peft if layout == "peft" else write_mlx_lm)(tmp_path, adapter)
    [file] = tmp_path.glob("*.safetensors")
    arrays = mx.load(str(file))
    name = next(name for name in sorted(arrays) if "layers.1.mlp.up_proj" in name)
    arrays[name][1, 1] = value
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(RunError) as told:
        read_adapter(tmp_path)
    assert "1 of its" in told.value.what and "layers.1.mlp.up_proj" in told.value.what
    assert told.value.where == str(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_adapter_weights_are_refused(tmp_path, kept):
    save_adapter(tmp_path, adapted(tiny_llama()), base="tiny")
    path = tmp_path / "adapters.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(RunError) as caught:
        load_adapter(tmp_path, tiny_llama())
    assert str(path) in (caught.value.where or "")


# ------------------------------------------------------------------------ checkpoints

PLAN = Plan(
    [Part(random_samples((40, 12, 31, 19, 50, 22, 14, 61), prefix=9, untrained=10))],
    batch_size=2,
    accumulation=2,
    seed=3,
    layout=Layout(packing=True),
)


def ready(
    *, seed: int = 3, dropout: float = 0.3, layers: int | None = None, dora: bool = False
) -> tuple[nn.Module, mlx.optimizers.Optimizer]:
    """A model with fresh adapters, in training, and its optimizer."""
    model = tiny_llama()
    enable_packs(model)
    paths = find_targets(dict(projections(model)), ("all-linear",), layers=layers, layer_count=2)
    mx.random.seed(seed)
    add_lora(model, paths, rank=4, scale=2.0, dropout=dropout, dora=dora)
    model.train()
    return model, make_optimizer("adamw", model, weight_decay=0.1)


def train(step: TrainStep, model: nn.Module, start: int, stop: int) -> list[float]:
    losses = []
    for number, batches in enumerate(PLAN.steps(start, stop), start=start):
        losses.append(step(batches, 1e-2 / (number + 1)).loss.item())
    mx.eval(model.parameters())
    return losses


@pytest.mark.parametrize(
    ("layers", "dora"), [(None, False), (1, False), (1, True)], ids=["all", "one", "dora"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path, dropout, layers, dora):
    model, optimizer = ready(dropout=dropout, layers=layers, dora=dora)
    step = TrainStep(model, optimizer, max_grad_norm=1.0)
    train(step, model, 0, 3)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=3), keep=1)
    want_losses = train(step, model, 3, 6)

    again, its_optimizer = ready(seed=99, dropout=dropout, layers=layers, dora=dora)
    progress = load_checkpoint(path, again, its_optimizer)
    step = TrainStep(again, its_optimizer, max_grad_norm=1.0)
    assert train(step, again, progress.step, 6) == want_losses
    assert identical(adapter_arrays(again), adapter_arrays(model))
    states = (dict(tree_flatten(o.state)) for o in (its_optimizer, optimizer))
    assert identical(*states)


def test_a_checkpoint_restores_adapter_optimizer_progress_and_random_state(tmp_path):
    model, optimizer = ready()
    train(TrainStep(model, optimizer, max_grad_norm=1.0), model, 0, 2)
    progress = Progress(2, 3.25, 1000, 400, 16, 12.5)
    path = save_checkpoint(tmp_path, model, optimizer, progress, keep=1)
    arrays = {n: mx.array(a) for n, a in adapter_arrays(model).items()}
    state = {n: mx.array(a) for n, a in tree_flatten(optimizer.state)}
    mx.eval(arrays, state)
    drawn = np.array(mx.random.uniform(shape=(8,)))
    train(TrainStep(model, optimizer, max_grad_norm=1.0), model, 2, 4)

    assert load_checkpoint(path, model, optimizer) == progress
    assert identical(adapter_arrays(model), arrays)
    assert identical(dict(tree_flatten(optimizer.state)), state)
    assert np.array_equal(np.array(mx.random.uniform(shape=(8,))), drawn)


def test_saving_a_checkpoint_changes_nothing(tmp_path):
    model, optimizer = ready()
    before = np.array(mx.random.state[0])
    arrays = dict(adapter_arrays(model))
    save_checkpoint(tmp_path, model, optimizer, Progress(), keep=1)
    assert np.array_equal(np.array(mx.random.state[0]), before)
    assert identical(adapter_arrays(model), arrays)


def test_checkpoints_are_listed_by_number_and_the_latest_are_kept(tmp_path):
    model, optimizer = ready()
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, model, optimizer, Progress(step=step), keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    save_checkpoint(tmp_path, model, optimizer, Progress(step=101), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-101"]
    (tmp_path / "step-final").mkdir()
    (tmp_path / ".step-102.7.partial").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-101"]


def test_a_checkpoint_written_twice_is_replaced(tmp_path):
    model, optimizer = ready()
    save_checkpoint(tmp_path, model, optimizer, Progress(step=5, tokens=1), keep=2)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=5, tokens=2), keep=2)
    assert checkpoints(tmp_path) == [path]
    assert load_checkpoint(path, model, optimizer).tokens == 2


@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("share", [None, 0.0, 0.7])
def test_a_damaged_checkpoint_is_refused_with_its_place(tmp_path, name, share):
    model, optimizer = ready()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=1), keep=1)
    data = (path / name).read_bytes()
    if share is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(RunError) as caught:
        load_checkpoint(path, model, optimizer)
    assert str(path) in (caught.value.where or "")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = ready()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=1), keep=1)
    other, its_optimizer = ready(layers=1)
    with pytest.raises(RunError, match="does not fit this model"):
        load_checkpoint(path, other, its_optimizer)
