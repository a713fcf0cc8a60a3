"""llama.cpp's HTTP server, asked what it makes of a chat template.

It writes a prompt, and it reads an answer back: which of it a client of llama-server is shown
as content, as reasoning and as tool calls. `LlamaServer` asks for both.

The answer is put into the server's mouth by its model, which has it as one token and says it
after any prompt. A grammar that admits one text would do the same, but none is admitted beside
tools, whose calls are then never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, TokenType
from tokenizers import pre_tokenizers

from support.gguf_files import write_gguf_with_package
from support.process import HANGS

CONTEXT = 1 << 16  # tokens, of which each byte of a prompt is one
WIDTH = 8  # of the model: narrow, for those are many
Messages = list[dict[str, Any]]


class RefusedError(Exception):
    """The server does not take the template, the messages or the answer; what it says."""


@dataclass(frozen=True)
class ReadBack:
    """How the server reads an answer.

    Attributes:
        content: shown as the answer.
        reasoning: shown as what was thought before it.
        tool_calls: name and arguments of each; arguments that are no JSON stay text. Always
            empty where no tools were offered.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[tuple[str, Any], ...] = ()


class LlamaServer:
    """What llama.cpp's server makes of a template, in this process.

        with LlamaServer(tmp_path, template) as server:
            assert server.prompt(messages) == ...
            assert server.read(messages, "Hm.</think>Yes.") == ReadBack("Yes.", "Hm.")

    It is set up as the program llama-server sets itself up when no flags are given. Then a
    template is told `enable_thinking` (true if the server finds that it thinks, else false),
    `date_string` ("26 Jul 2024") and `datetime` ("Jul 26 2024") of today, and
    `preserve_reasoning` true with the names that templates have for it: `preserve_thinking`,
    and as false `clear_thinking`, `drop_thinking` and `truncate_history_thinking`.

    Args:
        folder: for its models, a few kilobytes each. They are gone when it closes.
        template: Jinja.
        bos: text of the token that templates call bos_token. It stays in prompts, as in
            transformers' with the same text; with a real vocabulary that puts the token first
            by itself, llama.cpp takes one away from the front of what the template wrote.
        eos: text of the token that templates call eos_token.

    Raises:
        RefusedError: the server does not start with this template.
    """

    def __init__(self, folder: Path, template: str, *, bos: str = "<s>", eos: str = "</s>") -> None:
        self._folder, self._template, self._marks = folder, template, (bos, eos)
        self._silent = self._serve("")

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._silent.close()

    def prompt(
        self,
        messages: Messages,
        *,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """What the server writes before an answer.

        Args:
            messages: as OpenAI's API has them. An answer that comes last would be continued.
            tools: offered.
            kwargs: more variables for the template.

        Raises:
            RefusedError: the template cannot write them.
        """
        body = _body(messages, tools, kwargs)
        return self._silent.ask("/apply-template", body)["prompt"]

    def read(
        self,
        messages: Messages,
        answer: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> ReadBack:
        """How the server reads what a model writes after the prompt.

        Args:
            messages: as for a prompt.
            answer: what the model writes, without the token that ends it: that one stops the
                server and is no part of the text. Marks within, `<think>` or `<tool_call>`,
                are text as any other, which llama.cpp makes of those its reader looks for.
                One that is nothing but the text of `bos` or of an end is read as empty.
            tools: offered.
            kwargs: more variables for the template.

        Raises:
            RefusedError: the server does not understand the answer, or its grammar of tool
                calls does not admit it.
        """
        speaker = self._serve(answer)
        try:
            told = speaker.ask("/v1/chat/completions", _body(messages, tools, kwargs))
        finally:
            speaker.close()
        [choice] = told["choices"]
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        return ReadBack(
            message["content"] or "",
            message.get("reasoning_content") or "",
            tuple((call["name"], _arguments(call["arguments"])) for call in calls),
        )

    def _serve(self, answer: str) -> _Server:
        path = self._folder / "says.gguf"
        write_speaker(path, answer, *self._marks)
        try:
            return _Server(path, self._template)
        finally:
            path.unlink()


class _Server:
    """One server, which stops when it is closed."""

    def __init__(self, path: Path, template: str) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.chat_template = str(path), template
        # The program does so as it reads its arguments.
        params.default_template_kwargs = {"preserve_reasoning": "true"}
        params.n_ctx, params.n_parallel, params.cache_ram_mib = CONTEXT, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        params.n_gpu_layers = 0
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise RefusedError(f"llama.cpp does not start: {error}") from None
        address = self._server.listening_address
        # Without encryption, and so without reading certificates, which takes longest.
        self._client = httpx.Client(base_url=address, timeout=HANGS, verify=False)
        # A server that is stopped before its loop has begun runs, and is waited for, for ever.
        # Once the loop has answered, it has begun.
        self._client.get("/slots").raise_for_status()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(path, json=body).json()
        if "error" in answer:
            raise RefusedError(answer["error"]["message"])
        return answer

    def close(self) -> None:
        self._client.close()
        del self._server


def _body(
    messages: Messages, tools: list[dict[str, Any]] | None, kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 1}
    if tools:
        body |= {"tools": tools, "parallel_tool_calls": True}
    if kwargs:
        body["chat_template_kwargs"] = kwargs
    return body


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_speaker(path: Path, answer: str, bos: str, eos: str) -> None:
    """A GGUF model that says one text after any prompt, as one token.

    Its other tokens are the bytes. No merge makes the answer's of them, so no prompt has it.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A GGUF must have a merge: one of two bytes that no text has.
    tokens = [*letters, letters[-2] + letters[-1], bos, eos]
    ids = {token: number for number, token in enumerate(tokens)}
    kinds = [int(TokenType.CONTROL if t in (bos, eos) else TokenType.NORMAL) for t in tokens]
    said = _byte_level(answer) if answer else eos
    if said not in ids:
        ids[said] = len(tokens)
        tokens, kinds = [*tokens, said], [*kinds, int(TokenType.NORMAL)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{letters[-2]} {letters[-1]}"],
        "tokenizer.ggml.bos_token_id": ids[bos],
        "tokenizer.ggml.eos_token_id": ids[eos],
        "llama.block_count": 1,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    # A block of zeros leaves every token's ones as they are, and only one logit sees them.
    output = np.zeros((len(tokens), WIDTH), np.float32)
    output[ids[said]] = 1
    ones, square = np.ones(WIDTH, np.float32), np.zeros((WIDTH, WIDTH), np.float32)
    weights = {"token_embd": np.ones_like(output), "output": output, "output_norm": ones}
    weights |= {"blk.0.attn_norm": ones, "blk.0.ffn_norm": ones}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down"):
        weights[f"blk.0.{name}"] = square
    kind = GGMLQuantizationType.F32
    tensors = {f"{name}.weight": (value, kind) for name, value in weights.items()}
    write_gguf_with_package(path, metadata, tensors, "llama")


def _byte_level(text: str) -> str:
    """The text as a byte-level vocabulary writes it: a letter for each byte."""
    [(token, _)] = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)
    return token
