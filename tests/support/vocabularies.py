"""Real vocabularies that are GGUF files, and texts that tell ways of cutting text apart."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from mlxtune.gguf import fingerprints
from mlxtune.gguf.pretokenizers import PRE_TOKENIZERS
from mlxtune.gguf.reader import GGUFFile
from support import downloads
from support.downloads import CACHE
from support.files import SHARED, SHELL_TRAIN

TLDR = SHARED / "tldr.jsonl"
HARD = [
    fingerprints.TEXT,
    "a   b\n\n\n\tc  ",
    "    " * 12 + "x",
    "",
    " ",
    "é ﬁ ½ ² Ⅷ",
    "'S 'RE we'LL don't DON'T",
    "日本語テスト、한국어 ไทย हिन्दी নমস্কার ١٢٣٤٥",
    "1234567890 12 345,678.90",
    "\r\n\r\n x \n y",
    "🦙🦙‍♂️",
    "a\u00a0b\u200bc",
    "!foo .bar -baz a/b//c\n/\n ^~|`$+<=>",
    "<sentinel:12>IMGIMGABZ",
    "a" * 70 + " " * 70,
]


@cache
def metadata(name: str) -> dict[str, Any]:
    """Of one of the vocabularies that are GGUF files. Do not change it."""
    path = CACHE / ("phi3/vocab.gguf" if name == "phi-3" else f"vocab/{name}.gguf")
    if not path.is_file():
        pytest.skip(f"no {path}; get it with: {downloads.FETCH}")
    kept = ("tokenizer.", "general.name")
    return {k: v for k, v in GGUFFile(path).metadata.items() if k.startswith(kept)}


@cache
def pages() -> list[str]:
    """Real lines, or our own where those are not beside this checkout."""
    path = TLDR if TLDR.is_file() else SHELL_TRAIN
    lines = path.read_text(encoding="utf-8").splitlines()[:1000]
    return [" ".join(map(str, json.loads(line).values())) for line in lines]


def pre_tokenizers_with_own_rule() -> list[str]:
    first: dict[object, str] = {}
    for name, entry in PRE_TOKENIZERS.items():
        first.setdefault(entry, name)
    return list(first.values())
