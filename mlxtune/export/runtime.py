"""Run a GGUF in llama.cpp and compare what it expects with what MLX expects.

llama.cpp is taken from the package `xllamacpp`, which carries it; the server it starts
lives in this process and is asked over the loopback.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune.errors import ExportError
from mlxtune.gguf.templates import applied
from mlxtune.processes import threads

# Of each row, so many of the last places are looked at, and of each so many tokens: what
# is beyond them counts as one.
ROWS, PLACES, TOKENS = 4, 12, 64

# The most by which a type may change what a model says: several times what it does to a
# model of 135M parameters, and those suffer most.
_FAITHFUL = {"f32": 0.01, "f16": 0.01, "bf16": 0.02, "q8_0": 0.05, "q6_k": 0.2}
_FAITHFUL |= dict.fromkeys(("q5_k_m", "q5_k_s", "q5_0", "q5_1"), 0.75)
_FAITHFUL |= dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1"), 1.0)
_FAITHFUL |= {"q4_0": 1.5, "q3_k_m": 1.5, "q2_k": 3.0}


@dataclass(frozen=True)
class RuntimeCheck:
    """How llama.cpp's next-token distributions differ from MLX's.

    Attributes:
        places: how many were compared; 0 where llama.cpp told nothing to compare.
        mean_kl: mean Kullback-Leibler divergence of MLX's from llama.cpp's, nats.
        top1: share of places with the same best token.
        same_prompt: whether its server asks a question with the chat template's prompt, no flags
            given; None without a template that can be asked.
    """

    places: int
    mean_kl: float | None
    top1: float | None
    same_prompt: bool | None = None


def installed() -> bool:
    """Whether llama.cpp is at hand."""
    return importlib.util.find_spec("xllamacpp") is not None


def check_in_llamacpp(
    path: Path,
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    file_type: str,
    tokenizer: Any = None,
) -> RuntimeCheck:
    """Compare what follows the last tokens of some rows, and the prompt of a question.

    Args:
        path: the GGUF.
        model: what it was made of, in MLX.
        rows: token ids.
        file_type: of the GGUF, which says how much it may differ.
        tokenizer: Hugging Face's, with the chat template that the GGUF was written with.

    Raises:
        ExportError: llama.cpp does not run the file, or says something else.
    """
    chosen = [list(row) for row in rows[:ROWS] if len(row) > 1]
    divergences, same, losses = [], [], []
    with _Server(path, max((len(row) for row in chosen), default=1)) as server:
        for row in chosen:
            expected = _log_probabilities(model, row)
            if np.isnan(expected).any():
                raise ExportError(
                    "the model itself gives no numbers: what MLX computes with it is nan, so "
                    "no file of it can answer anything",
                    where=str(path),
                    remedy="its weights, or those of its adapter, are damaged or too large: train "
                    "again with a lower train.learning_rate, or fetch the model again",
                )
            for place in range(max(1, len(row) - PLACES), len(row)):
                told = server.next_token(row[:place])
                if told is None:
                    continue
                ids, got = told
                if not np.isfinite(got).all():
                    raise ExportError(
                        "llama.cpp computes no numbers with this file, though MLX does with the "
                        "model: what its layers compute is too large for the 16-bit floats that "
                        f"llama.cpp uses beside {file_type}",
                        where=str(path),
                        remedy="train again with a lower train.learning_rate; --no-verify writes "
                        "the file all the same",
                    )
                want = expected[place - 1]
                divergences.append(_divergence(want[ids], got))
                same.append(ids[0] == int(want.argmax()))
                losses.append(-float(want[row[place]]))
        same_prompt = None if tokenizer is None else server.asks_as(tokenizer)
    if not same:
        return RuntimeCheck(0, None, None, same_prompt)
    mean_kl, top1 = float(np.mean(divergences)), float(np.mean(same))
    # What is no number is in no bound.
    if not mean_kl <= _FAITHFUL[file_type]:
        raise ExportError(
            f"llama.cpp expects other tokens than MLX: mean KL divergence {mean_kl:.2g}, the same "
            f"most likely token at {top1:.0%} of {len(same)} places",
            where=str(path),
            remedy=_remedy(float(np.mean(losses)), expected.shape[-1]),
        )
    return RuntimeCheck(len(same), mean_kl, top1, same_prompt)


def _remedy(loss: float, vocabulary: int) -> str:
    """What to do about a file that says something else than its model.

    Args:
        loss: of the model itself on the texts, nats a token.
        vocabulary: how many tokens there are.
    """
    # By a nat: a model of random weights is a little worse than chance too.
    if loss > math.log(vocabulary) + 1:
        return (
            f"the model itself predicts worse than chance (loss {loss:.2f}), so that any rounding "
            "changes what it says: train again with a lower train.learning_rate"
        )
    return "--no-verify writes the file all the same. Please report this"


def _log_probabilities(model: nn.Module, row: list[int]) -> npt.NDArray[np.float32]:
    logits = model(mx.array([row]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _divergence(want: npt.NDArray[np.floating], got: npt.NDArray[np.floating]) -> float:
    """KL over the tokens that were told, and one more that stands for all others."""
    p, q = np.exp(want.astype(np.float64)), np.exp(got.astype(np.float64))
    p = np.append(p, max(1 - p.sum(), 1e-9))
    q = np.append(q, max(1 - q.sum(), 1e-9))
    return float(np.sum(p * np.log(np.maximum(p, 1e-30) / np.maximum(q, 1e-30))))


class _Server:
    """llama.cpp with one model, for as long as the block runs."""

    def __init__(self, path: Path, length: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = max(256, 2 * length)
        params.cpuparams.n_threads = threads()
        params.warmup = False
        params.verbosity = -1
        # MLX keeps keys and values in its own type; float16 ones would be another error.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ExportError(
                f"llama.cpp does not load the file: {error}",
                where=str(path),
                remedy="--no-verify writes the file all the same. Please report this",
            ) from None
        self._client = httpx.Client(base_url=self._server.listening_address, timeout=600)
        # A server that ends before its loop has begun is waited for without end.
        self._client.get("/slots")

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        del self._server

    def asks_as(self, tokenizer: Any) -> bool | None:
        """Whether the server asks a question with the prompt of a tokenizer's chat template.

        Returns:
            None if there is no template, or it refuses the question.
        """
        question = [{"role": "user", "content": "Is it warm?"}]
        try:
            wanted = applied(tokenizer, question, add_generation_prompt=True)
        except Exception:  # a template may refuse any conversation, in any way
            return None
        told = self._client.post("/apply-template", json={"messages": question}).json()
        begin = str(tokenizer.bos_token or "")  # which llama.cpp may put there itself
        return str(told.get("prompt")).removeprefix(begin) == wanted.removeprefix(begin)

    def next_token(self, tokens: list[int]) -> tuple[list[int], npt.NDArray[np.float64]] | None:
        """The likeliest next tokens, best first, and their log-probabilities."""
        asked = {"prompt": tokens, "n_predict": 1, "n_probs": TOKENS, "temperature": 0}
        answer = self._client.post("/completion", json=asked).json()
        if "error" in answer:
            raise ExportError(f"llama.cpp gives no answer: {answer['error']}")
        if "completion_probabilities" not in answer:
            return None  # it tells none where its token is a part of a character
        top = answer["completion_probabilities"][0]["top_logprobs"]
        # JSON has no nan: it comes as null.
        told = np.array([entry["logprob"] for entry in top], np.float64)
        return [entry["id"] for entry in top], told
