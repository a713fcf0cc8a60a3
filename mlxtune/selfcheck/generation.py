"""Answers to several prompts at once: each token has to be the most likely one, or nearly."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.device import on_cpu
from mlxtune.evaluate.answers import answers
from mlxtune.models.load import DTYPES
from mlxtune.recipe.schema import ModelSection
from mlxtune.selfcheck.check import Difference, Found
from mlxtune.selfcheck.tiny import model_folder
from mlxtune.train.model import load_base

# A token that is chosen in the place of the best one: by how much of the largest logit it is less.
_ALLOWED = {"float32": 1e-2, "bfloat16": 5e-2}


def batch_of_answers() -> Found:
    """Generate in a batch, and look at each token with a whole pass over its text on the CPU."""
    dtype = "float32" if on_cpu() else "bfloat16"
    section = ModelSection(path=str(model_folder()), dtype=dtype)  # type: ignore[arg-type]
    base = load_base(section, for_inference=True)
    random = np.random.default_rng(5)
    lengths = (3, 17, 9, 30, 5, 11) if on_cpu() else (3, 90, 17, 300, 64, 9, 30, 150) * 4
    prompts = [random.integers(0, 256, length).tolist() for length in lengths]
    count = 16 if on_cpu() else 64
    # Numbers in the place of text; no token ends an answer.
    numbers = SimpleNamespace(eos_token_ids=(), decode=lambda ids: " ".join(map(str, ids)))
    begun = time.perf_counter()
    said = answers(base.model, numbers, prompts, max_tokens=count)
    seconds = time.perf_counter() - begun
    generated = [[int(number) for number in text.split()] for text in said]
    # The same weights, so that only how it was computed differs.
    exact = load_base(section, for_inference=True).model
    with mx.stream(mx.cpu):
        exact.set_dtype(DTYPES["float32"])
        behind = max(
            _behind(exact, prompt, answer)
            for prompt, answer in zip(prompts, generated, strict=True)
        )
    short = [f"an answer of {n} tokens, not {count}" for n in map(len, generated) if n != count]
    return Found(
        (Difference("a token's logit, behind the best one's", behind, _ALLOWED[dtype]),),
        {"tokens_per_second": len(prompts) * count / seconds, "answers": len(prompts)},
        tuple(dict.fromkeys(short)),
    )


def _behind(model: nn.Module, prompt: list[int], answer: Iterable[int]) -> float:
    """The largest of the gaps between the best logit and that of the token that was taken."""
    taken = list(answer)
    logits = model(mx.array([prompt + taken]))[0, len(prompt) - 1 : -1]
    values = np.array(logits.astype(mx.float32))
    chosen = values[np.arange(len(taken)), taken]
    return float(((values.max(axis=-1) - chosen) / np.abs(values).max()).max())
