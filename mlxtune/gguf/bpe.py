"""Byte-level BPE in GGUF (`tokenizer.ggml.model = gpt2`), both ways.

Known limits: llama.cpp does not normalize text, so where a tokenizer asks for NFC
(Qwen's), text that is not NFC already tokenizes differently there; nor does it know tokens
that swallow the space beside them.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf import fingerprints, pretokenizers
from mlxtune.gguf.pretokenizers import PRE_TOKENIZERS
from mlxtune.gguf.spm import merge_pair

MODEL = "gpt2"
_HARMLESS = (None, "NFC")


def read_bpe(metadata: dict[str, Any], vocab: dict[str, int]) -> Tokenizer:
    """A tokenizer without its special tokens.

    Args:
        metadata: of a GGUF file.
        vocab: token to id.

    Raises:
        ModelError: the rule that cuts text is not in `PRE_TOKENIZERS`.
        KeyError: the merges are missing.
    """
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"its pre-tokenizer {pre} is not known",
            remedy=f"readable: {', '.join(sorted(PRE_TOKENIZERS))}; "
            "use the model's safetensors folder or hub id",
        )
    merges = [merge_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=PRE_TOKENIZERS[pre].ignore_merges)
    )
    core.pre_tokenizer = pretokenizers.build(pre)
    core.decoder = decoders.ByteLevel()
    return core


def bpe_values(tokenizer: PreTrainedTokenizerFast, pre: str | None) -> dict[str, Any]:
    """`tokenizer.ggml.{model,pre,merges}` of a byte-level BPE tokenizer.

    Args:
        tokenizer: the whole tokenizer, special tokens included.
        pre: llama.cpp's name for the rule that cuts text; `None` finds it out: by the
            rule itself, then by the ids of llama.cpp's test text.

    Raises:
        ExportError: the name cannot be found out or is not known, or the tokenizer changes
            text before it cuts it.
    """
    core = tokenizer.backend_tokenizer
    state = json.loads(core.to_str())
    _require_plain(state["normalizer"])
    return {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": _named(pre) if pre else _recognised(tokenizer),
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]
        ],
    }


def _require_plain(normalizer: Any) -> None:
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = {part["type"] for part in parts}
    if unknown := kinds.difference(_HARMLESS):
        raise ExportError(
            f"the tokenizer changes text before it cuts it ({', '.join(sorted(unknown))}), "
            "which llama.cpp does not",
            where="tokenizer.json: normalizer",
        )


def _named(pre: str) -> str:
    if pre not in PRE_TOKENIZERS:
        near = [f"did you mean {name}? " for name in get_close_matches(pre, PRE_TOKENIZERS, n=1)]
        raise ExportError(
            f"llama.cpp knows no pre-tokenizer {pre} for byte-level BPE",
            where="--pre",
            remedy=f"{''.join(near)}one of: {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return pre


def _recognised(tokenizer: PreTrainedTokenizerFast) -> str:
    name = pretokenizers.recognise(tokenizer.backend_tokenizer)
    name = name or fingerprints.recognise(tokenizer)
    if name is None:
        raise ExportError(
            "llama.cpp's name for the way this tokenizer splits text is not known",
            where="tokenizer.json: pre_tokenizer",
            remedy="name it with --pre, as a GGUF of the same model has it in "
            f"tokenizer.ggml.pre; one of: {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return name
