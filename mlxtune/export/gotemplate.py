"""Chat templates in Go's language, for Ollama before 0.30, which runs no Jinja.

Many models write conversations in one of a few ways. Which one is told by rendering: a
family's Go template is taken if it gives the text that the model's own template gives,
for every test conversation. Where none does, there is none.

What Ollama hands a template: `.System`, all system messages in one text; `.Messages`, each
with `.Role` and `.Content`, system messages among them. Language:
https://pkg.go.dev/text/template
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer

_SYSTEM = "Be brief; say \"no\" or 'yes'."
_FIRST, _ANSWER, _NEXT = "What is 2 < 3?", "It holds.\n\n- & so on", "Why, ünd\nhow?"

# What a family is told by: with a system prompt and without, one question and several.
CONVERSATIONS: tuple[tuple[Turn, ...], ...] = tuple(
    (*head, *turns)
    for head in ((), (Turn("system", _SYSTEM),))
    for turns in (
        (Turn("user", _FIRST),),
        (Turn("user", _FIRST), Turn("assistant", _ANSWER), Turn("user", _NEXT)),
        (
            Turn("user", _FIRST),
            Turn("assistant", _ANSWER),
            Turn("user", _NEXT),
            Turn("assistant", _NEXT),
            Turn("user", _FIRST),
        ),
    )
)


@dataclass(frozen=True)
class Family:
    """How a family of models writes a conversation.

    Attributes:
        name: for people.
        user: what stands before and after the user's words.
        assistant: the same of an answer; the former also asks for one.
        system: where the system prompt goes: before all turns, or with an empty line after
            it in front of the user's `first` or `last` words.
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: Literal["before", "first", "last"] = "before"


FAMILIES = (
    Family(
        "ChatML",
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
    Family(
        "Llama 3",
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    Family(
        "Gemma",
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "first",
    ),
    Family("Phi 3", ("<|user|>\n", "<|end|>\n"), ("<|assistant|>\n", "<|end|>\n")),
    Family("Mistral", ("[INST]", "[/INST]"), ("", "</s>"), "last"),
)


@dataclass(frozen=True)
class _Head:
    """What stands before the turns.

    Attributes:
        lead: always.
        before, after: around the system prompt.
        always: whether they stand there without a system prompt too.
        default: the system prompt of conversations that have none.
    """

    lead: str = ""
    before: str = ""
    after: str = ""
    always: bool = False
    default: str = ""


@dataclass(frozen=True)
class GoTemplate:
    """A chat template for Ollama.

    Attributes:
        family: whose it is.
        text: in Go's language.
        system: what the model's own template says where a conversation has no system
            prompt; empty if nothing.
    """

    family: str
    text: str
    system: str


def go_template(renderer: Renderer, tokenizer: Any) -> GoTemplate | None:
    """The Go template that writes conversations as the model's own template does.

    None if there is no family like it, or its text changes from day to day. The token that
    begins every text is left out where the tokenizer puts it there itself, as Ollama does.
    """
    if not renderer.has_template or "strftime_now" in str(tokenizer.chat_template):
        return None
    bos = _added_bos(tokenizer)

    def ask(turns: Sequence[Turn]) -> str | None:
        try:
            return renderer.text(turns, ask=True).removeprefix(bos)
        except Exception:  # Jinja templates raise whatever they like
            return None

    wanted = [(turns, text) for turns in CONVERSATIONS if (text := ask(turns)) is not None]
    for family in FAMILIES:
        head = _head(family, ask)
        if head is None or not wanted:
            continue
        if all(_written(family, head, turns) == text for turns, text in wanted):
            text = _go(family, head)
            return GoTemplate(family.name, text, head.default) if text is not None else None
    return None


def _added_bos(tokenizer: Any) -> str:
    """The token that the tokenizer, and so the runtime, puts before every text by itself."""
    number = tokenizer.bos_token_id
    ids = tokenizer.encode("a")
    return str(tokenizer.bos_token) if number is not None and ids[:1] == [number] else ""


def _head(family: Family, ask: Callable[[Sequence[Turn]], str | None]) -> _Head | None:
    """What a template writes before the turns, if these are written as the family's."""
    question = Turn("user", _FIRST)
    tail = _turn(family, question) + family.assistant[0]
    without = ask([question])
    if without is None or not without.endswith(tail):
        return None
    without = without.removesuffix(tail)
    if family.system != "before":
        return _Head(lead=without)
    told = ask([Turn("system", _SYSTEM), question])
    if told is None or not told.endswith(tail):
        return None
    before, found, after = told.removesuffix(tail).partition(_SYSTEM)
    if not found:
        return None
    if before.startswith(without):
        return _Head(without, before.removeprefix(without), after)
    default = without.removeprefix(before).removesuffix(after)
    if before + default + after != without:
        return None
    return _Head("", before, after, always=True, default=default)


def _turn(family: Family, turn: Turn, front: str = "") -> str:
    opening, closing = family.assistant if turn.role == "assistant" else family.user
    return opening + front + turn.content + closing


def _written(family: Family, head: _Head, turns: Sequence[Turn]) -> str:
    """What the Go template gives, without running it."""
    system = "".join(turn.content for turn in turns if turn.role == "system")
    said = [turn for turn in turns if turn.role != "system"]
    text = head.lead
    if family.system == "before" and (system or head.always):
        text += head.before + (system or head.default) + head.after
    place = {"first": 0, "last": len(said) - 1}.get(family.system)
    for number, turn in enumerate(said):
        text += _turn(family, turn, f"{system}\n\n" if system and number == place else "")
    return text + family.assistant[0]


def _go(family: Family, head: _Head) -> str | None:
    marks = (*family.user, *family.assistant, head.lead, head.before, head.after)
    if any("{{" in mark for mark in marks):
        return None
    text, each, front = head.lead, "range .Messages", ""
    if family.system == "before":
        system = f"{head.before}{{{{ .System }}}}{head.after}"
        text += system if head.always else f"{{{{ if .System }}}}{system}{{{{ end }}}}"
    elif family.system == "first":
        text += "{{ $system := .System }}"
        front = '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
    else:
        each = "range $i, $_ := .Messages"
        last = "and $.System (eq (len (slice $.Messages $i)) 1)"
        front = f"{{{{ if {last} }}}}{{{{ $.System }}}}\n\n{{{{ end }}}}"
    opening, closing = family.assistant
    answer = f"{opening}{{{{ .Content }}}}{closing}"
    words = f"{family.user[0]}{front}{{{{ .Content }}}}{family.user[1]}"
    return (
        f"{text}{{{{ {each} }}}}"
        f'{{{{ if eq .Role "assistant" }}}}{answer}'
        f'{{{{ else if ne .Role "system" }}}}{words}{{{{ end }}}}'
        f"{{{{ end }}}}{opening}"
    )
