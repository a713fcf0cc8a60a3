"""Damaged GGUF files: a clear error or a valid read, never anything else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mlxtune.errors import ModelError
from mlxtune.gguf.architectures import for_gguf
from mlxtune.gguf.metadata import config_from_metadata
from mlxtune.gguf.model import read_config, read_model
from mlxtune.gguf.reader import GGUFFile, Numbers
from mlxtune.gguf.tokenizer import read_tokenizer
from support.gguf_files import write_gguf_with_package, write_small_gguf
from support.llama_vocab import LlamaVocab


def read_bytes(path: Path) -> dict[str, bytes]:
    file = GGUFFile(path)
    data = {name: file.data(name).tobytes() for name in file.tensors}
    assert all(len(data[name]) == info.nbytes for name, info in file.tensors.items())
    return data


def read_weights(path: Path) -> dict[str, mx.array]:
    return read_model(GGUFFile(path)).weights


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path):
    write_small_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    tensors = read_bytes(tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    for length in np.random.default_rng(0).integers(0, len(whole), 40):
        cut.write_bytes(whole[:length])
        # Nothing is lost while only the padding after the last tensor is cut off.
        try:
            assert read_bytes(cut) == tensors
        except ModelError as error:
            assert error.where == str(cut)


@pytest.mark.parametrize("read", [read_bytes, read_weights])
def test_a_damaged_header_is_an_error_or_a_valid_read(tmp_path, read: Callable[[Path], object]):
    write_small_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    header = min(info.start for info in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    damaged = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(1)
    escaped: dict[str, str] = {}
    tracemalloc.start()
    for _ in range(300):
        place, value = int(generator.integers(header)), int(generator.integers(256))
        damaged.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            read(damaged)
        except ModelError:
            pass
        except Exception as error:
            escaped[f"{type(error).__name__}: {error}"] = f"byte {place} = {value}"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not escaped
    assert peak < 16 * 2**20


@pytest.mark.parametrize("count", [2**63, 2**40, 2**32 + 1])
@pytest.mark.parametrize("place", [8, 16])
def test_impossible_counts_are_refused_at_once(tmp_path, place, count):
    path = tmp_path / "x.gguf"
    write_small_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[:place] + struct.pack("<Q", count) + data[place + 8 :])
    with pytest.raises(ModelError):
        GGUFFile(path)


def _after(data: bytes, name: str, skipped: int, value: bytes) -> bytes:
    """The file with `value` put `skipped` bytes behind a name in its header."""
    place = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + skipped
    return data[:place] + value + data[place + len(value) :]


@pytest.mark.parametrize("heads", [0, 5, 7, 2**32 - 1])
@pytest.mark.parametrize("key", ["head_count", "head_count_kv"])
def test_heads_that_do_not_divide_the_rows_are_damage(tmp_path, key, heads):
    path = tmp_path / "x.gguf"
    write_small_gguf(path)
    key = f"llama.attention.{key}"
    path.write_bytes(_after(path.read_bytes(), key, 4, struct.pack("<I", heads)))
    with pytest.raises(ModelError):
        read_model(GGUFFile(path))


@pytest.mark.parametrize("type_", [Type.I8, Type.F64, Type.Q8_1, Type.Q8_K])
def test_a_tensor_of_a_type_that_cannot_be_read_is_refused_by_its_type(tmp_path, type_):
    path = tmp_path / "x.gguf"
    write_small_gguf(path)
    read = GGUFFile(path).metadata | {"llama.embedding_length": 256}
    metadata = {k: list(v) if isinstance(v, Numbers) else v for k, v in read.items()}
    metadata.pop("general.architecture")
    block, size = gguf.GGML_QUANT_SIZES[type_]
    data = np.zeros((24, 256 // block * size), np.uint8)
    tensors = {"blk.0.ffn_up.weight": (data, type_)}
    write_gguf_with_package(path, metadata, tensors, "llama")
    with pytest.raises(ModelError) as caught:
        read_model(GGUFFile(path))
    assert type_.name in str(caught.value)


@pytest.mark.parametrize("dimension", [4, 12])
@pytest.mark.parametrize("name", ["blk.0.attn_output.weight", "output.weight"])
def test_a_tensor_without_elements_is_damage_or_empty(tmp_path, name, dimension):
    path = tmp_path / "x.gguf"
    write_small_gguf(path)
    path.write_bytes(_after(path.read_bytes(), name, dimension, bytes(8)))
    try:
        assert GGUFFile(path).data(name).size == 0
    except ModelError as error:
        assert name in str(error)


TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


def test_the_small_tokenizer_is_sound_when_it_is_not_damaged():
    tokenizer = read_tokenizer(TOKENIZER, where="x.gguf")
    assert tokenizer("abba<end>").input_ids == [2, 1, 0, 3]
    assert tokenizer.eos_token == "<end>"


@pytest.mark.parametrize("number", [4, 2**31, 2**32 - 1])
@pytest.mark.parametrize("role", ["eos", "bos", "unknown", "padding", "eot"])
def test_a_special_id_of_no_token_is_none_as_in_llama_cpp(role, number, tmp_path):
    """Files for want of such a token have 2³² - 1 there."""
    meta = TOKENIZER | {f"tokenizer.ggml.{role}_token_id": number}
    theirs, ours = LlamaVocab(meta, tmp_path), read_tokenizer(meta, where="x.gguf")
    for text in ("abba<end>", "ab"):
        assert ours(text).input_ids == theirs(text)
    assert ours.eos_token == (None if role == "eos" else "<end>")
    sizes = {
        f"llama.{key}": value
        for key, value in {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "attention.head_count": 1,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }.items()
    }
    config = config_from_metadata(for_gguf("llama"), meta | sizes, tied=True)
    assert config["bos_token_id"] is None
    assert config["eos_token_id"] == (None if role == "eos" else 3)


def test_a_gguf_that_is_no_model_is_named(tmp_path):
    write_small_gguf(tmp_path / "a.gguf", {"general.type": "adapter", "adapter.type": "lora"})
    write_small_gguf(tmp_path / "b.gguf", {"general.type": "mmproj"}, arch="clip")
    for name, words in (("a.gguf", "holds an adapter, not a model"), ("b.gguf", "sees or hears")):
        with pytest.raises(ModelError, match=words) as told:
            read_config(GGUFFile(tmp_path / name))
        assert told.value.where == str(tmp_path / name)


def test_architectures_are_listed_once():
    with pytest.raises(ModelError) as told:
        for_gguf("unheard-of")
    names = told.value.remedy.partition("supported: ")[2].partition(";")[0].split(", ")
    assert "gemma3" in names and len({*names}) == len(names)


@pytest.mark.parametrize(
    "damage",
    [
        {"model": "llama"},
        {"pre": "unheard-of"},
        {"tokens": None},
        {"token_type": None},
        {"token_type": [1, 1, 1]},
        {"merges": None},
        {"merges": ["ab"]},
        {"merges": ["a z"]},
    ],
)
def test_a_damaged_vocabulary_is_refused_with_its_place(damage):
    changed = TOKENIZER | {f"tokenizer.ggml.{key}": value for key, value in damage.items()}
    metadata = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(ModelError) as caught:
        read_tokenizer(metadata, where="x.gguf")
    assert caught.value.where == "x.gguf"
