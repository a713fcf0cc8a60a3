"""The real tokenizer, as it is and with something changed."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlxtune.data.render import Renderer
from support.rendering import END


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2.tokenizer


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture
def variant(tokenizer):
    """The real tokenizer with another template or another core setting."""

    def make(template: str | None = tokenizer.chat_template, change=lambda _core: None):
        core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        change(core)
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
        made.chat_template = template
        return made

    return make
