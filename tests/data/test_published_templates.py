"""Published chat templates × conversations: asked as llama.cpp's server asks, and read back.

What is right comes from llama.cpp: the prompt that its server writes with no flags given, and
what it reads of the answer that is trained: words, reasoning and tool calls. What a template
refuses or leaves out, and what llama.cpp itself does not read, is listed by name. The table of
docs/data.md shows what is compared here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtune.data.chat import message
from mlxtune.data.records import Conversation, ToolCall, Turn
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.template_values import DATES, TemplateValues
from mlxtune.data.writing import Writing
from mlxtune.errors import DataError
from mlxtune.gguf.ends import end_of_turn
from mlxtune.train.asking import values_for
from support import templates
from support.chats import WEATHER
from support.files import ROOT
from support.llama_server import LlamaServer, RefusedError

USER, ANSWER = Turn("user", "Is it warm?"), Turn("assistant", "It is, today.")
NEXT, SECOND = Turn("user", "And tomorrow?"), Turn("assistant", "Colder.")
SYSTEM = Turn("system", "Be brief, please.")
CALL = ToolCall("weather", {"city": "Rome"}, "callRome1")
OTHER = ToolCall("weather", {"city": "Oslo"}, "callOslo2")
RESULT = Turn("tool", '{"celsius": 31}', tool_call_id="callRome1", name="weather")
CONVERSATIONS = {
    "plain": (USER, ANSWER),
    "rounds": (SYSTEM, USER, ANSWER, NEXT, SECOND),
    "call": (USER, Turn("assistant", "", tool_calls=(CALL,)), RESULT, ANSWER),
    "words and call": (USER, Turn("assistant", "I look.", tool_calls=(CALL,)), RESULT, ANSWER),
    "reasoning": (USER, replace(ANSWER, reasoning="The sun shines.")),
    "two calls": (USER, Turn("assistant", "", tool_calls=(CALL, OTHER)), RESULT, ANSWER),
    "empty answer": (USER, Turn("assistant", ""), NEXT, SECOND),
    "late system": (USER, ANSWER, SYSTEM, NEXT, SECOND),
}
CALLS = ("call", "words and call", "two calls")

# In the words of the template, or what it leaves out.
ORDER = "must alternate user/assistant"
NO_WORDS = {"words and call": "leaves out the words beside a tool call"}
NO_TOOLS = dict.fromkeys(CALLS, "leaves out tools")
NO_CALLS = dict.fromkeys(CALLS, "leaves out tool calls")
FIRST_SYSTEM = {"late system": "leaves out what turns of role system say"}
FIRST_CALL = {"two calls": "leaves out arguments of tool calls"}
ONE_CALL = {"two calls": "only supports single tool-calls at once"}
UNSAFE = dict.fromkeys(CALLS, "access to attribute 'append' of 'list' object is unsafe")
REFUSALS: dict[str, dict[str, str]] = {
    "Apertus-8B-Instruct": {"late system": "Invalid message role"},
    "Bielik-11B-v3.0-Instruct": FIRST_SYSTEM,
    "Cohere2MoE": NO_WORDS,
    "CohereForAI-c4ai-command-r-plus-tool_use": dict.fromkeys(CALLS, "no attribute 'description'"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": NO_WORDS,
    "GigaChat3-10B-A1.8B": FIRST_CALL,
    "GigaChat3.1-10B-A1.8B": FIRST_CALL,
    "HuggingFaceTB-SmolLM3-3B": NO_TOOLS | FIRST_SYSTEM,  # it takes tools under other names
    "Kimi-K2-Instruct": UNSAFE,
    "Kimi-K2-Thinking": UNSAFE,
    "LFM2-8B-A1B": NO_CALLS,
    "LFM2.5-Instruct": NO_CALLS,
    "MiniMax-M1": NO_WORDS | FIRST_SYSTEM,
    "MiniMax-M2": FIRST_SYSTEM,
    "MiniMax-M3": FIRST_SYSTEM,
    "Mistral-Small-3.2-24B-Instruct-2506": NO_WORDS | {"late system": ORDER},
    "NVIDIA-Nemotron-Nano-v2": FIRST_SYSTEM,
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": NO_WORDS,
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": NO_WORDS,
    "Qwen3.5-4B": {"late system": "System message must be at the beginning"},
    "Reka-Edge": FIRST_SYSTEM,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": NO_TOOLS,
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": NO_TOOLS,
    "deepseek-ai-DeepSeek-V3.1": NO_TOOLS,
    "fireworks-ai-llama-3-firefunction-v2": dict.fromkeys(
        CONVERSATIONS, "'functions' is undefined"
    ),
    "google-gemma-2-2b-it": dict.fromkeys((*CALLS, "late system"), ORDER)
    | {"rounds": "System role not supported"},
    "ibm-granite-granite-3.3-2B-Instruct": NO_CALLS,
    "llama-cpp-deepseek-r1": dict.fromkeys(CALLS, "generator is not JSON serializable"),
    "llama-cpp-rwkv-world": NO_TOOLS,
    "meetkai-functionary-medium-v3.2": dict.fromkeys(CALLS, 'can only concatenate str .not "dict"'),
    "meta-llama-Llama-3.1-8B-Instruct": NO_WORDS | ONE_CALL,
    "meta-llama-Llama-3.2-3B-Instruct": NO_WORDS | ONE_CALL,
    "meta-llama-Llama-3.3-70B-Instruct": NO_WORDS | ONE_CALL,
    "microsoft-Phi-3.5-mini-instruct": NO_TOOLS,
    "mistralai-Ministral-3-14B-Reasoning-2512": {
        "empty answer": "must have a string or a list of chunks",
        "late system": "Only user, assistant and tool roles are supported",
    },
    "mistralai-Mistral-Nemo-Instruct-2407": NO_WORDS | {"late system": ORDER},
    "muse-glimmer": NO_WORDS,
    "openai-gpt-oss-120b": FIRST_CALL | FIRST_SYSTEM,
    "upstage-Solar-Open-100B": NO_WORDS,
}
# In what llama.cpp differs: its prompt, the end of the answer, or what it reads.
WORDS, REFUSED = ("words",), ("refused",)
UNREAD: dict[str, dict[str, tuple[str, ...]]] = {
    # It counts what the prompt says before reasoning, "Here are my reasoning steps:", as such.
    "Apriel-1.6-15b-Thinker-fixed": dict.fromkeys(CONVERSATIONS, WORDS),
    # These write reasoning between tags for which it has no reader.
    "LFM2.5-Instruct": {"reasoning": WORDS},
    "upstage-Solar-Open-100B": {
        "reasoning": WORDS,
        "call": ("refused", "words"),
        "two calls": ("refused", "words"),
    },
    # The prompt ends with </think>, and its reader wants another one, or takes it for words.
    "deepseek-ai-DeepSeek-V3.2": dict.fromkeys(CALLS, REFUSED),
    "deepseek-ai-DeepSeek-V4": dict.fromkeys(set(CONVERSATIONS) - {"reasoning"}, WORDS),
    "deepseek-ai-DeepSeek-V4-Flash-0731": dict.fromkeys(set(CONVERSATIONS) - {"reasoning"}, WORDS),
    # Its grammar of tool calls admits other forms than the template writes.
    "MiniMax-M1": {"two calls": REFUSED},
    "MiniMax-M2": {"two calls": REFUSED},
    "Mistral-Small-3.2-24B-Instruct-2506": {"call": REFUSED, "two calls": REFUSED},
    "unsloth-Apriel-1.5": dict.fromkeys(CALLS, REFUSED),
    # Jinja in Python writes quotation marks in tools as &#34;.
    "meetkai-functionary-medium-v3.1": dict.fromkeys(CALLS, ("prompt", "refused")),
    # The template puts the words after the call, or the call into a turn of its own, or thinks
    # them; llama.cpp changes what is said to Gemma 4 around calls before it renders it.
    "google-gemma-4-31B-it": {"words and call": ("prompt", "refused")},
    "google-gemma-4-31B-it-interleaved": {
        "call": ("prompt",),
        "words and call": ("prompt", "refused"),
        "two calls": ("prompt",),
    },
    "NVIDIA-Nemotron-Nano-v2": {"words and call": WORDS},
    "openai-gpt-oss-120b": {"words and call": WORDS},
    # Answers end with an empty line, which is no token of its own.
    "llama-cpp-rwkv-world": dict.fromkeys(
        ("plain", "rounds", "empty answer", "late system"), ("end",)
    )
    | {"reasoning": ("end", "words")},
}


@cache
def made(name: str, thinking: bool) -> tuple[str, TokenizerWrapper, Renderer]:
    """A template with what a run writes at its top, and what renders with it."""
    values = TemplateValues(
        values_for(templates.tokenizer(name), thinking=thinking), date(2026, 1, 2)
    )
    template = values.written_into(templates.source(name))
    tokenizer = templates.tokenizer(name, template)
    return template, tokenizer, Renderer(tokenizer)


def told(samples: list[Sample], tokenizer: TokenizerWrapper) -> Iterator[tuple[str, list[int]]]:
    """Of each answer the text before it, and its tokens."""
    for sample in samples:
        trained = np.flatnonzero(sample.weights)
        for part in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1):
            yield tokenizer.decode(sample.tokens[: part[0]].tolist()), sample.tokens[part].tolist()


def openai(turns: tuple[Turn, ...]) -> list[dict]:
    """Messages as OpenAI's API has them: arguments are text."""
    messages = [message(turn) for turn in turns]
    for call in (call for one in messages for call in one.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


def differences(name: str, asked: str, folder: Path) -> set[str]:
    """In what llama.cpp's server and what is trained differ, of all answers.

    Raises:
        DataError: the conversation cannot be trained on.
    """
    template, tokenizer, renderer = made(name, asked == "reasoning")
    turns, tools = CONVERSATIONS[asked], [WEATHER] if asked in CALLS else []
    samples = renderer.samples(
        Conversation(turns, tools=tuple(tools)), writing=Writing(reasoning="inline")
    )
    numbers = [n for n, turn in enumerate(turns) if turn.role == "assistant" and not turn.empty]
    ends = {*tokenizer.eos_token_ids, end_of_turn(tokenizer)}
    found = set()
    with LlamaServer(folder, template) as server:
        for (prompt, tokens), number in zip(told(samples, tokenizer), numbers, strict=True):
            before, turn = openai(turns[:number]), turns[number]
            if server.prompt(before, tools=tools) != prompt:
                found.add("prompt")
            if tokens[-1] not in ends:
                found.add("end")
            said = tokenizer.decode(tokens[:-1] if tokens[-1] in ends else tokens)
            try:
                read = server.read(before, said, tools=tools)
            except RefusedError:
                found.add("refused")
                continue
            if not turn.tool_calls and renderer.answers.read(said) != turn:
                found.add("our reading")
            if read.tool_calls != tuple((call.name, call.arguments) for call in turn.tool_calls):
                found.add("calls")
            # Where the template has no place for reasoning, it is written into the answer.
            inline = f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"
            wanted = [(turn.content, turn.reasoning)]
            if renderer.answers.thoughts is None:
                wanted.append((inline, ""))
            if (read.content.strip(), read.reasoning.strip()) not in wanted:
                found.add("words")
    return found


# Of the others `make test-all` takes care.
FAST = ("plain", "call", "reasoning")
ASKED = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CONVERSATIONS
]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", templates.names())
def test_an_answer_is_asked_for_and_read_back_as_llama_cpp_does(name, asked, tmp_path):
    if (refusal := REFUSALS.get(name, {}).get(asked)) is not None:
        with pytest.raises(DataError, match=refusal):
            differences(name, asked, tmp_path)
    else:
        assert differences(name, asked, tmp_path) == set(UNREAD.get(name, {}).get(asked, ()))


