"""Models of Ollama's MLX engine, read out of its store without it.

The stores here are written by hand, as `ollama create --experimental` of Ollama 0.33 writes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlxtune.arrays import flat
from mlxtune.errors import ModelError
from mlxtune.models.folder import folder_tensors
from mlxtune.models.load import load_model, model_config
from mlxtune.models.ollama_store import has_model, parse_name
from mlxtune.models.resolve import resolve_model
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune

PREFIX = "application/vnd.ollama.image."
IDS = mx.array([[1, 5, 9, 2, 40, 7]])


class Store:
    """A store of Ollama's, and what puts models into it."""

    def __init__(self, path):
        self.path = path
        (path / "blobs").mkdir(parents=True)

    def blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / f"sha256-{digest}").write_bytes(data)
        return f"sha256:{digest}"

    def tensors(self, arrays, metadata=None) -> str:
        file = self.path / "new.safetensors"
        mx.save_safetensors(str(file), arrays, metadata or {})
        data = file.read_bytes()
        file.unlink()
        return self.blob(data)

    def add(self, name, layers) -> None:
        """Layers are (kind, name, digest)."""
        manifest = self.path.joinpath("manifests", *parse_name(name).parts)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        entries = [{"mediaType": PREFIX + k, "name": n, "digest": d} for k, n, d in layers]
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": entries}))

    def add_folder(self, name, folder, types=None, **changes) -> None:
        """A folder's model, matrices quantized as `types` says by a part of their names."""
        layers = [
            ("json", file.name, self.blob(file.read_bytes())) for file in folder.glob("*.json")
        ]
        for tensor, array in mx.load(str(folder / "model.safetensors")).items():
            kind = next((k for part, k in (types or {}).items() if part in tensor), None)
            arrays, metadata = {tensor: array}, {}
            if kind is not None:
                bits = {"int4": 4, "int8": 8}[kind]
                weight, scales, biases = mx.quantize(array, group_size=64, bits=bits)
                arrays = {tensor: weight, f"{tensor}.scale": scales, f"{tensor}.bias": biases}
                metadata = {"quant_type": kind, "group_size": "64"}
            layers.append(("tensor", tensor, self.tensors(arrays, metadata | changes)))
        self.add(name, layers)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "models")


TYPES = {"k_proj": "int8", "v_proj": "int8", "_proj": "int4"}


def logits(name):
    loaded = load_model(resolve_model(name), dtype="float32")
    return np.array(loaded.model(IDS))


def test_floats_are_those_of_the_folder(store, tiny_folder):
    store.add_folder("plain", tiny_folder)
    model, _ = mlx_lm.load(str(tiny_folder))
    assert np.array_equal(logits("ollama:plain"), np.array(model(IDS)))
    assert not resolve_model("ollama:plain").is_gguf


def dequantized(array, bits):
    return mx.dequantize(*mx.quantize(array, group_size=64, bits=bits), group_size=64, bits=bits)


def test_quantized_tensors_are_what_mlx_makes_of_them(store, tiny_folder, tmp_path):
    store.add_folder("mixed", tiny_folder, TYPES)
    want = {}
    for name, array in mx.load(str(tiny_folder / "model.safetensors")).items():
        kind = next((k for part, k in TYPES.items() if part in name), None)
        want[name] = array if kind is None else dequantized(array, int(kind[-1]))
    source = resolve_model("ollama:mixed")
    config = model_config(source)
    got = {each.name: each.load() for each in folder_tensors(source.path, config)}
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], np.array(want[name])) for name in want)
    folder = tmp_path / "floats"
    shutil.copytree(tiny_folder, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), want, {"format": "mlx"})
    model, _ = mlx_lm.load(str(folder))
    assert np.allclose(logits("ollama:mixed"), np.array(model(IDS)), atol=1e-4)


def test_the_weights_stay_quantized_and_are_trained_on_so(store, tiny_folder, recipe, few):
    store.add_folder("mixed", tiny_folder, TYPES)
    model = load_model(resolve_model("ollama:mixed")).model
    bits = {path: layer.bits for path, layer in model.named_modules() if hasattr(layer, "bits")}
    assert len(bits) == 14 and bits["model.layers.0.self_attn.k_proj"] == 8
    assert bits["model.layers.1.mlp.gate_proj"] == 4
    before = flat(model.parameters())["model.layers.0.mlp.up_proj.weight"]
    # Ollama keeps JSON files alone, and the chat template has a file of its own.
    template = {"chat_template": str(tiny_folder / "chat_template.jinja")}
    settings = recipe(few, model={"path": "ollama:mixed"} | template, train={"max_steps": 2})
    run = fine_tune(settings, store.path.parent / "run", Silent())
    assert all(np.isfinite(e["loss"]) for e in run.metrics() if "loss" in e)
    after = load_model(resolve_model("ollama:mixed")).model
    assert mx.array_equal(before, flat(after.parameters())["model.layers.0.mlp.up_proj.weight"])


