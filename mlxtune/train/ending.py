"""Whether a model stops when its answer is over, said in words where it does not."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from mlxtune.data.render import Sample
from mlxtune.gguf.ends import unstopped_end
from mlxtune.train.corpus import Corpus

# So many of a source's samples are looked at.
_LOOKED_AT = 100
_REMEDY = "let the chat template end an answer with {{ eos_token }} (model.chat_template)"


def ending_notes(tokenizer: Any) -> list[str]:
    """A remark on a chat template at whose ends of answers nothing stops.

    Args:
        tokenizer: mlx-lm's wrapper.
    """
    end = unstopped_end(tokenizer)
    if end is None:
        return []
    return [
        f"the chat template ends an answer with {_quoted(end)}, at which generation does not "
        f"stop: answers run on to the limit of tokens. To mend it, {_REMEDY} and train again"
    ]


def trained_ending_notes(corpus: Corpus, tokenizer: Any) -> list[str]:
    """Remarks on sources whose samples train no token that ends an answer.

    Args:
        corpus: what is trained on.
        tokenizer: mlx-lm's wrapper.
    """
    ends = sorted(tokenizer.eos_token_ids)
    notes = []
    for part, (path, tally) in zip(corpus.parts, corpus.tallies, strict=False):
        some = list(islice(part.samples, _LOOKED_AT))
        if tally.truncated or any(_trains_one_of(ends, sample) for sample in some):
            continue
        end = unstopped_end(tokenizer)
        template = "" if end is None else f" (the chat template writes {_quoted(end)})"
        notes.append(
            f"{path}: no answer ends with a token at which generation stops{template}, so the "
            f"trained model will run on to the limit of tokens: {_REMEDY}"
        )
    return notes


def _trains_one_of(ends: list[int], sample: Sample) -> bool:
    trained = np.flatnonzero(sample.weights[1:]) + 1  # nothing predicts the first token
    return bool(np.isin(sample.tokens[trained], ends).any())


def _quoted(end: str) -> str:
    return f'"{_visible(end)}"' if end else "nothing"


def _visible(text: str) -> str:
    """Line breaks as people write them."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
