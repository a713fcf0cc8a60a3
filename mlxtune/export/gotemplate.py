"""Chat templates in Go's language, for Ollama, which does not always run the GGUF's Jinja.

Many models write conversations in one of a few ways. Which one is told by rendering: a
family's Go template is taken if it gives the text that the model's own template gives,
for every test conversation that this one does not refuse. Where none does, there is none.

What Ollama hands a template: `.System`, all system messages in one text; `.Messages`, each
with `.Role` and `.Content`, system messages among them. Of one role in a row it makes one
message, with an empty line between. Language: https://pkg.go.dev/text/template
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer

_SYSTEM = "Be brief; say \"no\" or 'yes'."
_FIRST, _ANSWER, _NEXT = "What is 2 < 3?", "It holds.\n\n- & so on", "Why, ünd\nhow?"
_Role = Literal["system", "user", "assistant"]


def _padded(role: _Role, text: str) -> Turn:
    return Turn(role, f"\n \n\t{text} \n\n ")


_ASKED, _NEXT_ASKED = Turn("user", _FIRST), Turn("user", _NEXT)
_ANSWERED = Turn("assistant", _ANSWER)
_TOLD, _TOLD_LATE = Turn("system", _SYSTEM), Turn("system", "Now say\nmore.")
_PADDED = (_padded("user", _FIRST), _padded("assistant", _ANSWER), _padded("user", _NEXT))

# Conversations that tell families apart, each with and without a system prompt.
_TURNS: tuple[tuple[Turn, ...], ...] = (
    (_ASKED,),
    (_ASKED, _ANSWERED, _NEXT_ASKED),
    (_ASKED, _ANSWERED, _NEXT_ASKED, Turn("assistant", _NEXT), _ASKED),
    (_ASKED, Turn("assistant", ""), _NEXT_ASKED),
    (_ASKED, _ANSWERED, _TOLD_LATE, _NEXT_ASKED),
    _PADDED,
)
CONVERSATIONS: tuple[tuple[Turn, ...], ...] = (
    *_TURNS,
    *((_TOLD, *turns) for turns in _TURNS),
    (Turn("system", ""), _ASKED),
    (Turn("system", ""), _ASKED, _ANSWERED, _NEXT_ASKED),
    (_padded("system", _SYSTEM), *_PADDED),
    (_ASKED, _ANSWERED, _padded("system", _SYSTEM), _NEXT_ASKED),
    (_ASKED, _ANSWERED, Turn("system", ""), _NEXT_ASKED),
)

Marks = tuple[str, str]


@dataclass(frozen=True)
class Family:
    """How a family of models writes a conversation.

    Attributes:
        name: for people.
        user: what stands before and after the user's words.
        assistant: the same of an answer; the former also asks for one.
        system: the same of a system prompt, or where it goes: with an empty line after it in
            front of the user's `first` or `last` words.
    """

    name: str
    user: Marks
    assistant: Marks
    system: Marks | Literal["first", "last"]


FAMILIES = (
    Family(
        "ChatML",
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        ("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    Family(
        "Llama 3",
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    Family(
        "Gemma",
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "first",
    ),
    Family(
        "Phi 3",
        ("<|user|>\n", "<|end|>\n"),
        ("<|assistant|>\n", "<|end|>\n"),
        ("<|system|>\n", "<|end|>\n"),
    ),
    Family("Mistral", ("[INST]", "[/INST]"), ("", "</s>"), "last"),
)


@dataclass(frozen=True)
class _Head:
    """What stands before the turns.

    Attributes:
        without: where the first message is no system prompt.
        before, after: around the system prompt where it is; of a family that puts it between
            marks.
    """

    without: str
    before: str = ""
    after: str = ""

    @property
    def default(self) -> str:
        """The system prompt of conversations that have none."""
        inner = self.without.removeprefix(self.before).removesuffix(self.after)
        return inner if self.before + inner + self.after == self.without else ""


@dataclass(frozen=True)
class _Manner:
    """What models of a family do one way or another.

    Attributes:
        empty: a system prompt that is empty is written like any other, not left out.
        late: which system messages that are not the first are written where they stand: `all`,
            those that are `not empty`, or `none`.
        stripped: the roles whose words lose the white space around them.
    """

    empty: bool
    late: Literal["all", "not empty", "none"]
    stripped: frozenset[str]


def _manners() -> Iterator[_Manner]:
    """All there are, the plainest first."""
    roles = ("system", "user", "assistant")
    for strips in product((False, True), repeat=len(roles)):
        stripped = frozenset(role for role, strip in zip(roles, strips, strict=True) if strip)
        for empty in (True, False):
            yield _Manner(empty, "all", stripped)
            yield _Manner(empty, "not empty", stripped)
            yield _Manner(empty, "none", stripped)


@dataclass(frozen=True)
class GoTemplate:
    """A chat template for Ollama.

    Attributes:
        family: whose it is.
        text: in Go's language.
        system: what the model's own template says where a conversation has no system
            prompt, if it says the same when it is given that as one; empty if not.
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
    bos = added_bos(tokenizer)

    def ask(turns: Sequence[Turn]) -> str | None:
        try:
            return renderer.text(turns, ask=True).removeprefix(bos)
        except Exception:  # Jinja templates raise whatever they like
            return None

    wanted = [(turns, text) for turns in CONVERSATIONS if (text := ask(turns)) is not None]
    for family in FAMILIES:
        head = _head(family, ask)
        if head is None:
            continue
        for manner in _manners():
            if all(_written(family, head, manner, turns) == text for turns, text in wanted):
                go = _go(family, head, manner)
                return GoTemplate(family.name, go, _default(head, ask)) if go else None
    return None


