"""SentencePiece's BPE in GGUF (`tokenizer.ggml.model = llama` or `gemma4`), both ways.

llama.cpp merges any two neighbours whose concatenation is a token, the best score first;
tokenizer.json lists the pairs that may merge, the first first. A token's score is
therefore minus the rank at which it is first made, and the pairs of a GGUF are all the
ways to cut each token in two.

`gemma4` lists the pairs themselves, as tokenizer.json does; llama.cpp then never puts a ▁ in
front, and parts line breaks from all else first.

Known limits of scores: llama.cpp may join a pair that tokenizer.json does not list, where nothing
better is left to do; of two equal scores it takes the pair further left, tokenizer.json the
same pair everywhere first. mistral.rs reads such a vocabulary as Unigram with a leading ▁,
so its ids can differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gguf.constants import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlxtune.errors import ExportError

MODEL, MERGED = "llama", "gemma4"
SPACE = "▁"
# What llama.cpp takes where the GGUF does not say.
DEFAULTS: dict[str, Any] = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
}
MERGED_DEFAULTS: dict[str, Any] = {
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}
# Text that is cut before it is merged.
_LINES = r"[^\n]+|[\n]+"
# Marks of Gemma 4 that llama.cpp's chat parser has to see in a model's answer.
_VISIBLE = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)
_PIECES = (TokenType.NORMAL, TokenType.USER_DEFINED)


def read_spm(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """A tokenizer without its special tokens.

    Args:
        metadata: of a GGUF file.
        vocab: token to id.

    Raises:
        KeyError: scores or types are missing.
    """
    merged = metadata["tokenizer.ggml.model"] == MERGED
    values = (MERGED_DEFAULTS if merged else DEFAULTS) | metadata
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    number = values.get("tokenizer.ggml.unknown_token_id")
    if merged:
        merges = [merge_pair(merge) for merge in values["tokenizer.ggml.merges"]]
    else:
        scores, types = values["tokenizer.ggml.scores"], values["tokenizer.ggml.token_type"]
        merges = _merges(tokens, scores, types)
    core = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=tokens[number] if number is not None and tokens[number] in vocab else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    text: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if values["tokenizer.ggml.add_space_prefix"]:
        spaces.insert(0, normalizers.Prepend(SPACE))
        text.append(decoders.Strip(" ", 1, 0))
    if merged:
        core.pre_tokenizer = pre_tokenizers.Split(Regex(_LINES), "isolated")
    core.normalizer = normalizers.Sequence(spaces)
    core.decoder = decoders.Sequence(text)
    return core


def _merges(
    tokens: list[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to cut a token into two, those of the best score first."""
    pieces = {
        token: score
        for token, score, type_ in zip(tokens, scores, types, strict=True)
        if type_ in _PIECES
    }
    return [
        (token[:cut], token[cut:])
        for token in sorted(pieces, key=lambda token: -pieces[token])
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def merge_pair(merge: str) -> tuple[str, str]:
    """The two that a line of `tokenizer.ggml.merges` joins, cut as llama.cpp does."""
    cut = merge.index(" ", 1)  # the space that parts them is never the first character
    return merge[:cut], merge[cut + 1 :]


def spm_values(
    core: Tokenizer, tokens: list[str], types: list[int], *, after: str, merged: bool = False
) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a BPE that falls back to bytes: all but tokens and special ids.

    Args:
        core: the tokenizer.
        tokens: by id, padding included.
        types: of the tokens, as of any tokenizer.
        after: a special token that texts follow, or nothing. Some tokenizers put a ▁ before
            the first text only; llama.cpp does so after special tokens too, or never.
        merged: write the pairs that merge, as files of Gemma 4 have them. Not where a ▁ is put
            in front of texts: llama.cpp would not.

    Raises:
        ExportError: the tokenizer treats text in a way that llama.cpp does not.
    """
    state = json.loads(core.to_str())
    _require_spaces_only(state, lines=merged)
    merges, prefixed = state["model"]["merges"], _prefixes_space(core, after)
    types = [
        int(TokenType.BYTE) if _is_byte(token) and type_ == TokenType.NORMAL else type_
        for token, type_ in zip(tokens, types, strict=True)
    ]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(tokens, merges),
        "tokenizer.ggml.token_type": types,
    }
    if not prefixed:
        values["tokenizer.ggml.add_space_prefix"] = False
    if merged and not prefixed:
        shown = int(TokenType.USER_DEFINED)
        del values["tokenizer.ggml.pre"]
        values |= {
            "tokenizer.ggml.model": MERGED,
            "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
            "tokenizer.ggml.token_type": [
                shown if token in _VISIBLE else type_
                for token, type_ in zip(tokens, types, strict=True)
            ],
        }
    return values


def _prefixes_space(core: Tokenizer, before: str) -> bool:
    """Whether a text gets a ▁ in front: at the start, or after a special token."""
    first = core.encode(f"{before}a", add_special_tokens=False).tokens
    return bool(first[1 if before else 0].startswith(SPACE))


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the number of other tokens that are made first; the lowest for all others."""
    order: dict[str, int] = {}
    for pair in merges:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        order.setdefault(left + right, len(order))
    return [-float(order.get(token, len(order))) for token in tokens]


def padding(number: int) -> str:
    """What stands for an id that has no token."""
    return f"[PAD{number}]"


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _require_spaces_only(state: dict[str, Any], *, lines: bool) -> None:
    """Refuse what is more than ▁ for a space and at the front, or `lines` apart."""
    for place, split, plain in (
        ("normalizer", "normalizers", _is_plain_normalizer),
        ("pre_tokenizer", "pretokenizers", _is_plain_pre_tokenizer),
    ):
        whole = state[place]
        parts = whole.get(split, [whole]) if whole else []
        for part in parts:
            if not plain(part) and not (lines and _parts_lines(part)):
                raise ExportError(
                    f"llama.cpp does not treat text as this tokenizer's {part['type']} does",
                    where=f"tokenizer.json: {place}",
                )


def _parts_lines(part: dict[str, Any]) -> bool:
    return part.get("type") == "Split" and part["pattern"] == {"Regex": _LINES}


def _is_plain_normalizer(part: dict[str, Any]) -> bool:
    match part:
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return True
        case {"type": "Prepend", "prepend": "▁"}:
            return True
    return False


def _is_plain_pre_tokenizer(part: dict[str, Any]) -> bool:
    match part:
        case {"type": "Metaspace", "replacement": "▁"}:
            return True
        case {"type": "Split", "pattern": {"String": " "}}:  # no space is left to split at
            return True
    return False
