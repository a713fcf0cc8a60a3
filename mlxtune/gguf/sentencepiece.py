"""A SentencePiece file (`tokenizer.model`) as GGUF metadata, where there is nothing newer.

The file is a protocol buffer (`sentencepiece_model.proto`): pieces with score and type,
then how it was trained, then how it normalizes text. The few fields that are needed are
read by the wire format of protocol buffers, so that no package for it is.

Known limits: llama.cpp does not normalize as SentencePiece may (NFKC, white space
collapsed); the models meant here (Llama 2, Mistral, Gemma) do not either.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import TokenType

from mlxtune.errors import ExportError
from mlxtune.gguf.ends import end_of_turn
from mlxtune.gguf.spm import MODEL, padding
from mlxtune.gguf.tokenizer import read_tokenizer, template_metadata, templates_by_name

# Numbers of fields in the file's messages.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _DUMMY_PREFIX = 3, 3
_SPECIAL_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
_ROLES = {"unknown": "unk", "bos": "bos", "eos": "eos", "padding": "pad", "mask": "mask"}
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Row(NamedTuple):
    token: str
    score: float
    type: int


def sentencepiece_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
    """Metadata of a vocabulary of which there is only a `tokenizer.model`.

    Scores and types are the file's own. What transformers reads beside it counts too, where
    it is there: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
    `chat_template.jinja` say which tokens are added, which of all are special and begin and
    end a text, whether those are put around it, and the chat template.

    Args:
        path: a `tokenizer.model`.
        vocab_size: rows of the embedding; ids without a token are padded.

    Returns:
        Keys and values, `tokenizer.ggml.*` and `tokenizer.chat_template`.

    Raises:
        ExportError: the file is no SentencePiece model, its model is Unigram, it has more
            tokens than the embedding has rows, or a special token is none of them.
    """
    try:
        rows, trainer, normalizer = _read(path)
    except (OSError, struct.error, IndexError, UnicodeDecodeError) as error:
        raise ExportError(f"it is no SentencePiece model: {error}", where=str(path)) from None
    if not rows or trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise ExportError(
            "only SentencePiece's BPE can be written as GGUF, not Unigram and others",
            where=str(path),
        )
    config = _json(path.with_name("tokenizer_config.json"))
    special = _special_tokens(path.parent, config)
    rows = _with_added(rows, _added_tokens(path.parent, config, special))
    rows = [_as_special(row) if row.token in special.values() else row for row in rows]
    if len(rows) > vocab_size:
        raise ExportError(
            f"the tokenizer has {len(rows)} tokens, the embedding {vocab_size} rows",
            where=str(path),
        )
    rows += [_padding(number) for number in range(len(rows), vocab_size)]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [row.token for row in rows],
        "tokenizer.ggml.scores": [row.score for row in rows],
        "tokenizer.ggml.token_type": [row.type for row in rows],
        "tokenizer.ggml.add_bos_token": bool(config.get("add_bos_token", True)),
        "tokenizer.ggml.add_eos_token": bool(config.get("add_eos_token", False)),
    }
    for role, (field, default) in _SPECIAL_IDS.items():
        number = trainer.get(field, default)
        if 0 <= number < len(rows):
            values[f"tokenizer.ggml.{role}_token_id"] = number
    ids = {row.token: number for number, row in enumerate(rows)}
    for role, name in _ROLES.items():
        token = special.get(f"{name}_token")
        if token is None:
            continue
        if token not in ids:
            raise ExportError(
                f"its {name}_token is {token!r}, which is no token of it",
                where=str(path),
                remedy="give it an id in added_tokens.json",
            )
        values[f"tokenizer.ggml.{role}_token_id"] = ids[token]
    if not normalizer.get(_DUMMY_PREFIX, 1):
        values["tokenizer.ggml.add_space_prefix"] = False
    values |= template_metadata(_templates(path.parent, config))
    end = end_of_turn(read_tokenizer(values, where=str(path)))
    if end not in (None, values.get("tokenizer.ggml.eos_token_id")):
        values["tokenizer.ggml.eot_token_id"] = end
    return values


def _read(path: Path) -> tuple[list[_Row], dict[int, Any], dict[int, Any]]:
    rows: list[_Row] = []
    others: dict[int, dict[int, Any]] = {}
    for field, value in _fields(path.read_bytes()):
        if field == _PIECE:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0]
            type_ = piece.get(_TYPE, int(TokenType.NORMAL))
            rows.append(_Row(piece[_TEXT].decode(), score, type_))
        elif field in (_TRAINER, _NORMALIZER):
            others[field] = dict(_fields(value))
    return rows, others.get(_TRAINER, {}), others.get(_NORMALIZER, {})


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field: an int, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            # Negative numbers are written as 64 bits.
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"a field of the unknown kind {kind}")
        if at + size > len(data):
            raise IndexError("the file ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by what they are for, as `eos_token`; further ones by a number."""
    found = {}
    for said in (_json(folder / "special_tokens_map.json"), config):
        further = said.get("additional_special_tokens") or []
        named = {key: said.get(f"{key}_token") for key in _ROLES.values()}
        given = {f"{key}_token": value for key, value in named.items()}
        given |= {str(number): value for number, value in enumerate(further)}
        for key, value in given.items():
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                found[key] = token
    return found


def _added_tokens(
    folder: Path, config: dict[str, Any], special: dict[str, str]
) -> dict[int, dict[str, Any]]:
    """Tokens beyond the file's, by id: content, and whether special."""
    old = _json(folder / "added_tokens.json").items()
    added = {int(n): {"content": t, "special": t in special.values()} for t, n in old}
    return added | {int(n): e for n, e in config.get("added_tokens_decoder", {}).items()}


def _as_special(row: _Row) -> _Row:
    plain = row.type in (TokenType.NORMAL, TokenType.USER_DEFINED)
    return row._replace(type=int(TokenType.CONTROL)) if plain else row


def _with_added(rows: list[_Row], added: dict[int, dict[str, Any]]) -> list[_Row]:
    rows = list(rows)
    lowest = min(row.score for row in rows)
    for number, entry in sorted(added.items()):
        rows += [_padding(i) for i in range(len(rows), number + 1)]
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        if rows[number].type in (TokenType.NORMAL, TokenType.UNUSED):
            rows[number] = _Row(entry["content"], lowest - 1, int(kind))
    return rows


def _padding(number: int) -> _Row:
    return _Row(padding(number), 0.0, int(TokenType.UNUSED))


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: from files of their own, which win, or from the config."""
    said = config.get("chat_template") or {}
    if isinstance(said, list):
        said = {entry["name"]: entry["template"] for entry in said}
    found = templates_by_name(said)
    if (default := folder / "chat_template.jinja").is_file():
        found = {"default": default.read_text(encoding="utf-8")}
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return found | {file.stem: file.read_text(encoding="utf-8") for file in others}


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