def added_bos(tokenizer: Any) -> str:
    """The token that the tokenizer, and so the runtime, puts before every text by itself."""
    number = tokenizer.bos_token_id
    ids = tokenizer.encode("a")
    return str(tokenizer.bos_token) if number is not None and ids[:1] == [number] else ""


def _head(family: Family, ask: Callable[[Sequence[Turn]], str | None]) -> _Head | None:
    """What a template writes before the turns, if these are written as the family's."""
    tail = _FIRST.join(family.user) + family.assistant[0]
    without = ask([_ASKED])
    if without is None or not without.endswith(tail):
        return None
    without = without.removesuffix(tail)
    if isinstance(family.system, str):
        return _Head(without)
    told = ask([_TOLD, _ASKED])
    if told is None or not told.endswith(tail):
        return None
    before, found, after = told.removesuffix(tail).partition(_SYSTEM)
    return _Head(without, before, after) if found else None


def _default(head: _Head, ask: Callable[[Sequence[Turn]], str | None]) -> str:
    """The template's own system prompt, if it comes to the same as one that is given.

    Newer versions of Ollama give it to the template as a system message, and one template
    takes parts of such a message for orders to itself.
    """
    if not head.default:
        return ""
    given = Turn("system", head.default)
    bare = (turns for turns in CONVERSATIONS if turns[0].role != "system")
    return head.default if all(ask([given, *turns]) == ask(turns) for turns in bare) else ""


def _if(condition: str, then: str, otherwise: str = "") -> str:
    """In Go's language."""
    other = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{then}{other}{{{{ end }}}}"


# White space, and how a Go template strips it: in the language there is no function for that,
# but a template may call itself, with one character less.
_SPACES = " \t\n\v\f\r"
_IS_SPACE = r'" " "\t" "\n" "\v" "\f" "\r"'
_STRIPPED = _if(
    f"eq (slice . 0 1) {_IS_SPACE}",
    '{{ template "strip" (slice . 1) }}',
    _if(f"eq (slice . $last) {_IS_SPACE}", '{{ template "strip" (slice . 0 $last) }}', "{{ . }}"),
)
_STRIP = (
    '{{ define "strip" }}' + _if(".", "{{ $last := len (slice . 1) }}" + _STRIPPED) + "{{ end }}"
)


def _written(family: Family, head: _Head, manner: _Manner, turns: Sequence[Turn]) -> str:
    """What the Go template gives, without running it."""

    def words(turn: Turn) -> str:
        return turn.content.strip(_SPACES) if turn.role in manner.stripped else turn.content

    marks = None if isinstance(family.system, str) else family.system
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    told = system or (manner.empty and turns[0].role == "system")
    front = words(Turn("system", system)) + "\n\n" if told and marks is None else ""
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    place = users[0] if family.system == "first" else len(turns) - 1
    text = head.without
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            text += words(turn).join(family.assistant)
        elif turn.role == "user":
            text += (front * (number == place) + words(turn)).join(family.user)
        elif marks and number == 0 and (manner.empty or turn.content):
            text = head.before + words(turn) + head.after
        elif (
            marks and number and (manner.late == "all" or (manner.late != "none" and turn.content))
        ):
            text += words(turn).join(marks)
    return text + family.assistant[0]


def _go(family: Family, head: _Head, manner: _Manner) -> str | None:
    """The Go template; None if the model's own words would be read as the language's."""
    # What stands behind each of them begins with two braces.
    if any("{{" in f"{text}{{" for text in (head.without, head.before, head.after)):
        return None

    def words(role: str, field: str = ".Content") -> str:
        strip = 'template "strip" ' if role in manner.stripped else ""
        return f"{{{{ {strip}{field} }}}}"

    any_system, said = 'eq .Role "system"', 'and (eq .Role "system") .Content'
    told = any_system if manner.empty else said
    if isinstance(family.system, str):
        # What a model of such a family refuses, system messages later on, is said with the first.
        start = head.without + "{{ $told := .System }}"
        first = _if(f"and (eq $i 0) ({told})", "{{ $told = true }}")
        front = _if("$told", words("system", "$.System") + "\n\n{{ $told = false }}")
        if family.system == "last":
            front = _if("eq (len (slice $.Messages $i)) 1", front)
    else:
        start = front = ""
        which = {"all": any_system, "not empty": said}.get(manner.late)
        system = words("system")
        later = _if(which, system.join(family.system)) if which else ""
        first = _if("eq $i 0", _if(told, head.before + system + head.after, head.without), later)
    asked = _if('ne .Role "system"', (front + words("user")).join(family.user))
    turn = _if('eq .Role "assistant"', words("assistant").join(family.assistant), asked)
    return (
        f"{_STRIP if manner.stripped else ''}{start}{{{{ range $i, $_ := .Messages }}}}"
        f"{first}{turn}{{{{ end }}}}{family.assistant[0]}"
    )