def test_a_model_that_has_changed_is_read_anew(store, tiny_folder, tmp_path):
    store.add_folder("m", tiny_folder)
    first = resolve_model("ollama:m").path
    assert resolve_model("ollama:m").path == first
    store.add_folder("m", tiny_folder, TYPES)
    assert resolve_model("ollama:m").path != first


def test_names_that_are_taken_are_known(store, tiny_folder):
    store.add_folder("shell:v2", tiny_folder)
    assert has_model("shell:v2") and has_model("Shell:V2")
    assert not has_model("shell") and not has_model("..")


def test_scales_of_whole_tensors_are_refused(store, tiny_folder):
    store.add_folder("nv", tiny_folder)
    arrays = {"a.weight": mx.zeros((2, 2)), "a.weight.global_scale": mx.zeros(1)}
    layers = [("json", "config.json", store.blob(b"{}"))]
    store.add("nv", [*layers, ("tensor", "a.weight", store.tensors(arrays))])
    with pytest.raises(ModelError, match="a scale for the whole tensor") as raised:
        resolve_model("ollama:nv")
    assert raised.value.where == "ollama:nv"


def test_other_ways_of_quantizing_are_refused_by_name(store, tiny_folder):
    store.add_folder("odd", tiny_folder, TYPES, quant_type="q4_odd")
    with pytest.raises(ModelError, match="quantized as q4_odd"):
        resolve_model("ollama:odd")


@pytest.mark.parametrize("size", ["abc", "0", "-64"])
def test_a_group_size_that_cannot_be_is_refused(store, tiny_folder, size):
    store.add_folder("odd", tiny_folder, TYPES, group_size=size)
    with pytest.raises(ModelError, match=f"groups of '{size}'") as raised:
        resolve_model("ollama:odd")
    assert raised.value.where == "ollama:odd"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "draft/config.json",
        "tensor-00001.safetensors",
        "a\0.json",
        "n" * 300 + ".json",
    ],
)
def test_files_with_odd_names_are_left_out(store, tiny_folder, name):
    store.add_folder("m", tiny_folder)
    manifest = store.path.joinpath("manifests", *parse_name("m").parts)
    said = json.loads(manifest.read_text())
    said["layers"].insert(
        0, {"mediaType": f"{PREFIX}json", "name": name, "digest": store.blob(b"{}")}
    )
    manifest.write_text(json.dumps(said))
    folder = resolve_model("ollama:m").path
    assert (folder / "config.json").is_file()
    assert load_model(resolve_model("ollama:m")).model


def test_a_model_without_a_config_is_refused(store):
    store.add("bare", [("tensor", "a", store.tensors({"a": mx.zeros(2)}))])
    with pytest.raises(ModelError, match="has no config"):
        resolve_model("ollama:bare")


def test_blobs_that_are_gone_or_cut_off_are_told(store, tiny_folder):
    store.add_folder("m", tiny_folder)
    largest = max((store.path / "blobs").iterdir(), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[:-8])
    with pytest.raises(ModelError, match="truncated") as raised:
        resolve_model("ollama:m")
    assert raised.value.where == "ollama:m"
    largest.unlink()
    with pytest.raises(ModelError, match="damaged: there is no"):
        resolve_model("ollama:m")
    assert not list((store.path.parent / "cache/ollama").glob("*"))


def test_an_adapter_on_a_model_names_the_model(store):
    store.add("both", [("model", "", store.blob(b"GGUF")), ("adapter", "", store.blob(b"a"))])
    manifest = store.path.joinpath("manifests", *parse_name("both").parts)
    said = json.loads(manifest.read_text())
    said["layers"][0]["from"] = "registry.ollama.ai/library/smollm2:135m"
    manifest.write_text(json.dumps(said))
    with pytest.raises(ModelError, match="with an adapter on it") as raised:
        resolve_model("ollama:both")
    assert "ollama:smollm2:135m" in raised.value.remedy
