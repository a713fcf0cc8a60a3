"""Adapters and checkpoints on disk: read by mlx-lm, and exact to the last bit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_lm.utils
import numpy as np
import pytest
from conftest import tiny_llama
from helpers import distance, random_samples, trainable, with_adapters
from mlx.utils import tree_flatten

from mlxtune.adapters.store import adapter_arrays, load_adapter, save_adapter
from mlxtune.data.batches import Part, Plan
from mlxtune.data.passes import Layout
from mlxtune.errors import RunError
from mlxtune.layers.inject import add_lora, own_quantized_layers, projections
from mlxtune.models.packed import enable_packs
from mlxtune.models.targets import find_targets
from mlxtune.train.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from mlxtune.train.optim import make_optimizer
from mlxtune.train.step import TrainStep

TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])
TARGETS = {
    "everything": (("all-linear",), None),
    "the last block": (("all-linear",), 1),
    "two projections": (("q_proj", "mlp.down_proj"), None),
    "one projection of the first block": (("0.self_attn.v_proj",), None),
}


def adapted(model: nn.Module, names=("all-linear",), layers=None) -> nn.Module:
    """The model with random adapters of rank 4 on these targets."""
    paths = find_targets(dict(projections(model)), names, layers=layers, layer_count=2)
    return with_adapters(model, paths)


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


@pytest.mark.parametrize("case", TARGETS)
def test_a_saved_adapter_comes_back_exactly(tmp_path, case):
    trained = adapted(tiny_llama(), *TARGETS[case])
    save_adapter(tmp_path, trained, base="tiny")
    loaded = tiny_llama()
    load_adapter(tmp_path, loaded)
    assert identical(adapter_arrays(loaded), adapter_arrays(trained))
    assert trainable(loaded).keys() == trainable(trained).keys()
    assert mx.array_equal(loaded(TOKENS), trained(TOKENS)).item()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", TARGETS)
def test_mlx_lm_loads_a_saved_adapter_and_computes_the_same(tmp_path, case, packed):
    base, config = tiny_llama(tied=False), {}
    if packed:
        config = {"quantization": {"group_size": 32, "bits": 4}}
        nn.quantize(base, **config["quantization"])
    folder = write_model(tmp_path / "model", base, **config)
    own_quantized_layers(base)
    plain = base(TOKENS)
    trained = adapted(base, *TARGETS[case])
    assert distance(trained(TOKENS), plain) > 1e-3
    save_adapter(tmp_path, trained, base=str(folder))
    theirs, _ = mlx_lm.utils.load_model(folder)
    theirs = mlx_lm.utils.load_adapters(theirs, str(tmp_path))
    theirs.eval()
    assert distance(theirs(TOKENS), trained(TOKENS)) < 1e-5


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


@pytest.mark.parametrize("damage", ["missing", "no json", "a list", "no targets", "bad rank"])
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
    else:
        config["lora_parameters"]["rank"] = "many"
        path.write_text(json.dumps(config))
    with pytest.raises(RunError) as caught:
        load_adapter(tmp_path, tiny_llama())
    assert caught.value.where == str(tmp_path)


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
    *, seed: int = 3, dropout: float = 0.3, layers: int | None = None
) -> tuple[nn.Module, mlx.optimizers.Optimizer]:
    """A model with fresh adapters, in training, and its optimizer."""
    model = tiny_llama()
    enable_packs(model)
    paths = find_targets(dict(projections(model)), ("all-linear",), layers=layers, layer_count=2)
    mx.random.seed(seed)
    add_lora(model, paths, rank=4, scale=2.0, dropout=dropout)
    model.train()
    return model, make_optimizer("adamw", model, weight_decay=0.1)


def train(step: TrainStep, model: nn.Module, start: int, stop: int) -> list[float]:
    losses = []
    for number, batches in enumerate(PLAN.steps(start, stop), start=start):
        losses.append(step(batches, 1e-2 / (number + 1)).loss.item())
    mx.eval(model.parameters())
    return losses


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path, dropout, layers):
    model, optimizer = ready(dropout=dropout, layers=layers)
    step = TrainStep(model, optimizer, max_grad_norm=1.0)
    train(step, model, 0, 3)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=3), keep=1)
    want_losses = train(step, model, 3, 6)

    again, its_optimizer = ready(seed=99, dropout=dropout, layers=layers)
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
