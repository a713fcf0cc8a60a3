"""Importance matrices, in files put together by hand as llama.cpp's readers expect them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxtune.errors import ExportError
from mlxtune.gguf.imatrix import read_imatrix, write_imatrix

RNG = np.random.default_rng(0)
SUMS = {
    "blk.0.attn_q.weight": (100 * RNG.random(64)).astype(np.float32),
    "blk.1.ffn_down_exps.weight": (100 * RNG.random((4, 32))).astype(np.float32),
}
COUNTS = {
    "blk.0.attn_q.weight": np.array([1536], np.float32),
    "blk.1.ffn_down_exps.weight": np.array([7, 0, 1536, 3], np.float32),
}
MEANS = {
    "blk.0.attn_q.weight": SUMS["blk.0.attn_q.weight"] / np.float32(1536),
    "blk.1.ffn_down_exps.weight": np.concatenate(
        [
            SUMS["blk.1.ffn_down_exps.weight"][0] / np.float32(7),
            np.ones(32, np.float32),
            SUMS["blk.1.ffn_down_exps.weight"][2] / np.float32(1536),
            SUMS["blk.1.ffn_down_exps.weight"][3] / np.float32(3),
        ]
    ),
}


def old_form(entries: dict[str, tuple[int, np.ndarray]]) -> bytes:
    """imatrix.cpp: save_imatrix_legacy"""
    data = struct.pack("<i", len(entries))
    for name, (runs, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", runs, len(values)) + values.astype("<f4").tobytes()
    return data + struct.pack("<ii", 12, 8) + b"wiki.txt"


def new_form(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    """imatrix.cpp: save_imatrix"""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(read: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert read.keys() == want.keys()
    for name, values in want.items():
        assert read[name].dtype == np.float32
        assert np.array_equal(read[name], values), name


def test_the_gguf_form_is_read_as_means(tmp_path):
    tensors = {}
    for name, sums in SUMS.items():
        tensors[name + ".in_sum2"] = np.atleast_2d(sums)
        tensors[name + ".counts"] = COUNTS[name].reshape(-1, 1)
    check(read_imatrix(new_form(tmp_path / "i.gguf", tensors)), MEANS)


def test_the_older_form_is_read_as_means(tmp_path):
    path = tmp_path / "imatrix.dat"
    a, b = SUMS["blk.0.attn_q.weight"], SUMS["blk.1.ffn_down_exps.weight"].reshape(-1)
    path.write_bytes(old_form({"a.weight": (12, a), "b.weight": (0, b)}))
    check(read_imatrix(path), {"a.weight": a / np.float32(12), "b.weight": b})
    # Files before 2024 end after the entries.
    path.write_bytes(path.read_bytes()[:-16])
    check(read_imatrix(path), {"a.weight": a / np.float32(12), "b.weight": b})


def test_what_is_written_is_read_again_and_has_what_llama_quantize_asks_for(tmp_path):
    path = tmp_path / "i.gguf"
    write_imatrix(path, SUMS, COUNTS, ["shell.txt", "wiki.txt"], chunk_size=128)
    check(read_imatrix(path), MEANS)
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["shell.txt", "wiki.txt"]
    assert values["imatrix.chunk_size"] == 128
    assert values["imatrix.chunk_count"] == 12
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    assert shapes == {
        "blk.0.attn_q.weight.in_sum2": (64, 1),
        "blk.0.attn_q.weight.counts": (1, 1),
        "blk.1.ffn_down_exps.weight.in_sum2": (32, 4),
        "blk.1.ffn_down_exps.weight.counts": (1, 4),
    }


@pytest.mark.parametrize("form", ["old", "new"])
def test_a_file_cut_anywhere_is_a_clear_error(tmp_path, form):
    path = tmp_path / "imatrix"
    if form == "old":
        whole, end = old_form({"a.weight": (3, np.ones(8))}), -16
        path.write_bytes(whole)
    else:
        write_imatrix(path, SUMS, COUNTS, ["wiki.txt"])
        whole, end = path.read_bytes(), -32
    for length in range(0, len(whole) + end, 1 if form == "old" else 13):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=r"truncated|empty|damaged") as caught:
            read_imatrix(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no entries"),
        ({"a.weight.in_sum2": np.ones((1, 8), np.float32)}, "a.weight.counts is missing"),
        ({"a.weight.counts": np.ones((1, 1), np.float32)}, "a.weight.in_sum2 is missing"),
        (
            {"a.in_sum2": np.ones((1, 8), np.float16), "a.counts": np.ones((1, 1), np.float32)},
            "not float32",
        ),
        (
            {"a.in_sum2": np.ones((1, 8), np.float32), "a.counts": np.ones((3, 1), np.float32)},
            "8 sums for 3 experts",
        ),
        (
            {"a.in_sum2": -np.ones((1, 8), np.float32), "a.counts": np.ones((1, 1), np.float32)},
            "no mean of squares",
        ),
        (
            {"a.in_sum2": np.full((1, 8), np.nan, "f4"), "a.counts": np.ones((1, 1), np.float32)},
            "no mean of squares",
        ),
    ],
)
def test_damage_is_named(tmp_path, tensors, words):
    with pytest.raises(ExportError, match=words):
        read_imatrix(new_form(tmp_path / "i.gguf", tensors))


def test_other_files_are_told_apart(tmp_path):
    with pytest.raises(ExportError, match=r"general\.type is 'model'"):
        read_imatrix(new_form(tmp_path / "i.gguf", {}, kind="model"))
    with pytest.raises(ExportError, match="cannot be read"):
        read_imatrix(tmp_path / "none")
    (tmp_path / "text").write_text("what is this? " * 100)
    with pytest.raises(ExportError, match="no importance matrix at all"):
        read_imatrix(tmp_path / "text")


def test_sums_and_counts_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "i.gguf"
    with pytest.raises(ExportError, match="not both"):
        write_imatrix(path, SUMS, {}, [])
    with pytest.raises(ExportError, match="different numbers"):
        write_imatrix(path, {"a": SUMS["blk.0.attn_q.weight"]}, {"a": np.ones(2, np.float32)}, [])
    assert not path.exists()
