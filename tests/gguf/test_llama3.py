"""Divisors of rotary frequencies in a GGUF, and the settings that they are read back as."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlxtune.export.convert import convert, convert_to_folder
from mlxtune.gguf.llama3 import llama3_factors, llama3_scaling
from mlxtune.gguf.model import read_config
from mlxtune.gguf.reader import GGUFFile
from mlxtune.models.load import load_model
from mlxtune.models.resolve import resolve_model
from support.gguf_files import random_weights
from support.models import save_real_vocabulary

IDS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1] * 8])


def theirs(base: float, dims: int, scaling: dict[str, float]) -> np.ndarray:
    """The divisors by transformers."""
    config = LlamaConfig(
        head_dim=dims,
        hidden_size=dims,
        num_attention_heads=1,
        max_position_embeddings=262_144,
        rope_parameters={"rope_type": "llama3", "rope_theta": base, **scaling},
    )
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / (base ** (torch.arange(0, dims, 2).double() / dims))
    return (plain / inverse.double()).numpy()


USUAL = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SETTINGS = [
    {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    for factor in (1.5, 8.0, 32.0)
    for low, high in ((1.0, 4.0), (1.0, 1.5), (2.0, 8.0), (0.5, 3.0))
    for original in (16, 100, 512, 5000, 8192, 131_072)
]


@pytest.mark.parametrize("dims", [16, 64, 128])
@pytest.mark.parametrize("base", [500.0, 10_000.0, 500_000.0])
def test_settings_are_found_that_have_the_same_divisors(base, dims):
    """Of transformers' own, whatever the settings were; the usual ones are found as they were."""
    for scaling in SETTINGS:
        want = theirs(base, dims, scaling)
        np.testing.assert_allclose(llama3_factors(base, dims, scaling), want, rtol=1e-4)
        found = llama3_scaling(base, llama3_factors(base, dims, scaling))
        assert found is not None, scaling
        # llama.cpp's converter computes them in float32, as transformers does.
        assert llama3_scaling(base, want.astype(np.float32)) is not None, scaling
        told = {key: found[key] for key in scaling}
        np.testing.assert_allclose(theirs(base, dims, told), want, rtol=1e-4, err_msg=str(told))
        if (dims, base, scaling) == (128, 500_000.0, scaling | USUAL):
            assert told == scaling


SCALINGS = {
    "a short original length": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "steep": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.5,
        "original_max_position_embeddings": 300,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_what_was_written_is_read_again(name, tmp_path):
    save_real_vocabulary(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config |= {"rope_scaling": {"rope_type": "llama3"} | SCALINGS[name]}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    made = convert(str(tmp_path / "m"), tmp_path / "m.gguf", file_type="f32")
    assert made.verified is not None
    convert_to_folder(str(made.path), tmp_path / "folder")
    want = load_model(resolve_model(str(tmp_path / "m"))).model(IDS)
    for path in (made.path, tmp_path / "folder"):
        got = load_model(resolve_model(str(path))).model(IDS)
        assert mx.abs(got - want).max().item() < 1e-4


def with_divisors(source: Path, path: Path, values: np.ndarray) -> None:
    """A GGUF with other divisors in the place of its own."""
    file = GGUFFile(source)
    start = file.tensors["rope_freqs.weight"].start
    data = bytearray(source.read_bytes())
    data[start : start + values.nbytes] = values.astype("<f4").tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["any", "all alike"])
def test_divisors_that_are_not_llama_3s_are_used_as_they_stand(kind, tmp_path):
    """Against the attention that NumPy makes of them."""
    save_real_vocabulary(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config |= {"rope_scaling": {"rope_type": "llama3"} | SCALINGS["steep"]}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    convert(str(tmp_path / "m"), tmp_path / "llama3.gguf", file_type="f32", verify=False)
    values = np.array([1, 3, 1.5, 2, 7, 4, 4.5, 2], np.float32)
    values = values if kind == "any" else np.full(8, 3, np.float32)
    with_divisors(tmp_path / "llama3.gguf", tmp_path / "m.gguf", values)
    _, read = read_config(GGUFFile(tmp_path / "m.gguf"))
    assert read["rope_scaling"]["type"] == ("longrope" if kind == "any" else "linear")
    model = load_model(resolve_model(str(tmp_path / "m.gguf"))).model
    x = random_weights(1, 1, 6, 16)
    angles = np.arange(6)[:, None] / (10_000.0 ** (np.arange(0, 16, 2) / 16) * values)
    first, second = x[..., :8], x[..., 8:]
    turned = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ],
        axis=-1,
    )
    got = np.array(model.layers[0].self_attn.rope(mx.array(x)))
    np.testing.assert_allclose(got, turned, atol=1e-5)
    # And a GGUF of it is one again.
    again = convert(str(tmp_path / "m.gguf"), tmp_path / "again.gguf", file_type="f32")
    if kind == "any":
        written = GGUFFile(again.path).data("rope_freqs.weight")
        np.testing.assert_array_equal(written, values)
