"""The same records from every kind of file, and what is said of files that are damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from mlxtune.data.convert import convert_file
from mlxtune.data.files import find_files
from mlxtune.data.sources import Source, read_conversations
from mlxtune.errors import DataError
from mlxtune.install import install_extra
from support.files import write_jsonl
from support.program import mlxtune

RECORDS = [
    {"prompt": "list files", "completion": "ls", "category": "files"},
    {"prompt": 'say "hi", then\nwait; a\ttab', "completion": "echo hi\r\nsleep 1", "category": ""},
    {"prompt": "naïve 🎉 | bar", "completion": " ls | wc -l ", "category": "pipes"},
]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
JSONL = "".join(f"{line}\n" for line in LINES).encode()


def table(delimiter: str, records: list[dict[str, str]] = RECORDS) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def zst(*parts: bytes, **how: int) -> bytes:
    """Parts compressed as a frame each."""
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor(**how).compress(part) for part in parts)


def parquet(records: list[dict[str, object]], **how: object) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    target = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), target, **how)
    return target.getvalue()


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def refusal(tmp_path):
    """Place (without the folder) and text of what is wrong with a file of these bytes."""

    def read(name: str, data: bytes | str, **how: object) -> tuple[str, str]:
        path = put(tmp_path, name, data)
        with pytest.raises(DataError) as raised:
            read_conversations(path, **how)
        assert raised.value.where.startswith(str(path))
        return raised.value.where.removeprefix(f"{tmp_path}/"), raised.value.what

    return read


KINDS = {
    "a.jsonl": (lambda: JSONL, [":1", ":2", ":3"]),
    "a.ndjson": (lambda: JSONL, [":1", ":2", ":3"]),
    "a.JSONL": (lambda: JSONL, [":1", ":2", ":3"]),
    "a.json": (lambda: json.dumps(RECORDS, indent=1).encode(), [":2", ":7", ":12"]),
    "b.json": (lambda: f"\ufeff\n[{','.join(LINES)}\n]\n".encode(), [":2"] * 3),
    "c.json": (
        lambda: json.dumps({"version": 1, "data": RECORDS}).encode(),
        [" record 1", " record 2", " record 3"],
    ),
    # A row's line is that on which it ends.
    "comma.csv": (lambda: table(","), [":2", ":5", ":6"]),
    "semicolon.csv": (lambda: b"\xef\xbb\xbf" + table(";"), [":2", ":5", ":6"]),
    "excel.csv": (lambda: b"\xef\xbb\xbfsep=;\r\n" + table(";"), [":3", ":6", ":7"]),
    "tab.csv": (lambda: table("\t"), [":2", ":5", ":6"]),
    "bar.csv": (lambda: table("|"), [":2", ":5", ":6"]),
    "a.tsv": (lambda: table("\t"), [":2", ":5", ":6"]),
    "a.parquet": (lambda: parquet(RECORDS), [" row 1", " row 2", " row 3"]),
    "groups.parquet": (
        lambda: parquet(RECORDS, row_group_size=1, compression="gzip"),
        [" row 1", " row 2", " row 3"],
    ),
    "a.jsonl.gz": (lambda: gzip.compress(JSONL), [":1", ":2", ":3"]),
    "b.jsonl.gz": (
        lambda: gzip.compress(JSONL[:20]) + gzip.compress(JSONL[20:]),
        [":1", ":2", ":3"],
    ),
    "a.csv.gz": (lambda: gzip.compress(table(",")), [":2", ":5", ":6"]),
    "a.json.GZ": (lambda: gzip.compress(json.dumps(RECORDS).encode()), [":1"] * 3),
    "a.jsonl.zst": (lambda: zst(JSONL, write_checksum=True), [":1", ":2", ":3"]),
    "frames.jsonl.zst": (
        lambda: zst(JSONL[:20], b"", JSONL[20:50], JSONL[50:]),
        [":1", ":2", ":3"],
    ),
    "skipped.jsonl.zst": (
        lambda: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zst(JSONL) + b"\x51\x2a\x4d\x18\0\0\0\0",
        [":1", ":2", ":3"],
    ),
    "a.tsv.zst": (lambda: zst(table("\t")), [":2", ":5", ":6"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_conversations_at_their_lines(tmp_path, name):
    make, places = KINDS[name]
    path = put(tmp_path, name, make())
    wanted = read_conversations(write_jsonl(tmp_path / "wanted.jsonl", RECORDS))
    found = read_conversations(path)
    assert [c.where for c in found] == [f"{path}{place}" for place in places]
    assert [replace(c, where="") for c in found] == [replace(c, where="") for c in wanted]


def test_a_file_of_no_known_ending_is_jsonl(tmp_path):
    assert len(read_conversations(put(tmp_path, "records", JSONL))) == 3


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "list", "output": "ls", "history": []},
        {"prompt": [{"role": "user", "content": "list"}], "completion": "ls"},
        {"prompt": "list", "completion": "ls", "tools": [{"name": "f"}]},
        {"messages": [{"role": "user", "content": "list"}]},
        {"conversations": [{"from": "human", "value": "list"}]},
        {"segments": [{"label": True, "text": "list"}]},
        {"text": "list", "sources": [{"name": "wiki"}]},
    ],
)
def test_a_json_file_may_be_one_record_whatever_lists_it_has(tmp_path, record):
    path = put(tmp_path, "a.json", "\n\n" + json.dumps(record, indent=2))
    (conversation,) = read_conversations(path)
    assert conversation.where == f"{path}:3"
    assert "list" in conversation.text()


def test_a_table_may_hold_messages_with_nulls(tmp_path):
    call = {"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "one", "train": True},
    ]
    records = [{"messages": messages, "id": 1}, {"messages": messages[:1], "id": None}]
    path = put(tmp_path, "a.parquet", parquet(records))
    lines = write_jsonl(
        tmp_path / "a.jsonl", [records[0], {k: v for k, v in records[1].items() if v is not None}]
    )
    found, wanted = read_conversations(path), read_conversations(lines)
    assert [replace(c, where="") for c in found] == [replace(c, where="") for c in wanted]


def test_what_json_has_no_form_for_becomes_text_in_a_table_and_can_be_written(tmp_path):
    extra = {"day": date(2026, 1, 2), "at": datetime(2026, 1, 2, 3), "price": Decimal("1.50")}
    path = put(tmp_path, "a.parquet", parquet([RECORDS[0] | extra]))
    assert convert_file(Source(str(path)), tmp_path / "b.jsonl", "messages") == 1
    (conversation,) = read_conversations(tmp_path / "b.jsonl")
    told = {"day": "2026-01-02", "at": "2026-01-02T03:00:00", "price": "1.50"}
    assert conversation.tags == told | {"category": "files"}


def test_bytes_in_a_table_cannot_be_written_as_json(tmp_path):
    path = put(tmp_path, "a.parquet", parquet([RECORDS[0] | {"image": b"\xff"}]))
    with pytest.raises(DataError, match="JSON cannot hold a field of it") as raised:
        convert_file(Source(str(path)), tmp_path / "b.jsonl", "messages")
    assert raised.value.where == f"{path} row 1"
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_tables_have_cells_as_long_as_a_document(tmp_path):
    record = RECORDS[0] | {"prompt": "x" * 200_000}
    assert read_conversations(put(tmp_path, "a.csv", table(",", [record])))[0].tags == {
        "category": "files"
    }


def test_line_breaks_of_old_macs_and_windows_end_rows(tmp_path):
    for number, newline in enumerate(["\r", "\r\n"]):
        text = newline.join(["prompt,completion", "a,b", "", "c,d", ""])
        found = read_conversations(put(tmp_path, f"{number}.csv", text))
        assert [c.answer() for c in found] == ["b", "d"]


def test_an_archive_that_looks_back_far_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    how = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    path = put(tmp_path, "a.jsonl.zst", packer.compress(JSONL) + packer.flush())
    assert len(read_conversations(path)) == 3


# Folders and patterns


@pytest.fixture
def tree(tmp_path) -> Path:
    folder = tmp_path / "tree"
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json", "sub.json", ".hidden.jsonl", ".git/x.json"):
        line = json.dumps({"text": name}).encode() + b"\n"
        put(folder, name, gzip.compress(line) if name.endswith("gz") else line)
    for name in ("README.md", "notes.gz", "LICENSE", "a.jsonl.bak", "cache.jsonl.d/x"):
        put(folder, name, "no record")
    (folder / "empty.jsonl").mkdir()
    return folder


def test_a_folder_holds_its_data_files_in_order_of_name(tree):
    texts = [c.text() for c in read_conversations(tree)]
    assert texts == ["a.jsonl.gz", "b.jsonl", "sub/c.json", "sub.json"]


def test_a_folder_below_a_hidden_one_is_a_folder_like_others(tree):
    assert [c.text() for c in read_conversations(tree / ".git")] == [".git/x.json"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl*", ["a.jsonl.bak", "a.jsonl.gz", "b.jsonl"]),
        ("**/*.json", ["sub.json", "sub/c.json", ".git/x.json"]),
        ("[bc].json?", ["b.jsonl"]),
        (".h*.jsonl", [".hidden.jsonl"]),
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_pattern_matches_files_but_hidden_ones(tree, monkeypatch, pattern, names, absolute):
    monkeypatch.chdir(tree)
    found = find_files(f"{tree}/{pattern}" if absolute else pattern)
    assert found == sorted(tree / name if absolute else Path(name) for name in names)


def test_a_file_may_be_called_like_a_pattern(tmp_path):
    assert len(read_conversations(put(tmp_path, "a[1].jsonl", JSONL))) == 3


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no*.jsonl", "no file matches this pattern"),
        ("a/**b", "this cannot be a path"),
        ("a\0.jsonl", "this cannot be a path: it has a NUL character in it"),
        ("a" * 5000, "this cannot be a path"),
        ("a" * 5000 + "*", "this cannot be a path"),
        ("~no such user/a.jsonl", "this cannot be a path"),
    ],
    ids=["no-match", "stars", "nul", "long", "long-pattern", "home"],
)
def test_a_path_that_names_nothing_is_told(tmp_path, monkeypatch, path, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as raised:
        read_conversations(path)
    assert (raised.value.where, raised.value.what[: len(what)]) == (path, what)


def test_a_folder_without_data_files_says_how_they_end(tmp_path):
    put(tmp_path, "README.md", "# Data")
    with pytest.raises(DataError, match="no data files") as raised:
        read_conversations(tmp_path)
    assert ".parquet" in raised.value.remedy and ".zst" in raised.value.remedy


@pytest.mark.parametrize("most", [1, 3, 4, 5, 99])
def test_the_first_so_many_records_are_taken_across_files(tree, most):
    assert len(read_conversations(tree, max_samples=most)) == min(most, 4)


def test_a_file_that_is_not_needed_is_not_read(tmp_path):
    put(tmp_path, "a.jsonl", JSONL)
    put(tmp_path, "b.jsonl", "no record")
    assert len(read_conversations(tmp_path, max_samples=3)) == 3


# Damage


@pytest.mark.parametrize(
    ("name", "data", "where", "what"),
    [
        ("a.csv", "prompt,completion\na,b\nc,d,e\n", ":3", "this row has 3 cells and the header 2"),
        ("a.csv", 'prompt,completion\n"a\n\n",b\nc\n', ":5", "this row has 1 cells and the head"),
        ("a.csv", "prompt,prompt\na,b\n", ":1", "two columns"),
        ("a.csv", 'prompt,completion\na,b\n"c,d\ne,f\n', ":3", "this row is not CSV: unexpected"),
        ("a.csv", 'prompt,completion\na,b\n"c"x,d\n', ":3", "this row is not CSV: ',' expected"),
        ("a.csv", '"prompt\n,completion\n', ":1", "this row is not CSV"),
        (
            "a.csv",
            b"prompt,completion\n" + b"a,b\n" * 999 + b"\xff,c\n",
            ":1001",
            "this line is no",
        ),
        ("a.csv", "", "", "it has no records"),
        ("a.csv", "prompt,completion\n", "", "it has no records"),
        ("a.csv", "prompt,completion\na,\n", ":2", "turn 2, the assistant's, is empty"),
        ("a.tsv", "prompt\tcompletion\n\nb\n", ":3", "this row has 1 cells and the header 2"),
        ("a.json", "", ":1", "this is not JSON: Expecting value"),
        ("a.json", "[]", "", "it has no records"),
        ("a.json", '{"data": []}', "", "it has no records"),
        ("a.json", '[\n{"text": "x"}\n{}]', ":3", "a comma or ']' was expected here"),
        ("a.json", '[\n{"text": "x"}\n]\n\n]', ":5", "there is more after the end"),
        ("a.json", JSONL, ":2", "there is more after the end of the JSON"),
        ("a.json", '\n{"text": "x"} }', ":2", "there is more after the end of the JSON"),
        ("a.json", '[{"text": "x"},\n{"text":\n\n x}]', ":4", "this is not JSON: Expecting value"),
        ("a.json", b'[\n{"text":\n"\xff"}]', ":3", "this line is not UTF-8 text"),
        ("a.json", f'[{{"text": "x"}},\n{"[" * 99999}', ":2", "this is not JSON: it is nested"),
        ("a.json", f"[\n{'9' * 5000}]", ":2", "this is not JSON: Exceeds the limit"),
        ("a.json", '[{"text": "x"},\n\n3]', ":3", "a record is a JSON object; this is a number"),
        ("a.json", '{"data": [{"a": 1}]}', " record 1", "a record with the keys a has no known"),
        ("a.jsonl", '{"text": "x"} {"text": "x"}', ":1", "this line is not JSON: Extra data"),
        ("a.jsonl", b"\xff\xfe{\0}\0", ":1", "this line is not UTF-8 text"),
    ],
)
def test_damage_is_told_with_its_line(refusal, name, data, where, what):
    place, told = refusal(name, data)
    assert (place, told[: len(what)]) == (name + where, what)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("pack", [gzip.compress, zst], ids=["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_anywhere_is_told(refusal, name, pack):
    # At the end of a line, or of a record, what is there looks whole.
    content = {"a.jsonl": JSONL, "a.json": JSONL[: JSONL.index(b"\n")], "a.csv": table(",")}[name]
    packed = pack(content)
    name += ".gz" if pack is gzip.compress else ".zst"
    for size in {1, 3, 9, 30, len(packed) // 2, len(packed) - 5, len(packed) - 1}:
        assert refusal(name, packed[:size])[0] == name


def test_a_zstandard_frame_without_its_last_block_is_told_though_all_lines_are_there(refusal):
    zstandard = pytest.importorskip("zstandard")
    packer = zstandard.ZstdCompressor().compressobj()
    begun = packer.compress(JSONL) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert packer.flush()
    where, what = refusal("a.jsonl.zst", zst(JSONL) + begun)
    assert (where, what) == (
        "a.jsonl.zst",
        "the file is cut off: the last Zstandard frame has no end",
    )


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst"])
@pytest.mark.parametrize("data", [JSONL, b"PK\3\4 zip", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_a_file_that_is_not_what_its_ending_says_is_told(refusal, name, data):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    assert refusal(name, data)[0] == name


@pytest.mark.parametrize("pack", [gzip.compress, zst], ids=["gz", "zst"])
def test_what_follows_a_compressed_file_is_told(refusal, pack):
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    assert refusal(name, pack(JSONL) + b"more")[0] == name


@pytest.mark.parametrize("pack", [gzip.compress, zst], ids=["gz", "zst"])
def test_a_wrong_line_in_a_compressed_file_has_its_number(refusal, pack):
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    assert refusal(name, pack(JSONL + b"{}\n"))[0] == f"{name}:4"


def test_a_parquet_file_that_is_cut_off_or_no_such_file_is_told(refusal):
    whole = parquet(RECORDS)
    for data in (b"", b"PAR1", JSONL, whole[:-1], whole[: len(whole) // 2]):
        where, what = refusal("a.parquet", data)
        assert (where, what[:29]) == ("a.parquet row 1", "this is no whole Parquet file")


def test_a_parquet_file_with_a_spoilt_page_is_told(refusal):
    whole = bytearray(parquet(RECORDS, compression="gzip"))
    whole[4:60] = bytes(56)
    assert refusal("a.parquet", bytes(whole))[1].startswith("the file cannot be read")


def test_a_date_that_no_calendar_has_is_told(refusal):
    pyarrow = pytest.importorskip("pyarrow")
    far = pyarrow.scalar(2**62, pyarrow.timestamp("us"))
    target = io.BytesIO()
    columns = {"text": ["x"], "at": pyarrow.array([far])}
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    assert refusal("a.parquet", target.getvalue())[0] == "a.parquet row 1"


def test_a_table_with_two_columns_of_one_name_is_told(refusal):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    target = io.BytesIO()
    text = pyarrow.array(["x"])
    parquet.write_table(pyarrow.Table.from_arrays([text, text], ["text", "text"]), target)
    assert refusal("a.parquet", target.getvalue()) == (
        "a.parquet",
        "two columns have the same name",
    )


# Packages that are not there


@pytest.mark.parametrize(
    ("package", "path", "extra"),
    [
        ("pyarrow", "a.parquet", "data"),
        ("zstandard", "a.jsonl.zst", "data"),
        ("datasets", "hub:someone/something", "hub"),
    ],
)
def test_a_package_that_is_not_there_is_told_with_its_extra(
    tmp_path, monkeypatch, package, path, extra
):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "a.parquet", b"PAR1")
    put(tmp_path, "a.jsonl.zst", b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match="need another package") as raised:
        read_conversations(path)
    assert raised.value.where == path
    assert raised.value.remedy == install_extra(extra)


# The hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A dataset that the library loads without the network: `train` of 3 rows, `test` of 1."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data").mkdir()
    write_jsonl(folder / "data/train.jsonl", RECORDS)
    write_jsonl(folder / "data/test.jsonl", [{"prompt": "a", "completion": "b", "category": None}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(folder)
        yield "hub:./data"


def test_a_hub_dataset_is_read_as_a_file_is(hub, tmp_path):
    wanted = read_conversations(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    found = read_conversations(hub)
    assert [c.where for c in found] == [f"{hub} train row {n}" for n in (1, 2, 3)]
    assert [replace(c, where="") for c in found] == [replace(c, where="") for c in wanted]


def test_a_split_of_a_hub_dataset_is_chosen_and_its_nulls_are_left_out(hub):
    (conversation,) = read_conversations(hub, split="test")
    assert (conversation.answer(), conversation.tags) == ("b", {})
    assert conversation.where == f"{hub} test row 1"


def test_the_first_so_many_rows_of_a_hub_dataset_are_taken(hub):
    assert [c.answer() for c in read_conversations(hub, max_samples=1)] == ["ls"]


def test_splits_of_a_hub_dataset_have_fingerprints_of_their_own(hub):
    train, test = Source(hub), Source(hub, split="test")
    assert train.files() == []
    assert train.fingerprint() == Source(hub).fingerprint() != test.fingerprint()


@pytest.mark.parametrize(
    "how",
    [{"path": "hub:someone/something"}, {"split": "none"}, {"subset": "none"}, {"path": "hub:"}],
)
def test_a_hub_dataset_that_cannot_be_loaded_is_told(hub, how):
    how = {"path": hub} | how
    with pytest.raises(DataError, match="the dataset cannot be loaded") as raised:
        read_conversations(**how)
    assert raised.value.where == how["path"]
    assert "\n" not in raised.value.what


# On the command line

RECIPE = '[model]\npath = "none"\n[[data]]\npath = "{}"\n[train]\nmax_steps = 1\n'


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("a.jsonl", JSONL + b'{"prompt": "x", "completion": 3}\n', "a.jsonl:4"),
        ("a.json", f"[\n{LINES[0]},\n{{}}]".encode(), "a.json:3"),
        ("a.csv", table(",") + b"x,y,z,1\n", "a.csv:7"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-9], "a.jsonl.gz"),
        ("a.parquet", b"PAR1", "a.parquet"),
    ],
    ids=["jsonl", "json", "csv", "gz", "parquet"],
)
def test_a_damaged_file_is_one_block_that_names_it_and_nothing_is_left(tmp_path, name, data, where):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    put(tmp_path, name, data)
    put(tmp_path, "recipe.toml", RECIPE.format(name))
    for verb in (
        ["validate", "recipe.toml"],
        ["data", "convert", name, "b.jsonl", "--to=messages"],
    ):
        done = mlxtune(*verb, cwd=tmp_path)
        first, *rest = done.stderr.splitlines()
        assert done.returncode == 1, done.stderr
        if verb[0] == "validate":  # which says all that is wrong together
            assert any(line.startswith(f"  {where}") for line in rest), done.stderr
        else:
            assert not done.stdout and first.startswith(f"error: {where}"), done.stderr
        assert all(line.startswith("  ") for line in rest), done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "recipe.toml"])


def test_a_quoted_name_does_not_decide_the_delimiter(tmp_path):
    path = put(tmp_path, "a.csv", '"a;b;c","prompt, short",completion\n1,list,ls\n')
    [row] = Source(str(path)).rows()
    assert row.value == {"a;b;c": "1", "prompt, short": "list", "completion": "ls"}


def test_a_table_in_another_encoding_says_how_to_save_it(tmp_path):
    path = put(tmp_path, "a.csv", "prompt;completion\ncafé;x\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8") as raised:
        list(Source(str(path)).rows())
    assert raised.value.where == f"{path}:2" and "CSV UTF-8" in raised.value.remedy