# The models of the table in docs/data.md, and their templates, which agree in every cell.
SHOWN: dict[str, tuple[str, ...]] = {
    "Qwen2.5, Qwen3-Coder": ("Qwen-Qwen2.5-7B-Instruct", "Qwen3-Coder"),
    "Qwen3": ("Qwen-Qwen3-0.6B",),
    "Qwen3.5": ("Qwen3.5-4B",),
    "QwQ": ("Qwen-QwQ-32B",),
    "Llama 3.1, 3.2, 3.3": (
        "meta-llama-Llama-3.1-8B-Instruct",
        "meta-llama-Llama-3.2-3B-Instruct",
        "meta-llama-Llama-3.3-70B-Instruct",
    ),
    "Gemma 2": ("google-gemma-2-2b-it",),
    "Gemma 4": ("google-gemma-4-31B-it",),
    "Phi-3.5": ("microsoft-Phi-3.5-mini-instruct",),
    "Mistral Nemo, Mistral Small 3.2, Devstral Small": (
        "mistralai-Mistral-Nemo-Instruct-2407",
        "Mistral-Small-3.2-24B-Instruct-2506",
        "unsloth-mistral-Devstral-Small-2507",
    ),
    "Ministral 3 Reasoning": ("mistralai-Ministral-3-14B-Reasoning-2512",),
    "DeepSeek R1 distill, Llama": ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B",),
    "DeepSeek R1 distill, Qwen": ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",),
    "DeepSeek V3.1, V3.2": ("deepseek-ai-DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.2"),
    "DeepSeek V4": ("deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731"),
    "GLM-4.6": ("GLM-4.6",),
    "GLM-4.7-Flash": ("GLM-4.7-Flash",),
    "gpt-oss": ("openai-gpt-oss-120b",),
    "SmolLM3": ("HuggingFaceTB-SmolLM3-3B",),
    "Granite 3.3": ("ibm-granite-granite-3.3-2B-Instruct",),
    "Granite 4.0, 4.1": ("ibm-granite-granite-4.0", "ibm-granite-granite-4.1"),
    "Nemotron 3 Nano": ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",),
    "MiniMax-M2": ("MiniMax-M2",),
    "Kimi-K2-Thinking": ("Kimi-K2-Thinking",),
    "LFM2.5-Instruct": ("LFM2.5-Instruct",),
    "LFM2.5-8B-A1B": ("LFM2.5-8B-A1B",),
    "Step 3.5 Flash": ("StepFun3.5-Flash",),
    "Command R7B": ("CohereForAI-c4ai-command-r7b-12-2024-tool_use",),
    "Hunyuan Hy3": ("tencent-Hy3",),
    "Seed-OSS": ("ByteDance-Seed-OSS",),
}
TITLES = ("model", "records", "asked with", "the prompt ends with", "the answer")
# Where the part of a prompt begins that asks the assistant.
ROLE = re.compile(
    r"<[^<>]*>(?:assistant|model)|<[^<>]*(?:assistant|chatbot)[^<>]*>|\]~b\]ai|\[/INST\]", re.I
)


