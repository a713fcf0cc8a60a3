"""What tests of chat templates share: real ones, and short conversations for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlxtune.data.masking import Masking
from mlxtune.data.records import Conversation, ToolCall, Turn
from mlxtune.data.render import Renderer
from support import downloads

WHERE = "chats.jsonl:7"


@dataclass(frozen=True)
class Template:
    """What is known of a template.

    Attributes:
        folder: of its tokenizer in the cache.
        end: what an answer ends with.
        opens: what the template writes at the beginning of the last answer.
        file: of the template, where it is not the tokenizer's own.
        bos: the token every text begins with.
        rewrites: earlier answers are written otherwise than the last one.
        system: a system prompt stands in one place, however long the conversation is.
        tools: it writes tool calls.
        alternates: it refuses two users or two answers in a row.
        form: the Unicode form that its tokenizer brings text to.
    """

    folder: str
    end: str
    opens: str = ""
    file: str | None = None
    bos: str = ""
    rewrites: bool = False
    system: bool = True
    tools: bool = False
    alternates: bool = False
    form: str = ""


NO_THOUGHT = "<think>\n\n</think>\n\n"
TEMPLATES = {
    "smollm2": Template("", "<|im_end|>"),
    "qwen3": Template(
        "qwen3", "<|im_end|>", opens=NO_THOUGHT, rewrites=True, tools=True, form="NFC"
    ),
    "llama3": Template("llama3_1", "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3.1": Template(
        "llama3_1", "<|eot_id|>", file="template.jinja", bos="<|begin_of_text|>", tools=True
    ),
    "gemma3": Template("gemma3", "<end_of_turn>", bos="<bos>", alternates=True),
    # The system prompt goes before the last message if that is a user's.
    "nemo": Template("nemo", "</s>", bos="<s>", system=False, tools=True, alternates=True),
    # It marks answers itself. Its own tokenizer is not at hand; Qwen3's has the same marks.
    "lfm2.5": Template("qwen3", "<|im_end|>", file="lfm2.5.jinja", tools=True, form="NFC"),
    "phi3.5": Template("phi3", "<|end|>"),
}


class Chat:
    """A tokenizer with its template and what is known of it."""

    def __init__(self, known: Template, tokenizer: Any) -> None:
        self.known, self.tokenizer = known, tokenizer
        self.renderer = Renderer(tokenizer)

    def trained(self, *turns: Turn, tools: tuple = (), masking: Masking | None = None):
        """Of each sample, the text of each unbroken stretch of trained tokens."""
        asked = Conversation(turns, WHERE, tools=tools)
        made = []
        for sample in self.renderer.samples(asked, masking=masking or Masking()):
            weighted = np.flatnonzero(sample.weights)
            stretches = np.split(weighted, np.flatnonzero(np.diff(weighted) > 1) + 1)
            made.append([self.tokenizer.decode(sample.tokens[s].tolist()) for s in stretches])
        return made

    def ids(self, *turns: Turn, tools: tuple = ()) -> list[list[int]]:
        asked = Conversation(turns, WHERE, tools=tools)
        return [sample.tokens.tolist() for sample in self.renderer.samples(asked)]

    def by_transformers(self, *turns: Turn, tools: tuple = ()) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages(turns), tools=list(tools) or None, tokenize=True, return_dict=False
        )


def messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Turns as transformers' and mistral-common's documentation writes them."""
    made = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in turn.tool_calls
            ]
        if turn.role == "tool":
            message |= {"tool_call_id": turn.tool_call_id, "name": turn.name}
        made.append(message)
    return made


def chat(name: str, request: pytest.FixtureRequest) -> Chat:
    known = TEMPLATES[name]
    if not known.folder:
        tokenizer = request.getfixturevalue("smollm2").tokenizer._tokenizer
    else:
        tokenizer = downloads.load(known.folder, known.file)
    return Chat(known, tokenizer)


SYSTEM = Turn("system", "Be brief.")
FRANCE, ITALY = Turn("user", "Capital of France?"), Turn("user", "And Italy?")
PARIS, ROME = Turn("assistant", "Paris."), Turn("assistant", "Rome.")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WARM = Turn("user", "Is it warm in Rome?")
CALL = Turn("assistant", "", tool_calls=(ToolCall("weather", {"city": "Rome"}, "callRome1"),))
RESULT = Turn("tool", '{"celsius": 31}', tool_call_id="callRome1", name="weather")
IT_IS = Turn("assistant", "Yes, 31 degrees.")
TWO_ROUNDS = (SYSTEM, FRANCE, PARIS, ITALY, ROME)
THOUGHT = (
    FRANCE,
    Turn("assistant", "Paris.", reasoning="Easy."),
    ITALY,
    Turn("assistant", "Rome.", reasoning="Easy too."),
)
TOOLS = (WARM, CALL, RESULT, IT_IS)
THOUGHT_TOOLS = (
    WARM,
    Turn("assistant", "", reasoning="Look it up.", tool_calls=CALL.tool_calls),
    RESULT,
    Turn("assistant", "Yes, 31 degrees.", reasoning="31 is warm."),
)
