"""Tokenizers in GGUF, both ways: metadata to a Hugging Face tokenizer, and back.

Byte-level BPE vocabularies (`tokenizer.ggml.model = gpt2`). How text is cut before
merging is named by `tokenizer.ggml.pre`; llama.cpp refuses a name it doesn't know, so
one is written only when the tokenizer's own splitting is recognised.
"""

from __future__ import annotations

import json
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtune.errors import ExportError, ModelError

# Splitting rules, as llama.cpp has them. `None` stands for GPT-2's own rule, which
# `ByteLevel` brings along.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(*, own_rule: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_rule)


def _split(rule: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), behavior="isolated"),
            _byte_level(own_rule=False),
        ]
    )


def _pre_tokenizers() -> dict[str, Any]:
    return {
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), _byte_level(own_rule=True)]
        ),
        "gpt-2": _byte_level(own_rule=True),
        "llama-bpe": _split(_LLAMA3),
        "qwen2": _split(_QWEN2),
    }


def read_tokenizer(metadata: dict[str, Any], *, where: str) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer, special tokens and chat template included.

    Args:
        metadata: of a GGUF file.
        where: the file, for messages.

    Raises:
        ModelError: the vocabulary is of a kind not read yet, or damaged.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    known = _pre_tokenizers()
    if kind != "gpt2" or pre not in known:
        raise ModelError(
            f"its tokenizer ({kind}, pre-tokenizer {pre}) cannot be read yet",
            where=where,
            remedy=f"readable: gpt2 with {', '.join(sorted(known))}; "
            "use the model's safetensors folder or hub id",
        )
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
        types: list[int] = metadata["tokenizer.ggml.token_type"]
        core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        core.pre_tokenizer = known[pre]
        core.decoder = decoders.ByteLevel()
        return _with_special_tokens(core, tokens, types, metadata)
    except KeyError as error:
        raise ModelError(f"the GGUF has no {error}", where=where) from None
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ModelError(f"its vocabulary is damaged: {error}", where=where) from None


def _with_special_tokens(
    core: Tokenizer, tokens: list[str], types: list[int], metadata: dict[str, Any]
) -> PreTrainedTokenizerFast:
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == TokenType.CONTROL:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == TokenType.USER_DEFINED:
            core.add_tokens([AddedToken(token, special=False, normalized=False)])
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{hf}_token": tokens[metadata[f"tokenizer.ggml.{gguf}_token_id"]]
        for gguf, hf in roles.items()
        if f"tokenizer.ggml.{gguf}_token_id" in metadata
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def tokenizer_metadata(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> dict[str, Any]:
    """Metadata that makes llama.cpp tokenize as `tokenizer` does.

    Args:
        tokenizer: a fast tokenizer.
        vocab_size: rows of the embedding; ids without a token are padded.

    Returns:
        Keys and values, `tokenizer.ggml.*` and `tokenizer.chat_template`.

    Raises:
        ExportError: the tokenizer is not byte-level BPE, its splitting is not
            recognised, or it has more tokens than the embedding has rows.
    """
    core = tokenizer.backend_tokenizer
    if not isinstance(core.model, models.BPE) or core.model.byte_fallback:
        raise ExportError(
            "only byte-level BPE tokenizers can be written as GGUF yet",
            where="tokenizer.json",
        )
    if len(tokenizer) > vocab_size:
        raise ExportError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding {vocab_size} rows",
            where="tokenizer.json",
        )
    added = core.get_added_tokens_decoder()
    by_id = {number: token for token, number in core.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            types.append(int(TokenType.UNUSED))
        elif number not in added:
            types.append(int(TokenType.NORMAL))
        elif added[number].special:
            types.append(int(TokenType.CONTROL))
        else:
            types.append(int(TokenType.USER_DEFINED))
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _recognise(core),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(core),
        # What the chat template writes is all there is: nothing is put around it.
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
    }
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for gguf, hf in roles.items():
        if (number := getattr(tokenizer, f"{hf}_token_id")) is not None:
            values[f"tokenizer.ggml.{gguf}_token_id"] = number
    if tokenizer.chat_template:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def _merges(core: Tokenizer) -> list[str]:
    merges = json.loads(core.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]


def _recognise(core: Tokenizer) -> str:
    """llama.cpp's name for the way this tokenizer splits text."""
    wanted = _essence(core.pre_tokenizer)
    for name, pre in _pre_tokenizers().items():
        if _essence(pre) == wanted:
            return name
    raise ExportError(
        "llama.cpp's name for the way this tokenizer splits text is not known",
        where="tokenizer.json: pre_tokenizer",
        remedy=f"recognised: {', '.join(sorted(_pre_tokenizers()))}",
    )


def _essence(pre: Any) -> Any:
    """What a pre-tokenizer does, without settings that change offsets only."""

    def strip(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: strip(v) for k, v in part.items() if k != "trim_offsets"}
        return [strip(p) for p in part] if isinstance(part, list) else part

    # The wrapper has no public way to its JSON but through a tokenizer that holds it.
    holder = Tokenizer(models.BPE())
    holder.pre_tokenizer = pre
    return strip(json.loads(holder.to_str())["pre_tokenizer"])
