"""tokenizer.json as Ollama's MLX engine reads it.

That reader knows less than Hugging Face's, and says nothing of what it leaves out: it applies one
rule for cutting text, the first that Go's regular expressions can express, drops what that rule
does not match, and knows no normalizers, no `Digits` and no `Metaspace`. So what it makes of a
text is computed here and compared. Facts of https://github.com/ollama/ollama (x/tokenizer), 0.33.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex, models, pre_tokenizers

from mlxtune.export.mlx_engine import NotForEngine
from mlxtune.gguf.spm import merge_pair

# What is applied where tokenizer.json has no rule that can be expressed.
_OTHERWISE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TRAILING = r"\s+(?!\S)|\s+"
_BEFORE_PUNCTUATION = r" ?[^\s\p{L}\p{N}]"
# Of the syntax that Go does not know: look-around, atomic groups, possessive quantifiers.
_ESCAPES_AND_CLASSES = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_UNKNOWN_TO_GO = re.compile(r"\(\?(?:[=!>]|<[=!])|[*+?}]\+")
# In Go `\s` and `\d` are ASCII's alone.
_ASCII = {r"\s": r"\t\n\f\r ", r"\d": "0-9"}
_NOT_ASCII = {r"\S": r"[^\t\n\f\r ]", r"\D": "[^0-9]"}
_SPACES = frozenset("\t\n\v\f\r \u0085\u00a0")


class EngineTokenizer:
    """A folder's tokenizer as that engine reads it.

    Args:
        folder: holds tokenizer.json; the other files that say something of tokens may be there.

    Attributes:
        begin: the id that it puts before every text by itself; None for none.
        ends: the ids at which it stops.

    Raises:
        NotForEngine: the engine does not load such a tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        said = _read(folder / "tokenizer.json")
        model = said.get("model") or {}
        if model.get("type") != "BPE":
            raise self.refused(folder, f"it is of the kind {model.get('type')}, not BPE")
        self._marks = {mark["content"]: mark["id"] for mark in said.get("added_tokens") or ()}
        self._longest_first = sorted(self._marks, key=len, reverse=True)
        # Spaces are a character of their own, ▁, and the text is not cut at all.
        self._pieces = _is_sentencepiece(said.get("decoder"))
        self._rule = None if self._pieces else self._compiled(_rule_of(said.get("pre_tokenizer")))
        merges = [merge_pair(m) if isinstance(m, str) else (m[0], m[1]) for m in model["merges"]]
        self._bpe = models.BPE(
            vocab=model["vocab"], merges=merges, ignore_merges=True, byte_fallback=self._pieces
        )
        self._letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.begin, self.ends = self._around(folder)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, without a mark before it."""
        ids: list[int] = []
        for part in self._parts(text):
            if part in self._marks:
                ids.append(self._marks[part])
                continue
            for piece in [part] if self._rule is None else self._cut(part):
                ids += [token.id for token in self._bpe.tokenize(self._spelled(piece))]
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """Marks, and what is between them."""
        while text:
            found = [(text.find(mark), mark) for mark in self._longest_first if mark in text]
            place, mark = min(found, key=lambda each: each[0], default=(len(text), ""))
            if place:
                yield text[:place]
            if mark:
                yield mark
            text = text[place + len(mark) :]

    def _cut(self, text: str) -> Iterator[str]:
        """Pieces of a text between marks; what the rule does not match is not among them."""
        assert self._rule is not None
        spans = [list(span) for _, span in self._rule.pre_tokenize_str(text)]
        for one, following in pairwise(spans):
            moved = self._moved(text[slice(*one)], text[slice(*following)])
            one[1] -= moved
            following[0] -= moved
        yield from (text[start:end] for start, end in spans if end > start)

    def _moved(self, spaces: str, following: str) -> int:
        """How many characters at the end of a piece of spaces go to the piece after it.

        That is how the engine does without the look-ahead of `\\s+(?!\\S)`.
        """
        if not all(map(_is_space, spaces)) or {"\n", "\r"} & set(spaces) or not following:
            return 0
        first = unicodedata.category(following[0])[0]
        if first == "L":
            return 1
        other = self._before_punctuation and first != "N" and not _is_space(following[0])
        return int(other and spaces[-1] == " ")

    def _spelled(self, piece: str) -> str:
        if self._pieces:
            return piece.replace(" ", "▁")
        return "".join(letters for letters, _ in self._letters.pre_tokenize_str(piece))

    def _compiled(self, rule: str) -> Any:
        if not in_go(rule):
            raise self.refused(
                self._folder, "its rule for cutting text uses what Go cannot express"
            )
        self._before_punctuation = _BEFORE_PUNCTUATION in rule
        ascii_only = _with_ascii_classes(rule.replace(_TRAILING, r"\s+"))
        return pre_tokenizers.Split(Regex(ascii_only), behavior="removed", invert=True)

    def _around(self, folder: Path) -> tuple[int | None, tuple[int, ...]]:
        """What is put before a text, and where the engine stops."""
        said = _read(folder / "tokenizer_config.json")
        places = [_read(folder / name) for name in ("generation_config.json", "config.json")]
        begins = [place.get("bos_token_id") for place in places]
        begins.append(self._marks.get(_content(said.get("bos_token"))))
        ends = [_numbers(place.get("eos_token_id")) for place in places]
        ends.append(_numbers(self._marks.get(_content(said.get("eos_token")))))
        begin = next((number for number in begins if type(number) is int), None)
        adds = said.get("add_bos_token") is True
        return begin if adds else None, next(filter(None, ends), ())

    @staticmethod
    def refused(folder: Path, why: str) -> NotForEngine:
        """What to raise for a tokenizer that the engine does not read as it is meant."""
        return NotForEngine(
            f"Ollama's MLX engine does not read this tokenizer: {why}",
            where=str(folder / "tokenizer.json"),
        )


def misread(engine: EngineTokenizer, tokenizer: Any, texts: Iterable[str]) -> str | None:
    """The first of some texts that the engine tokenizes otherwise; None if there is none.

    Args:
        engine: of the folder.
        tokenizer: that was trained with, Hugging Face's.
        texts: whole ones, marks and all.
    """
    for text in texts:
        if engine(text) != list(tokenizer(text, add_special_tokens=False).input_ids):
            return text
    return None


def in_go(rule: str) -> bool:
    """Whether the engine takes a regular expression: Go's know no look-around, but for one."""
    bare = _ESCAPES_AND_CLASSES.sub("x", rule.replace(_TRAILING, r"\s+"))
    return _UNKNOWN_TO_GO.search(bare) is None


