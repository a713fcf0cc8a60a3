"""Small helpers around llama.cpp's server, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxtune.processes import threads
from support.process import HANGS


def serve(path: Path, *, context: int = 512, exact: bool = False, adapter: Path | None = None):
    """A server of llama.cpp with one model, and xllamacpp's `Server` of it.

    Args:
        path: of a GGUF.
        context: tokens.
        exact: keys and values in float32 and no flash attention, as MLX computes here; float16
            alone is worth 0.03 of a log-probability.
        adapter: a GGUF adapter that is applied whole.
    """
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.cpuparams.n_threads = context, threads()
    params.warmup, params.verbosity = False, -1
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = disabled
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def client(server: Any) -> httpx.Client:
    """A connection to a server."""
    return httpx.Client(base_url=server.listening_address, timeout=HANGS)


def next_tokens(
    path: Path,
    tokens: list[int],
    places: list[int],
    count: int = 20,
    adapter: Path | None = None,
) -> list[tuple[list[int], list[float]]]:
    """What llama.cpp expects next after each of these numbers of tokens.

    Returns:
        For each place the `count` most likely ids, and their log-probabilities.
    """
    found = []
    server = serve(path, exact=True, adapter=adapter)
    with client(server) as asked:
        for place in places:
            body = {"prompt": tokens[:place], "n_predict": 1, "n_probs": count, "temperature": 0}
            answer = asked.post("/completion", json=body).json()
            top = answer["completion_probabilities"][0]["top_logprobs"]
            found.append(([t["id"] for t in top], [t["logprob"] for t in top]))
    return found