def cells(name: str, thinking: bool) -> tuple[str, str, str]:
    """How a template is asked, the end of its prompt, and the answer."""
    _, tokenizer, renderer = made(name, thinking)
    reasoning = "Let me see." if thinking else ""
    turns = (Turn("user", "Is it?"), Turn("assistant", "Yes.", reasoning=reasoning))
    [(prompt, tokens)] = told(renderer.samples(Conversation(turns)), tokenizer)
    [*_, role] = ROLE.finditer(prompt)
    values = values_for(templates.tokenizer(name), thinking=thinking)
    modes = {key: value for key, value in values.items() if key not in DATES}
    said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in modes.items())
    return said, prompt[role.start() :], tokenizer.decode(tokens)


def row(*texts: str) -> str:
    return f"| {' | '.join(texts)} |".replace("|  |", "| |")


def code(text: str) -> str:
    """Text as code in a cell, with a sign for each line break."""
    shown = text.replace("\n", "⏎").replace("|", r"\|")
    return f"`{shown}`" if shown else "–"


def table() -> list[str]:
    """The table of docs/data.md, by lines."""
    lines = [row(*TITLES), f"|{'---|' * len(TITLES)}"]
    for model, names in SHOWN.items():
        thoughtful = [made(name, True)[2].answers.thoughts is not None for name in names]
        for thinking in (False, True) if thoughtful[0] else (False,):
            [shown] = {cells(name, thinking) for name in names}
            records = "with reasoning" if thinking else "without" if thoughtful[0] else "all"
            lines.append(row("" if thinking else model, records, *map(code, shown)))
    return lines


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/data.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_docs_show_how_models_are_asked_and_answer(page):
    shown = page[page.index(row(*TITLES)) :].partition("\n\n")[0]
    assert shown.splitlines() == table()


def test_the_docs_show_the_samples_of_a_conversation_and_the_values_in_its_template(page):
    template, tokenizer, renderer = made("Qwen-Qwen3-0.6B", False)
    [first, second] = [
        f"{before}⟦{tokenizer.decode(answer)}⟧\n"
        for before, answer in told(
            renderer.samples(Conversation((USER, ANSWER, NEXT, SECOND))), tokenizer
        )
    ]
    assert f"```console\n{first}\n{second}```" in page
    assert f"```jinja\n{template.splitlines()[0]}\n```" in page
