"""The exported file in the programs that people run: llama.cpp and mistral.rs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.data.sources import read_conversations
from mlxtune.export.bundle import export_run
from mlxtune.fuse import fuse_run
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import load_base
from support.files import SHELL_HELDOUT
from support.llamacpp import serve

BOUND = {"f32": 1e-3, "f16": 2e-2}  # of log-probabilities
MAX_TOKENS = 24
# How sure MLX must be of each token for its answer to be asked of a runtime. With floats no token
# can change where the best is ahead by twice the bound. With quantized weights both programs
# round the activations to eight bits too: log-probabilities of this model move by up to 0.4,
# and a nearer tie can't tell a faithful file from another.
SURE = {"f32": 2e-3, "f16": 4e-2, "q8_0": 0.5, "q4_k_m": 0.5}
UNLIKE = {"f32": 0, "f16": 0, "q8_0": 1, "q4_k_m": 1}
LEAST_ASKED = 8
MOST_ASKED = 8  # of mistral.rs, which is slow on a CPU
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundles(shell_run, once):
    def export(kind: str) -> Path:
        def make(path: Path) -> None:
            # One is verified as it is written, all are below.
            how = {"file_type": kind, "verify": kind == "f16"}
            export_run(shell_run, output=path / "bundle", **how)

        return once(f"shell as {kind}", make) / "bundle"

    return {kind: export(kind) for kind in SURE}


@pytest.fixture(scope="module")
def fused(shell_run, once):
    made = once("shell fused", lambda path: fuse_run(shell_run, path / "model", dtype="float32"))
    return load_base(ModelSection(path=str(made / "model")))


class Asked(NamedTuple):
    question: str
    text: str
    prompt: list[int]
    tokens: list[int]  # MLX's greedy answer
    logprobs: list[float]  # of those tokens
    margin: float  # the least distance of a token to the second best


@pytest.fixture(scope="module")
def asked(fused, bundles, once):
    """Gives what is asked of a kind of file: of what was trained up to eight bits, and of the
    file itself below, which says other things by right."""

    def answered(name: str, model: Callable[[], Any]) -> list[Asked]:
        def make(path: Path) -> None:
            rows = [row._asdict() for row in questions(model())]
            (path / "rows.json").write_text(json.dumps(rows))

        rows = json.loads((once(f"answers of {name}", make) / "rows.json").read_text())
        return [Asked(**row) for row in rows]

    path = str(bundles["q4_k_m"] / "model.gguf")
    trained = answered("shell", lambda: fused)
    file = answered("shell as q4_k_m", lambda: load_base(ModelSection(path=path)))

    def sure(kind):
        rows = file if kind == "q4_k_m" else trained
        rows = [row for row in rows if row.margin >= SURE[kind]]
        assert len(rows) >= LEAST_ASKED
        return rows

    return sure


def questions(loaded) -> list[Asked]:
    """Held-out wordings of trained intents and MLX's answers."""
    renderer = Renderer(loaded.tokenizer)
    rows = []
    for conversation in read_conversations(SHELL_HELDOUT)[:20]:
        text = renderer.text(conversation.prompt_turns(), ask=True)
        prompt = renderer.prompt(conversation)
        question = conversation.turns[0].content
        rows.append(Asked(question, text, prompt, *greedy(loaded, prompt)))
    return rows


def greedy(loaded, prompt):
    """mlx-lm's own generation: tokens up to the end of the turn, and how sure they are."""
    tokens, logprobs, margins = [], [], []
    for token, row in generate_step(mx.array(prompt), loaded.model, max_tokens=MAX_TOKENS):
        second, first = mx.sort(row)[-2:].tolist()
        tokens.append(int(token))
        logprobs.append(first)
        margins.append(first - second)
        if tokens[-1] in loaded.tokenizer.eos_token_ids:
            break
    return tokens, logprobs, min(margins)


@pytest.fixture(scope="module", params=SURE)
def llamacpp(request, bundles):
    return request.param, serve(bundles[request.param] / "model.gguf", exact=True)


def test_llamacpp_says_what_mlx_says(llamacpp, asked):
    kind, server = llamacpp
    unlike = 0
    for row in asked(kind):
        answer = server.handle_completions(
            {"prompt": row.text, "n_predict": len(row.tokens), "temperature": 0, "n_probs": 1}
        )
        said = answer["choices"][0]["logprobs"]["content"]
        unlike += [token["id"] for token in said] != row.tokens
        if kind in BOUND:
            logprobs = [token["logprob"] for token in said]
            assert logprobs == pytest.approx(row.logprobs, rel=0, abs=BOUND[kind]), row.text
    assert unlike <= UNLIKE[kind]


def test_llamacpp_renders_and_tokenizes_the_chat_as_trained(llamacpp, asked):
    kind, server = llamacpp
    with httpx.Client(base_url=server.listening_address) as client:
        for row in asked(kind):
            messages = [{"role": "user", "content": row.question}]
            rendered = client.post("/apply-template", json={"messages": messages}).json()
            assert rendered["prompt"] == row.text
            body = {"content": row.text, "add_special": True, "parse_special": True}
            assert client.post("/tokenize", json=body).json()["tokens"] == row.prompt


def test_tokens_of_a_whole_conversation_agree(llamacpp, fused):
    _, server = llamacpp
    turns = [
        Turn("system", "Reply with one command."),
        Turn("user", "how big is  ./naïve dir ‹2›?\n\n\tthanks 😀 1234567"),
        Turn("assistant", "du -sh './naïve dir ‹2›'"),
        Turn("user", "and its files?"),
    ]
    renderer = Renderer(fused.tokenizer)
    text = renderer.text(turns, ask=True)
    body = {"content": text, "add_special": True, "parse_special": True}
    got = httpx.post(f"{server.listening_address}/tokenize", json=body).json()["tokens"]
    assert got == renderer.encode(text)


@pytest.fixture(scope="module", params=SURE)
def mistralrs(request, bundles):
    module = pytest.importorskip("mistralrs")
    which = module.Which.GGUF(
        quantized_model_id=str(bundles[request.param]), quantized_filename="model.gguf"
    )
    return request.param, module, module.Runner(which=which)


def test_mistralrs_says_what_mlx_says(mistralrs, asked, fused):
    kind, module, runner = mistralrs
    unlike = 0
    ends = fused.tokenizer.eos_token_ids
    for row in asked(kind)[:MOST_ASKED]:
        assert runner.tokenize_text(row.text, False, None) == row.prompt
        answer = runner.send_chat_completion_request(
            module.ChatCompletionRequest(
                messages=[{"role": "user", "content": row.question}],
                model="default",
                max_tokens=len(row.tokens),
                temperature=0.0,
                top_k=1,
            )
        )
        # It renders the chat by itself; the count shows that it does so as trained.
        assert answer.usage.prompt_tokens == len(row.prompt)
        said = fused.tokenizer.decode([t for t in row.tokens if t not in ends])
        unlike += answer.choices[0].message.content != said
    assert unlike <= UNLIKE[kind]
