"""The exported file in the programs that people run: llama.cpp and mistral.rs."""

from __future__ import annotations

import os

import httpx
import mlx.core as mx
import pytest
from conftest import SHELL_HELDOUT

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.data.sources import read_conversations
from mlxtune.export.bundle import export_run
from mlxtune.fuse import fuse_run
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.session import load_base

PROMPTS = 20
# Log-probabilities of F16 agree within this, so two tokens that MLX itself finds nearer to
# each other than this have no order that a runtime could be held to.
BOUND = 2e-2
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def bundles(shell_run):
    return {kind: export_run(shell_run, file_type=kind).folder for kind in ("f16", "q8_0")}


@pytest.fixture(scope="module")
def fused(shell_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "model"
    fuse_run(shell_run, folder, dtype="float16")
    return load_base(ModelSection(path=str(folder)))


@pytest.fixture(scope="module")
def asked(fused):
    """(question, prompt as text and as tokens, MLX's greedy tokens, their log-probs, tied)."""
    renderer = Renderer(fused.tokenizer)
    # Wordings that were held out of the intents that the run was trained on.
    conversations = read_conversations(SHELL_HELDOUT)[:28]
    rows = []
    for conversation in conversations[:PROMPTS]:
        text = renderer.text(conversation.prompt_turns(), ask=True)
        prompt = renderer.prompt(conversation)
        tokens, logprobs, tied = greedy(fused, prompt)
        rows.append((conversation.turns[0].content, text, prompt, tokens, logprobs, tied))
    return rows


def greedy(loaded, prompt):
    """Token by token, each time over the whole text: no cache that could be wrong."""
    tokens, logprobs, gaps = [], [], []
    ends = loaded.tokenizer.eos_token_ids
    while len(tokens) < MAX_TOKENS and (not tokens or tokens[-1] not in ends):
        logits = loaded.model(mx.array([prompt + tokens]))[0, -1]
        logits = logits - mx.logsumexp(logits)
        tokens.append(logits.argmax().item())
        second, first = mx.sort(logits)[-2:].tolist()
        gaps.append(first - second)
        logprobs.append(logits[tokens[-1]].item())
    return tokens, logprobs, min(gaps) < BOUND


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def llamacpp(request, bundles):
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(bundles[request.param] / "model.gguf")
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 512, 2, False
    params.verbosity = -1
    # MLX keeps keys and values in float32 here; float16 ones would be another error.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return request.param, xllamacpp.Server(params)


def test_llamacpp_says_what_mlx_says(llamacpp, asked):
    kind, server = llamacpp
    equal, errors = 0, []
    for _, text, _, tokens, logprobs, tied in asked:
        answer = server.handle_completions(
            {"prompt": text, "n_predict": len(tokens), "temperature": 0, "n_probs": 1}
        )
        said = answer["choices"][0]["logprobs"]["content"]
        same = [token["id"] for token in said] == tokens
        assert same or tied or kind == "q8_0", text
        equal += same
        if kind == "f16":
            pairs = zip(said, tokens, logprobs, strict=False)
            errors += [abs(a["logprob"] - p) for a, t, p in pairs if a["id"] == t]
    assert equal >= 18
    if kind == "f16":
        assert max(errors) < BOUND


def test_llamacpp_renders_and_tokenizes_the_chat_as_trained(llamacpp, asked):
    _, server = llamacpp
    url = server.listening_address
    for question, text, prompt, _, _, _ in asked:
        messages = [{"role": "user", "content": question}]
        rendered = httpx.post(f"{url}/apply-template", json={"messages": messages}).json()
        assert rendered["prompt"] == text
        body = {"content": text, "add_special": True, "parse_special": True}
        assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == prompt


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


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def mistralrs(request, bundles):
    module = pytest.importorskip("mistralrs")
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"  # as MLX keeps them here
    which = module.Which.GGUF(
        quantized_model_id=str(bundles[request.param]), quantized_filename="model.gguf"
    )
    return request.param, module, module.Runner(which=which)


def test_mistralrs_says_what_mlx_says(mistralrs, asked, fused):
    kind, module, runner = mistralrs
    equal = 0
    ends = fused.tokenizer.eos_token_ids
    for question, text, prompt, tokens, _, tied in asked:
        assert runner.tokenize_text(text, False, None) == prompt
        answer = runner.send_chat_completion_request(
            module.ChatCompletionRequest(
                messages=[{"role": "user", "content": question}],
                model="default",
                max_tokens=len(tokens),
                temperature=0.0,
                top_k=1,
            )
        )
        # It renders the chat by itself; the count shows that it does so as trained.
        assert answer.usage.prompt_tokens == len(prompt)
        said = fused.tokenizer.decode([t for t in tokens if t not in ends])
        same = answer.choices[0].message.content == said
        assert same or tied or kind == "q8_0", text
        equal += same
    assert equal >= 18
