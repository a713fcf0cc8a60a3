"""Malformed records and files by the thousand: each is read or refused, nothing else happens."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxtune.data.convert import json_line, to_record
from mlxtune.data.formats import FORMATS, detect, parse_record
from mlxtune.data.sources import Source
from mlxtune.errors import DataError
from support.properties import ALL

CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 3}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "list files"}]
SEEDS: dict[str, list[dict[str, Any]]] = {
    "shell": [{"prompt": "list files 🎉", "expected_command": "ls", "category": "files"}],
    "messages": [
        {
            "messages": [
                *ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "Hm.",
                    "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
                    "train": False,
                },
                {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"sky": "x"}},
                {"role": "assistant", "content": [{"type": "text", "text": "ls"}], "weight": 1},
            ],
            "tools": [TOOL],
        }
    ],
    "sharegpt": [
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains.", "train": True},
            ],
            "tools": json.dumps([TOOL]),
            "id": 7,
        }
    ],
    "alpaca": [
        {
            "instruction": "list",
            "input": "files",
            "output": "ls",
            "system": "Be brief.",
            "history": [["hi", "hello"], ["who", "me"]],
        }
    ],
    "preference": [
        {"prompt": "list files", "chosen": "ls", "rejected": "dir", "margin": 0.5},
        {
            "prompt": ASKED,
            "chosen": [{"role": "assistant", "content": "ls"}],
            "rejected": [{"role": "assistant", "content": "dir"}],
        },
        {
            "chosen": [*ASKED, {"role": "assistant", "content": "ls"}],
            "rejected": [*ASKED, {"role": "assistant", "content": "dir"}],
        },
    ],
    "prompt_completion": [
        {"prompt": "list files", "completion": "ls"},
        {
            "prompt": [*ASKED, {"role": "assistant", "content": "?"}, ASKED[1]],
            "completion": [{"role": "assistant", "content": "ls"}],
            "tools": [TOOL],
        },
    ],
    "input_output": [{"segments": [{"label": False, "text": "Q:"}, {"label": True, "text": " A"}]}],
    "text": [{"text": "Once upon a time.", "source": {"name": "book", "pages": [1, 2]}}],
}
ALL_SEEDS = [(name, seed) for name, seeds in SEEDS.items() for seed in seeds]
FLAT = [s for _, s in ALL_SEEDS if all(isinstance(v, str) for v in s.values())]

# How many malformed inputs there are of each kind.
# Of each format; 20,000 together, and a sixth of them in `make test`.
SHARE = 1 if ALL else 6
LINES = 1_900 // SHARE
FILES = {"json": 2_000, "csv": 1_500, "tsv": 300, "gz": 500, "zst": 300, "parquet": 200}
FILES = {kind: number // SHARE for kind, number in FILES.items()}

# Written as a string first, since Python would not write them itself.
RAW = {
    "@huge": "9" * 5000,
    "@tiny": "-1e-99999",
    "@deep": "[" * 400 + "]" * 400,
    "@deeper": '{"a":' * 3000 + "1" + "}" * 3000,
    "@open": "[" * 100,
    "@bare": "Infinity",
}
ODD = [
    *([None], True, False, 0, 1, -1, 0.5, 1e308, 10**400, float("nan"), None),
    *("", " \n", "\0", "\ud83c", "\udc00x", "\u2028", "x" * 3000, "user", "gpt", "function_call"),
    *("null", "[]", "{}", '"{}"', '{"a": "\\ud83c"}', "[1]", json.dumps(CALL), "[" * 3000),
    *([], {}, [[]], [None], [{}], {"a": {"b": []}}, {"\ud83c": 1}, {"": ""}, ["x", "y"]),
    *([CALL], CALL, ASKED, ASKED[1], {"type": "image"}, [{"text": "x"}]),
    *RAW,
]
KEYS = sorted(
    {key for f in FORMATS.values() for key in (*f.keys, *f.optional)}
    | {"role", "from", "content", "value", "train", "weight", "tool_calls", "function", "name"}
    | {"arguments", "id", "tool_call_id", "reasoning", "thinking", "label", "type", "", "\ud83c"}
)
BYTES = [b"\0", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\xff", b"\xf0\x9f", b"\\ud83c"]


def places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [p for key in keys for p in ((value, key), *places(value[key]))]


def spoilt_value(record: object, rng: random.Random) -> object:
    """A copy with something in it replaced, removed, renamed, wrapped or added."""
    record = deepcopy(record)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(record)
        if not found:
            return record
        container, key = rng.choice(found)
        match rng.randrange(7):
            case 0 | 1 | 2:
                container[key] = deepcopy(rng.choice(ODD))
            case 3:
                del container[key]
            case 4:
                container[key] = rng.choice([[container[key]], {"text": container[key]}])
            case 5 if isinstance(container, dict):
                container[rng.choice(KEYS)] = container.pop(key)
            case _ if isinstance(container, dict):
                container[rng.choice(KEYS)] = deepcopy(rng.choice(ODD))
            case _:
                container.insert(key, deepcopy(rng.choice(container)))
    return rng.choice(ODD) if rng.random() < 0.01 else record


def encoded(record: object, rng: random.Random, **how: Any) -> bytes:
    text = json.dumps(record, ensure_ascii=rng.random() < 0.5, **how)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def spoilt_bytes(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A copy with bits turned, a piece cut out, doubled, or taken from elsewhere."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, start + rng.choice([1, 4, 5000]))
        other = rng.choice(others)
        match rng.randrange(6):
            case 0 if data:
                at = min(start, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:start]
            case 2:
                data = data[:end] + data[start:]
            case 3:
                data = data[:start] + rng.choice(BYTES) + data[end:]
            case 4:
                data = data[:start] + other[rng.randrange(len(other)) :]
            case _:
                data = data[:start] + data[end:]
    return data


def outcome(path: Path, format: str = "auto", lines: tuple[int, int] = (1, 9999)) -> str:
    """Read a file; all that it says must be right, and what is read must be written again.

    Args:
        path: the file.
        format: of its records.
        lines: the first and the last that an error may name.
    """
    source = Source(str(path), format=format)
    try:
        row = None
        for row in source.rows():
            require_same_again(row.value, source.parse(row), format)
        if row is None:
            list(source)  # says that there are none
    except DataError as error:
        str(error).encode("utf-8", "backslashreplace")
        assert error.where.startswith(str(path))
        place = error.where.removeprefix(str(path))
        line = re.fullmatch(r"(?::| row | record )(\d+)(?: (?:message|segment) \d+)?", place)
        whole = "no records|cannot be (read|decompressed)|cut off|same name"
        assert line or (place == "" and re.search(whole, error.what)), str(error)
        assert not line or lines[0] <= int(line[1]) <= lines[1]
        return "refused"
    return "read"


def require_same_again(value: object, conversation: Any, format: str) -> None:
    """In every shape that can hold it, and its own at least if that is told by its keys."""
    json.dumps(asdict(conversation) | {"tags": {}}, ensure_ascii=False).encode()
    for shape in {detect(value) if format == "auto" else format, "messages", "sharegpt"}:
        try:
            record = to_record(conversation, shape)
        except DataError as error:
            assert error.where == conversation.where
            continue
        again = parse_record(json.loads(json_line(record)), where=conversation.where)
        # NaN, which Python's JSON has, is not equal to itself.
        assert again == conversation or repr(again) == repr(conversation)


@pytest.mark.parametrize("format", FORMATS)
def test_spoilt_lines_are_read_or_refused_with_their_number(tmp_path, format):
    rng = random.Random(f"lines {format}")
    path = tmp_path / "data.jsonl"
    lines = [encoded(seed, rng) for _, seed in ALL_SEEDS]
    seen: Counter[str] = Counter()
    for number in range(LINES):
        if number % 3:
            line = encoded(spoilt_value(rng.choice(SEEDS[format]), rng), rng)
        else:
            line = spoilt_bytes(encoded(rng.choice(SEEDS[format]), rng), rng, lines)
        before = rng.randrange(3)
        path.write_bytes(b"".join([*[lines[0] + b"\n"] * before, line]))
        named = format if before == 0 and rng.random() < 0.5 else "auto"
        seen[outcome(path, named, (before + 1, before + 1 + line.count(b"\n")))] += 1
    assert seen.total() == LINES
    assert min(seen["read"], seen["refused"]) > LINES / 10, seen


def json_file(rng: random.Random, n: int) -> bytes:
    records = [rng.choice(ALL_SEEDS)[1] for _ in range(rng.randrange(1, 4))]
    value: Any = rng.choice([records, records, records[0], {"v": 1, "data": records}])
    if n % 2:
        value = spoilt_value(value, rng)
    data = encoded(value, rng, indent=rng.choice([None, 1]))
    return data if n % 2 else spoilt_bytes(data, rng, [data])


def table_file(delimiter: str) -> Callable[[random.Random, int], bytes]:
    def make(rng: random.Random, n: int) -> bytes:
        text = io.StringIO()
        rows = [rng.choice(FLAT)] * rng.randrange(1, 4)
        writer = csv.writer(text, delimiter=rng.choice([delimiter, delimiter, ";"]))
        writer.writerow(rows[0])
        for row in rows:
            cells = [v if rng.random() < 0.9 else str(rng.choice(ODD)) for v in row.values()]
            writer.writerow(cells)
        data = text.getvalue().encode("utf-8", "surrogatepass")
        return spoilt_bytes(data, rng, [data, b'"\n\r\n,;\t|"x', b"\xef\xbb\xbf\xff\xfe"])

    return make


def packed_file(pack: Callable[[bytes], bytes]) -> Callable[[random.Random, int], bytes]:
    def make(rng: random.Random, n: int) -> bytes:
        records = [seed for _, seed in rng.choices(ALL_SEEDS, k=2)]
        if n % 4 == 0:
            records[1] = spoilt_value(records[1], rng)
        content = b"".join(encoded(record, rng) + b"\n" for record in records)
        if n % 4 == 0:
            return pack(content)
        return spoilt_bytes(pack(content), rng, [pack(b"{}"), content])

    return make


def parquet_file(rng: random.Random, n: int) -> bytes:
    import pyarrow
    from pyarrow import parquet

    target = io.BytesIO()
    records = [rng.choice(FLAT)] * 2
    if n % 2:
        spoilt = [spoilt_value(record, rng) for record in records]
        texts = [json.dumps(r, ensure_ascii=False) for r in spoilt]
        records = [json.loads(t) for t in texts if "\\ud" not in t and t.isascii() and t[0] == "{"]
    try:
        parquet.write_table(pyarrow.Table.from_pylist(records), target)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        parquet.write_table(pyarrow.Table.from_pylist(FLAT[:1]), target)
    data = target.getvalue()
    # Cut off only: what is inside is pyarrow's to read, and may end the process if turned.
    return data if n % 2 else data[: rng.randrange(len(data))]


@pytest.mark.parametrize("kind", FILES)
def test_spoilt_files_are_read_or_refused_with_their_place(tmp_path, kind):
    if kind in ("zst", "parquet"):
        pytest.importorskip({"zst": "zstandard", "parquet": "pyarrow"}[kind])
    make = {
        "json": json_file,
        "csv": table_file(","),
        "tsv": table_file("\t"),
        "gz": packed_file(lambda data: gzip.compress(data, 1)),
        "zst": packed_file(lambda data: __import__("zstandard").compress(data)),
        "parquet": parquet_file,
    }[kind]
    path = tmp_path / {"gz": "a.jsonl.gz", "zst": "a.jsonl.zst"}.get(kind, f"a.{kind}")
    rng = random.Random(f"files {kind}")
    seen: Counter[str] = Counter()
    for number in range(FILES[kind]):
        path.write_bytes(make(rng, number))
        seen[outcome(path)] += 1
    assert seen.total() == FILES[kind]
    assert min(seen["read"], seen["refused"]) > FILES[kind] / 50, seen


@pytest.mark.parametrize("depth", range(880, 1000, 3))
def test_nesting_that_json_can_just_read_is_read_or_refused(tmp_path, depth):
    deep = "[" * depth + "]" * depth
    call = f'{{"role": "assistant", "tool_calls": [{{"name": "f", "arguments": {{"a": {deep}}}}}]}}'
    path = tmp_path / "data.jsonl"
    for record in (
        f'{{"messages": [{{"role": {deep}, "content": "x"}}]}}',
        f'{{"messages": [{{"role": "user", "content": {{"a": {deep}}}}}]}}',
        f'{{"messages": [{{"role": "user", "content": [{{"type": {deep}}}]}}]}}',
        f'{{"prompt": "x", "chosen": [{call}], "rejected": [{call}]}}',
        f'{{"text": "x", "tools": [{{"a": {deep}}}], "messages": [{call}]}}',
    ):
        path.write_text(record)
        try:
            list(Source(str(path)))
        except DataError as error:
            assert error.where.startswith(f"{path}:1")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([v for v in ODD if isinstance(v, str)]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
RECORDS = st.sampled_from(sorted(FORMATS)).flatmap(
    lambda name: st.fixed_dictionaries(
        dict.fromkeys(FORMATS[name].keys, VALUES),
        optional=dict.fromkeys(FORMATS[name].optional, VALUES),
    )
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "function_call"])},
        optional={
            "content": VALUES | st.text(min_size=1, max_size=3),
            "tool_calls": VALUES | st.just([CALL]),
            "train": st.booleans() | VALUES,
            "weight": st.sampled_from([0, 1, 2]),
            "reasoning": VALUES,
            "name": VALUES,
        },
    ),
    max_size=4,
)
SHAPED = st.sampled_from(
    [("messages",), ("conversations",), ("prompt", "completion"), ("chosen", "rejected")]
).flatmap(lambda keys: st.fixed_dictionaries(dict.fromkeys(keys, MESSAGES)))


@settings(
    max_examples=400 // SHARE,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(RECORDS | SHAPED | VALUES, st.sampled_from(["auto", *FORMATS]))
def test_any_json_value_is_read_as_a_record_or_refused(value, format):
    try:
        conversation = parse_record(value, format=format, where="data.jsonl:3")
    except DataError as error:
        assert re.fullmatch(r"data\.jsonl:3(?: (?:message|segment) \d+)?", error.where)
    else:
        require_same_again(value, conversation, format)
