"""Tokenizers in GGUF, both ways: metadata to a Hugging Face tokenizer, and back.

`tokenizer.ggml.model` names the kind: `gpt2` is byte-level BPE (`bpe.py`), `llama`
and `gemma4` SentencePiece's BPE (`spm.py`). What both have is here: tokens and their types, special
ids, what is put around a text, the chat template.

Known limits: GGUF has no place for tokens that swallow the white space beside them.
llama.cpp takes those of Phi-3 to do so where `general.name` has `phi-3` in it, and so does
`read_tokenizer`. llama.cpp goes by the text of some tokens, whatever their type: `</s>` is
a mark to it even in Qwen's vocabulary, where it is a token like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf import bpe, spm
from mlxtune.gguf.ends import end_of_turn
from mlxtune.gguf.metadata import is_token
from mlxtune.gguf.pretokenizers import PRE_TOKENIZERS

_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask"}
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_TEMPLATE = "tokenizer.chat_template"
_ID = re.compile(r"tokenizer\.ggml\.\w+_token_id")
# Of Phi-3's marks, those that leave the white space after them alone.
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


# ------------------------------------------------------------------------ from GGUF


def read_tokenizer(metadata: dict[str, Any], *, where: str) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer, special tokens and chat template included.

    It tokenizes as llama.cpp does with the same file.

    Args:
        metadata: of a GGUF file.
        where: the file, for messages.

    Raises:
        ModelError: the vocabulary is of a kind not read yet, or damaged.
    """
    kind = metadata.get("tokenizer.ggml.model")
    kinds = (bpe.MODEL, spm.MODEL, spm.MERGED)
    if kind not in kinds:
        raise ModelError(
            f"its tokenizer ({kind}) cannot be read yet",
            where=where,
            remedy=f"readable: {', '.join(kinds)}; use the model's safetensors folder or hub id",
        )
    try:
        return _read(_with_defaults(metadata))
    except ModelError as error:
        raise ModelError(error.what, where=where, remedy=error.remedy) from None
    except KeyError as error:
        raise ModelError(f"the GGUF has no {error}", where=where) from None
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ModelError(f"its vocabulary is damaged: {error}", where=where) from None