def _rule_of(part: Any) -> str:
    """The rule that is applied: the first that Go can express, or GPT-2's if there is none."""
    if not isinstance(part, dict):
        return _OTHERWISE
    if rule := _regex(part):
        return rule
    of_sequence = part.get("pretokenizers") or [] if part.get("type") == "Sequence" else []
    rules = (_regex(one) for one in of_sequence if one.get("type") == "Split")
    return next((rule for rule in rules if rule and in_go(rule)), _OTHERWISE)


def _regex(part: dict[str, Any]) -> str:
    pattern = part.get("pattern")
    return str(pattern.get("Regex") or "") if isinstance(pattern, dict) else ""


def _with_ascii_classes(rule: str) -> str:
    r"""A rule in which `\s` and `\d` stand for what they stand for in Go."""

    def inside(found: re.Match[str]) -> str:
        text = found[0]
        if text.startswith("["):
            return re.sub(r"\\.", lambda each: _ASCII.get(each[0], each[0]), text)
        if text in _ASCII:
            return f"[{_ASCII[text]}]"
        return _NOT_ASCII.get(text, text)

    return _ESCAPES_AND_CLASSES.sub(inside, rule)


def _is_sentencepiece(decoder: Any) -> bool:
    """Whether a decoder makes spaces of ▁: by that the engine tells the kinds apart."""
    parts = decoder.get("decoders") or [] if isinstance(decoder, dict) else []
    return any(p["type"] == "Replace" and p["pattern"].get("String") == "▁" for p in parts)


def _is_space(character: str) -> bool:
    return character in _SPACES or unicodedata.category(character)[0] == "Z"


def _content(token: Any) -> str:
    """A token of tokenizer_config.json, which is a text or has one."""
    found = token.get("content") if isinstance(token, dict) else token
    return str(found or "")


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none that is readable, as for the engine."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
