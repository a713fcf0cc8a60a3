"""Models in several GGUF files, as llama.cpp names and loads them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxtune.errors import ModelError
from mlxtune.export.convert import convert
from mlxtune.gguf.reader import GGUFFile
from mlxtune.models.load import load_model
from mlxtune.models.resolve import resolve_model
from support.llamacpp import next_tokens
from support.models import save_real_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save_real_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "small.gguf"
    return convert(str(folder), path, file_type="q8_0", verify=False).path


@pytest.fixture(scope="module")
def split(folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("split")
    made = convert(str(folder), place / "small.gguf", file_type="q8_0", split_max_bytes=40_000)
    assert len(made.files) > 2 and made.verified.readback.tensors == 20
    return place


def test_no_part_is_larger_than_it_may_be(folder, whole, tmp_path):
    infos = GGUFFile(whole).tensors.values()
    head = whole.stat().st_size - sum(info.nbytes for info in infos)
    limit = head + max(4 * math.prod(info.shape) for info in infos) + 10_000
    made = convert(
        str(folder), tmp_path / "m.gguf", file_type="f32", split_max_bytes=limit, verify=False
    )
    sizes = [(tmp_path / name).stat().st_size for name in made.files]
    assert len(sizes) > 1 and limit // 2 < max(sizes) <= limit


@pytest.fixture
def parts(split, tmp_path) -> list[Path]:
    return sorted(Path(shutil.copy(part, tmp_path)) for part in split.iterdir())


@pytest.mark.parametrize("number", [0, 1, -1])
def test_any_part_opens_the_whole_model(parts, whole, number):
    one, split = GGUFFile(whole), GGUFFile(parts[number])
    assert split.path == parts[0]
    assert {k: v for k, v in split.metadata.items() if "split." not in k} == one.metadata
    assert list(split.tensors) == list(one.tensors)
    for name in one.tensors:
        assert np.array_equal(split.data(name), one.data(name)), name
        assert np.array_equal(split.read(name), one.data(name)), name


def test_a_part_is_a_model_to_load_and_to_convert(parts, whole, tmp_path):
    loaded = load_model(resolve_model(str(parts[1])))
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("find .")) == "find ."
    again = convert(str(parts[0]), tmp_path / "again.gguf", file_type="q8_0")
    assert GGUFFile(again.path).tensors.keys() == GGUFFile(whole).tensors.keys()


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    with pytest.raises(ModelError, match="missing") as caught:
        GGUFFile(parts[0])
    assert caught.value.where == str(parts[1])


def test_parts_that_do_not_fit_together_are_refused(parts, tmp_path):
    with pytest.raises(ModelError, match="name does not say"):
        GGUFFile(Path(shutil.copy(parts[0], tmp_path / "model.gguf")))
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    with pytest.raises(ModelError, match="part 2") as caught:
        GGUFFile(parts[0])
    assert caught.value.where == str(parts[1])
    parts[1].write_bytes(kept[:-1000])
    with pytest.raises(ModelError, match="truncated") as caught:
        GGUFFile(parts[0])
    assert caught.value.where == str(parts[1])


def test_a_count_of_tensors_that_is_not_that_of_the_parts_is_damage(tmp_path):
    for number in range(2):
        path = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 3)
        writer.add_tensor(f"t{number}", np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(ModelError, match="2 tensors, not 3"):
        GGUFFile(path)


def test_llama_cpp_loads_the_first_part(whole, parts):
    tokens = [504, 2537, 841, 260, 284, 1017]
    one, several = (next_tokens(path, tokens, [1, 3, 6]) for path in (whole, parts[0]))
    assert one == several