def _with_defaults(metadata: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp takes where the file is silent, or names a token that it does not have."""
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata = {
        key: value
        for key, value in metadata.items()
        if not _ID.fullmatch(key) or is_token(value, count)
    }
    if metadata["tokenizer.ggml.model"] == spm.MODEL:
        return spm.DEFAULTS | metadata
    if metadata["tokenizer.ggml.model"] == spm.MERGED:
        return spm.MERGED_DEFAULTS | metadata
    pre = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", "default"))
    return {"tokenizer.ggml.add_bos_token": bool(pre and pre.adds_bos)} | metadata


def _read(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: Sequence[int] = metadata["tokenizer.ggml.token_type"]
    vocab = {token: number for number, token in enumerate(_used(tokens, types))}
    is_bpe = metadata["tokenizer.ggml.model"] == bpe.MODEL
    core = bpe.read_bpe(metadata, vocab) if is_bpe else spm.read_spm(metadata, vocab)
    _add_special(core, metadata)
    special = {
        f"{hf}_token": tokens[metadata[f"tokenizer.ggml.{gguf}_token_id"]]
        for gguf, hf in _ROLES.items()
        if f"tokenizer.ggml.{gguf}_token_id" in metadata
    }
    if around := _put_around(metadata, special):
        core.post_processor = around
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = _read_templates(metadata)
    return tokenizer


def _used(tokens: list[str], types: Sequence[int]) -> list[str]:
    """Tokens without the padding at their end."""
    if len(tokens) != len(types):
        raise ValueError(f"{len(tokens)} tokens have {len(types)} types")
    count = next((i for i in range(len(types), 0, -1) if types[i - 1] != TokenType.UNUSED), 0)
    return tokens[:count]


def _add_special(core: Tokenizer, metadata: dict[str, Any]) -> None:
    """Make tokens out of special ones, in order: adding one by one takes minutes."""
    strips = any(name in metadata.get("general.name", "").lower() for name in ("phi-3", "phi3"))
    numbered = zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True
    )
    added = [
        AddedToken(
            token,
            special=type_ in _SPECIAL,
            normalized=False,
            rstrip=strips and token not in _PHI3_PLAIN,
        )
        for token, type_ in numbered
        if type_ in _SPECIAL or type_ == TokenType.USER_DEFINED
    ]
    for special, run in groupby(added, key=lambda token: token.special):
        (core.add_special_tokens if special else core.add_tokens)(list(run))


def _put_around(metadata: dict[str, Any], special: dict[str, str]) -> Any:
    """What puts the begin and end marks around a text, if any does."""
    before = ["bos"] if metadata.get("tokenizer.ggml.add_bos_token") else []
    after = ["eos"] if metadata.get("tokenizer.ggml.add_eos_token") else []
    marks = {role: special.get(f"{role}_token") for role in (*before, *after)}
    if not any(marks.values()):
        return None
    pieces = [*(marks[role] for role in before), "$A", *(marks[role] for role in after)]
    return processors.TemplateProcessing(
        single=[piece for piece in pieces if piece],
        special_tokens=[
            (mark, metadata[f"tokenizer.ggml.{role}_token_id"])
            for role, mark in marks.items()
            if mark
        ],
    )


def _read_templates(metadata: dict[str, Any]) -> Any:
    """The chat template, or a name for each where there are several."""
    default = metadata.get(_TEMPLATE)
    names = metadata.get("tokenizer.chat_templates", [])
    named = {
        name: metadata[f"{_TEMPLATE}.{name}"] for name in names if f"{_TEMPLATE}.{name}" in metadata
    }
    if not named:
        return default
    return {"default": default} | named if default else named


# ------------------------------------------------------------------------ to GGUF


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    pre: str | None = None,
    *,
    merged: bool = False,
) -> dict[str, Any]:
    """Metadata that makes llama.cpp tokenize as `tokenizer` does.

    Args:
        tokenizer: a fast tokenizer.
        vocab_size: rows of the embedding; ids without a token are padded. Tokens that were
            added without a row, and that the chat template does not write, are left out.
        pre: llama.cpp's name for the way byte-level BPE cuts text; `None` finds it out.
        merged: write SentencePiece's BPE as the files of Gemma 4 do, by the pairs that merge.

    Returns:
        Keys and values, `tokenizer.ggml.*` and `tokenizer.chat_template`.

    Raises:
        ExportError: the tokenizer is no BPE, its splitting is not recognised, it treats
            text as llama.cpp does not, or it has tokens without a row.
    """
    core = tokenizer.backend_tokenizer
    if not isinstance(core.model, models.BPE):
        raise ExportError(
            f"{type(core.model).__name__} tokenizers cannot be written as GGUF yet: only BPE",
            where="tokenizer.json",
        )
    tokens, types = _tokens(tokenizer, vocab_size)
    if core.model.byte_fallback:
        if pre not in (None, "default"):
            raise ExportError(
                "a tokenizer that falls back to bytes has no pre-tokenizer to name",
                where="--pre",
            )
        # In a chat, text follows a mark.
        after = tokenizer.bos_token if tokenizer.chat_template else None
        merged = merged and _begins_with_bos(tokenizer)
        kind = spm.spm_values(core, tokens, types, after=after or "", merged=merged)
    else:
        kind = bpe.bpe_values(tokenizer, pre)
    values = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types} | kind
    marks = _marks(tokenizer, core.model.byte_fallback)
    return values | marks | template_metadata(tokenizer.chat_template)


def _tokens(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; type BYTE is not told from NORMAL."""
    core = tokenizer.backend_tokenizer
    added = core.get_added_tokens_decoder()
    by_id = {number: token for token, number in core.get_vocab(with_added_tokens=True).items()}
    template = str(tokenizer.chat_template or "")
    for number in [number for number in by_id if number >= vocab_size]:
        if number not in added or by_id[number] in template:
            raise ExportError(
                f"the tokenizer has {len(tokenizer)} tokens, the embedding {vocab_size} rows",
                where="tokenizer.json",
            )
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(by_id.get(number, spm.padding(number)))
        if tokens[-1] == spm.padding(number) and number not in added:
            types.append(int(TokenType.UNUSED))
        elif number not in added:
            types.append(int(TokenType.NORMAL))
        elif added[number].special:
            types.append(int(TokenType.CONTROL))
        else:
            types.append(int(TokenType.USER_DEFINED))
    return tokens, types


def _marks(tokenizer: PreTrainedTokenizerFast, always_says_end: bool) -> dict[str, Any]:
    """Special ids, and which of them are put around a text: seen by tokenizing one."""
    values: dict[str, Any] = {}
    for gguf, hf in _ROLES.items():
        if (number := getattr(tokenizer, f"{hf}_token_id")) is not None:
            values[f"tokenizer.ggml.{gguf}_token_id"] = number
    if (end := end_of_turn(tokenizer)) not in (None, tokenizer.eos_token_id):
        values["tokenizer.ggml.eot_token_id"] = end
    ids = list(tokenizer("a").input_ids)
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    extra = ids != bare
    values["tokenizer.ggml.add_bos_token"] = extra and ids[0] == tokenizer.bos_token_id
    ends = extra and ids[-1] == tokenizer.eos_token_id
    if ends or always_says_end:
        values["tokenizer.ggml.add_eos_token"] = ends
    return values


def _begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a text begins with the mark that llama.cpp always puts before Gemma 4's."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == (
        tokenizer.bos_token_id
    )


def template_metadata(template: str | dict[str, str] | None) -> dict[str, Any]:
    """Keys and values of a chat template, or of several by name."""
    named = templates_by_name(template)
    others = [name for name in named if name != "default"]
    values: dict[str, Any] = {_TEMPLATE: named["default"]} if "default" in named else {}
    if others:
        values["tokenizer.chat_templates"] = others
    return values | {f"{_TEMPLATE}.{name}": named[name] for name in others}


def templates_by_name(template: str | dict[str, str] | None) -> dict[str, str]:
    """A tokenizer's `chat_template`, which is a text where there is but one, as name to text."""
    if isinstance(template, dict):
        return template
    return {"default": template} if template else {}
