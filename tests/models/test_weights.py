"""Which files of a folder a model is: what its index says, and what a clone has of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlxtune.adapters.store import read_adapter
from mlxtune.data.files import read_rows
from mlxtune.errors import DataError, ModelError, RunError
from mlxtune.export.calibrate import calibrate
from mlxtune.export.convert import convert_to_folder
from mlxtune.fuse import model_places
from mlxtune.models.folder import folder_tensors
from mlxtune.models.load import load_model, load_tokenizer, model_classes, model_config
from mlxtune.models.resolve import ModelSource, resolve_model
from mlxtune.models.weights import INDEX
from support.models import save_real_vocabulary, save_tiny_model

IDS = [5, 17, 99, 3, 42, 64, 7, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_real_vocabulary(folder)
    return folder


def in_shards(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """A model in several files with an index."""
    shutil.copytree(source, folder)
    arrays = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(names):
        part = dict(sorted(arrays.items())[number :: len(names)])
        (folder / name).parent.mkdir(exist_ok=True)
        mx.save_safetensors(str(folder / name), part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_other_values(folder: Path, name: str, of: str) -> None:
    """A file of an older copy of the model, of which every tensor has other values."""
    arrays = mx.load(str(folder / of))
    other = {key: values + 1 for key, values in arrays.items()}
    mx.save_safetensors(str(folder / name), other, {"format": "pt"})


NAMES = {
    "numbered": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "of any kind": ("weights.00.safetensors", "part two.safetensors"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_reader_takes_the_files_that_the_index_names(kind, folder, tmp_path):
    names = NAMES[kind]
    in_shards(folder, tmp_path / "m", names)
    # What a training in three shards has left, and a conversion.
    with_other_values(tmp_path / "m", "model-00001-of-00003.safetensors", names[0])
    with_other_values(tmp_path / "m", "model-00003-of-00003.safetensors", names[1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        want = theirs(torch.tensor([IDS])).logits.numpy()
    source = resolve_model(str(tmp_path / "m"))
    got = np.array(load_model(source, dtype="float32").model(mx.array([IDS])))
    np.testing.assert_allclose(got, want, atol=1e-4)
    read = {t.name: t.load() for t in folder_tensors(source.path, model_config(source))}
    state = theirs.state_dict()
    for name, values in read.items():
        assert np.array_equal(values, state[name].numpy()), name
    convert_to_folder(str(source.path), tmp_path / "converted")
    assert {path.name for path in model_places(source.path)} == {"m", *names}


def test_a_single_file_beside_an_index_that_does_not_name_it_is_left_alone(folder, tmp_path):
    in_shards(folder, tmp_path / "m", NAMES["numbered"])
    with_other_values(tmp_path / "m", "model.safetensors", NAMES["numbered"][0])
    want = load_model(ModelSource("x", folder)).model(mx.array([IDS]))
    got = load_model(ModelSource("x", tmp_path / "m")).model(mx.array([IDS]))
    assert mx.array_equal(want, got)


def readers(path: Path):
    source = ModelSource("m", path)
    return (lambda: load_model(source), lambda: list(folder_tensors(path, model_config(source))))


def test_a_file_that_the_index_names_and_that_is_missing_is_named(folder, tmp_path):
    in_shards(folder, tmp_path / "m", NAMES["numbered"])
    (tmp_path / "m" / NAMES["numbered"][1]).unlink()
    for read in readers(tmp_path / "m"):
        with pytest.raises(ModelError, match=r"names model-00002.*, which is not"):
            read()


def test_a_tensor_in_two_files_is_refused_with_both_unless_the_index_says_which(folder, tmp_path):
    names = NAMES["numbered"]
    in_shards(folder, tmp_path / "m", names)
    first = mx.load(str(tmp_path / "m" / names[0]))
    second = mx.load(str(tmp_path / "m" / names[1]))
    stale = {name: values + 1 for name, values in first.items()}
    mx.save_safetensors(str(tmp_path / "m/both.safetensors"), second | stale)
    (tmp_path / "m/both.safetensors").replace(tmp_path / "m" / names[1])
    want = load_model(ModelSource("x", folder)).model(mx.array([IDS]))
    got = load_model(ModelSource("x", tmp_path / "m")).model(mx.array([IDS]))
    assert mx.array_equal(want, got)
    (tmp_path / "m" / INDEX).unlink()
    for read in readers(tmp_path / "m"):
        with pytest.raises(ModelError, match=f"is in two files, {names[0]} and {names[1]}"):
            read()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", *(f'{{"weight_map": {m}}}' for m in ("{}", '{"a": 1}', '{"a": "/etc/passwd"}'))],
)
def test_a_damaged_index_is_named(text, folder, tmp_path):
    in_shards(folder, tmp_path / "m", NAMES["numbered"])
    (tmp_path / "m" / INDEX).write_text(text)
    for read in readers(tmp_path / "m"):
        with pytest.raises(ModelError) as told:
            read()
        assert told.value.where == str(tmp_path / "m" / INDEX)


# ------------------------------------------------------------------------ git-lfs

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"]
)
def test_a_pointer_of_git_lfs_in_a_models_folder_is_named(name, tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ModelError, match="Git LFS's pointer") as told:
        load_model(ModelSource("m", tmp_path))
    assert told.value.where == str(tmp_path / name)
    assert "git lfs pull" in told.value.remedy


def test_pointers_of_git_lfs_are_named_in_all_kinds_of_files(tmp_path, tiny_folder):
    for name in ("m.gguf", "x.jsonl", "x.csv", "x.json", "x.parquet", "x.jsonl.gz"):
        (tmp_path / name).write_text(POINTER)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_parameters": {"rank": 4, "scale": 1.0}})
    )
    (tmp_path / "adapters.safetensors").write_text(POINTER)
    with pytest.raises(ModelError, match="Git LFS") as told:
        load_tokenizer(resolve_model(str(tmp_path / "m.gguf")))
    assert "git lfs pull" in told.value.remedy
    (tmp_path / "x.txt").write_text(POINTER)
    with pytest.raises(DataError, match="Git LFS"):
        calibrate(load_model(resolve_model(str(tiny_folder))), tmp_path / "x.txt")
    (tmp_path / "x.txt").unlink()
    for path in tmp_path.glob("x.*"):
        with pytest.raises(DataError, match="Git LFS") as told:
            list(read_rows(path))
        assert "git lfs pull" in told.value.remedy
    with pytest.raises(RunError, match="Git LFS"):
        read_adapter(tmp_path)


# ------------------------------------------------------------------------ what is no model


def test_only_a_damaged_file_is_to_be_downloaded_again(tmp_path):
    save_tiny_model(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:-100])
    with pytest.raises(ModelError) as told:
        load_model(ModelSource("m", tmp_path))
    assert told.value.where == str(tmp_path / "tokenizer.json")
    assert "download it again" in told.value.remedy
    (tmp_path / "tokenizer.json").write_text(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"its config.json asks for: Expected shape") as told:
        load_model(ModelSource("m", tmp_path))
    assert "download" not in told.value.remedy


@pytest.mark.parametrize(
    "said",
    [
        {"peft_type": "LORA", "base_model_name_or_path": "owner/base"},
        {"fine_tune_type": "lora", "model": "owner/base"},
    ],
    ids=["PEFT", "mlx-lm"],
)
def test_an_adapters_folder_given_as_a_model_says_what_it_is(said, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="holds an adapter, not a model") as told:
        resolve_model(str(tmp_path))
    assert "owner/base" in told.value.remedy and "lora.init_from" in told.value.remedy


def test_a_model_whose_module_ends_the_process_is_refused():
    """mlx-lm's module for olmo calls `exit` where its package is missing."""
    with pytest.raises(ModelError, match=r"cannot load models of type 'olmo': .*ai2-olmo"):
        model_classes({"model_type": "olmo"})
