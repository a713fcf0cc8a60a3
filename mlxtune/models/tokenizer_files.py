"""A tokenizer written so that older readers read it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxtune.files import write_json

_CONFIG = "tokenizer_config.json"


def save_tokenizer(folder: Path, tokenizer: Any, *, template_apart: bool = True) -> None:
    """Write a tokenizer's files, for transformers 4 as for 5.

    transformers 5 names a class and a list of tokens that version 4 does not have, by names
    that are still read by both.

    Args:
        folder: exists.
        tokenizer: Hugging Face's, or mlx-lm's wrapper around one.
        template_apart: whether the chat template has a file of its own, as publishers have it
            today, or stands in tokenizer_config.json, for readers of JSON alone.

    Raises:
        StorageError: the disk refuses the write.
    """
    tokenizer.save_pretrained(str(folder), save_jinja_files=template_apart)
    said = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    write_json(folder / _CONFIG, said)
