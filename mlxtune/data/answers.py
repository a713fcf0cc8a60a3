"""What the model is asked, and what it has to write: the prompt and the answer of one turn.

The prompt is what a server sends: the turns before, with the template's generation prompt. The
answer is what follows it in the rendered conversation. Most templates begin an answer with their
generation prompt, so that the answer is what comes after it. Others ask for more than they write
of a finished answer: they open a thought, and write no reasoning of past answers; or they write
an empty thought, so that the model does not think. Then the answer is put together: reasoning,
the tag after it, and the words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from mlxtune.data.chat import INLINE_TAGS, ChatTemplate, Tools, inlined
from mlxtune.data.records import Turn
from mlxtune.data.thoughts import (
    QUESTION,
    THOUGHT,
    WORDS,
    Thoughts,
    common,
    find_thoughts,
    first_mark,
    last_mark,
)
from mlxtune.errors import DataError

Note = Callable[[str], None]

# Characters from which on no template has a text by chance.
_TELLING = 24
_LETTER = "x"

NO_REASONING = "no reasoning, which the chat template has a place for: an empty thought is trained"


class NoReasoning(DataError):
    """A record has no reasoning, the template asks for it, and such records are left out."""


@dataclass(frozen=True)
class Writing:
    """How conversations are written where a template and a record do not fit.

    Attributes:
        missing_reasoning: an answer without reasoning, where the model is asked to think: its
            thought is `empty`, the record is left out (`skip`) or refused.
        reasoning: that of an answer, where the template has no place for it: it is put into
            the answer between `tags` (`inline`), or the record is refused. With `drop` it is
            left out in any case.
        tags: before and after reasoning that is written into an answer.
        left_out: what else a template leaves out of a record is refused, or counted (`warn`).
    """

    missing_reasoning: Literal["empty", "skip", "refuse"] = "empty"
    reasoning: Literal["refuse", "inline", "drop"] = "refuse"
    tags: tuple[str, str] = INLINE_TAGS
    left_out: Literal["refuse", "warn"] = "refuse"


@dataclass(frozen=True)
class Answer:
    """A prompt, and the text that the model has to write after it.

    Attributes:
        prompt: with the generation prompt at its end.
        text: of the answer, with what the template writes after it.
        plain: the text with letters in the place of marks that are said in it.
        said: the last thing that is said in the plain text, after which it ends.
    """

    prompt: str
    text: str
    plain: str
    said: str


@dataclass
class Answers:
    """Finds the answers of conversations in one template.

    Attributes:
        template: the model's.
    """

    template: ChatTemplate
    _opened: dict[str, bool] = field(default_factory=dict, init=False)

    @cached_property
    def thoughts(self) -> Thoughts | None:
        """How the template writes reasoning."""
        return find_thoughts(self.template)

    def text(self, turns: Sequence[Turn], *, tools: Tools = (), ask: bool = False) -> str:
        """The turns as the template writes them; with `ask`, ready for an answer."""
        if any(turn.reasoning for turn in turns) and self.thoughts is not None:
            return self.template.text(turns, tools=tools, ask=ask, form=self.thoughts.form)
        return self.template.text(turns, tools=tools, ask=ask)

    @cached_property
    def header(self) -> str:
        """What stands between a question and its answer, from the last mark or line on."""
        question = replace(QUESTION, content=WORDS)
        asked = self.template.text([question], ask=True).rpartition(WORDS)[2]
        return asked.removeprefix(self.template.text([question]).rpartition(WORDS)[2]) or last_mark(
            asked
        )

    def prepared(self, turns: Sequence[Turn], writing: Writing) -> tuple[Turn, ...]:
        """Turns with their reasoning where the template, or the recipe, has it.

        Raises:
            DataError: there is reasoning, and no place for it.
        """
        if not any(turn.role == "assistant" for turn in turns):
            return tuple(turns)
        return tuple(
            self._prepared(turn, number, writing) for number, turn in enumerate(turns, start=1)
        )

    def _prepared(self, turn: Turn, number: int, writing: Writing) -> Turn:
        if turn.role != "assistant":
            return turn
        if not turn.reasoning.strip():
            turn = replace(turn, reasoning="")
        if self.thoughts is not None or writing.reasoning == "drop":
            turn = _split(turn, writing.tags)
        if writing.reasoning == "drop":
            return replace(turn, reasoning="")
        if self.thoughts is not None or not turn.reasoning:
            return turn
        if writing.reasoning == "inline":
            return replace(turn, content=inlined(turn, writing.tags), reasoning="")
        raise DataError(
            f"the chat template has no place for the reasoning of turn {number}",
            remedy='reasoning = "inline" writes it into the answer between <think> and </think>; '
            'reasoning = "drop" leaves it out',
        )

    def of(
        self,
        turns: Sequence[Turn],
        number: int,
        tools: Tools,
        writing: Writing,
        note: Note = lambda _: None,
        *,
        whole: str | None = None,
        marks: re.Pattern[str] | None = None,
    ) -> Answer:
        """The prompt and the text of one answer.

        Args:
            turns: of the conversation, prepared.
            number: index of the answer among them.
            tools: of the conversation.
            writing: how it is written where the template does not fit.
            note: is given remarks on it.
            whole: the turns up to and with it, where they have been rendered already.
            marks: that the template or the end of an answer is known by.

        Raises:
            NoReasoning: see `Writing.missing_reasoning`.
            DataError: where the answer begins cannot be told, there is no place for its
                reasoning, or the template takes what is said in it for a mark of its own.
        """
        asked = _Asked(self, turns, number, tools, whole)
        if turns[number].reasoning and self.thoughts is not None:
            text = asked.with_reasoning(self.thoughts)
        else:
            text = asked.without_reasoning(self.thoughts, writing, note)
        turn = turns[number]
        blank = turn if marks is None else _blanked(turn, marks)
        if blank == turn:
            return Answer(asked.prompt, text, text, last_said(turn))
        plain = self.of([*turns[:number], blank], number, tools, writing).text
        changes = sum(map(str.__ne__, "".join(said_in(turn)), "".join(said_in(blank))))
        changed = sum(map(str.__ne__, text, plain))
        if len(text) != len(plain) or changed != changes:
            raise DataError(
                f"the chat template takes a mark that is said in turn {number + 1} for its own",
                remedy="leave the record out of the data, or write the mark in another way",
            )
        return Answer(asked.prompt, text, plain, last_said(blank))

    def left_out(
        self, turns: Sequence[Turn], tools: Tools, text: str, *, ask: bool
    ) -> Iterator[str]:
        """What the template leaves out of what the model is given.

        Args:
            turns: those before an answer, or all.
            tools: of the conversation.
            text: as the template writes them.
            ask: whether that ends with the generation prompt.
        """
        for turn in turns:
            if turn.role != "assistant" and not holds(text, turn.content):
                yield f"what turns of role {turn.role} say"
        names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
        missing = [name for name in names if not holds(text, name)]
        if not missing and any(
            n in said for turn in turns for said in said_in(turn) for n in names
        ):
            try:  # what names them may be the turns
                missing = names if self.text(turns, ask=ask) == text else []
            except Exception:  # a template for conversations with tools alone
                missing = []
        yield from ("tools" for _ in missing)

    def read(self, text: str) -> Turn:
        """What a model has written after a prompt, as a turn: its words apart from its reasoning.

        A thought that does not end stays among the words.

        Args:
            text: of an answer that may call no tool, without the token that ends it.
        """
        reasoning, words, thoughts = "", text, self.thoughts
        if thoughts is not None:
            after = (thoughts.between or thoughts.after).strip()
            if after and after in words:
                reasoning, _, words = words.partition(after)
        before, after = self._frame
        if before:
            words = words.rpartition(before)[2]
        words = words.strip()
        ends = (after[:length] for length in range(len(after), 0, -1))
        words = words.removesuffix(next(filter(words.endswith, ends), "")).strip()
        before = INLINE_TAGS[0] if thoughts is None else thoughts.before.strip()
        if thoughts is None and words.startswith(before) and INLINE_TAGS[1] in words:
            reasoning, _, words = words.partition(INLINE_TAGS[1])
        reasoning = reasoning.rpartition(before)[2] if before else reasoning
        return Turn("assistant", words.strip(), reasoning=reasoning.strip())

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What a template writes around the words of an answer, thoughts and white space aside."""
        turns = (QUESTION, Turn("assistant", WORDS))
        try:
            text = self.of(turns, 1, (), Writing()).text
        except Exception:  # a template may refuse any conversation, in any way
            return "", ""
        before, _, after = text.partition(WORDS)
        return _without_thought(before, self.thoughts).strip(), after.strip()

    def opens(self, asked: _Asked) -> bool:
        """Whether a prompt opens a thought."""
        thoughts = self.thoughts
        if thoughts is None:
            return False
        prompt = asked.prompt.rstrip()
        if not thoughts.written:
            return prompt.endswith(thoughts.before.strip())
        tail = asked.tail
        if tail not in self._opened:
            text, thought = asked.probed()
            before, after = text[:thought].rstrip(), text[thought + len(THOUGHT) :]
            over = first_mark(after) in prompt[len(before) :]
            self._opened[tail] = thought >= 0 and prompt.startswith(before) and not over
        return self._opened[tail]


class _Asked:
    """One answer, rendered.

    Attributes:
        prompt: the turns before it, with the generation prompt.
        whole: the turns up to and with it.
    """

    def __init__(
        self,
        answers: Answers,
        turns: Sequence[Turn],
        number: int,
        tools: Tools,
        whole: str | None = None,
    ) -> None:
        self._answers, self._number, self._tools = answers, number, tools
        self._before, self._turn = turns[:number], turns[number]
        self.prompt = answers.text(self._before, tools=tools, ask=True)
        second = number > 0 and turns[number - 1].role == "assistant"
        if second and self.prompt == answers.text(self._before, tools=tools):
            raise DataError(
                f"the chat template asks for no answer after turn {number}, which is one",
                remedy='join answers that follow one another, or set "train": false for the second',
            )
        self.whole = self._with(self._turn) if whole is None else whole

    def _with(self, turn: Turn) -> str:
        return self._answers.text([*self._before, turn], tools=self._tools)

    def probed(self) -> tuple[str, int]:
        """The text with a mark in the place of the reasoning, and where the mark is, or -1."""
        try:
            text = self._with(replace(self._turn, reasoning=THOUGHT))
        except Exception:  # gpt-oss refuses reasoning beside words and a call
            return "", -1
        return text, text.rfind(THOUGHT)

    @property
    def tail(self) -> str:
        """What stands in the prompt after what was said last."""
        said = self._before[-1].content.strip()
        return self.prompt.rpartition(said)[2] if said else self.prompt[-80:]

    @property
    def _follows(self) -> bool:
        return self.whole.startswith(self.prompt)

    @property
    def _rest(self) -> str:
        """What follows the prompt, of a text that begins with it."""
        return self.whole[len(self.prompt) :]

    def with_reasoning(self, thoughts: Thoughts) -> str:
        """The text of an answer that has reasoning."""
        reasoning = self._turn.reasoning.strip()
        if self._follows and self._reasons(reasoning):
            return self._rest
        opened = self._answers.opens(self)
        if thoughts.written:
            if opened and (place := self._start_of(reasoning)) >= 0:
                return self.whole[place:]  # the prompt says more than the template does
        elif opened or not self._closed(thoughts):
            before = "" if opened else thoughts.before
            return before + reasoning + thoughts.after + self._words(thoughts)
        raise DataError(
            f"the prompt tells the model not to think, and turn {self._number + 1} has reasoning",
            remedy="set model.chat_template_kwargs so that it may think, such as "
            'enable_thinking = true, or leave reasoning out: reasoning = "drop"',
        )

    def _reasons(self, reasoning: str) -> bool:
        """Whether the reasoning follows the prompt, of a text that begins with it."""
        if not holds(self._rest, reasoning):
            return False
        others = [text for text in said_in(replace(self._turn, reasoning="")) if text]
        if len(reasoning) >= _TELLING and not any(reasoning in text for text in others):
            return True
        text, thought = self.probed()  # its text may be that of something else
        return not text or thought >= len(self.prompt)

    def _start_of(self, reasoning: str) -> int:
        """Where the reasoning begins in the whole text, or -1."""
        text, thought = self.probed()
        if thought < 0 or self.whole[:thought] != text[:thought]:
            return self.whole.rfind(reasoning)
        return self.whole.find(reasoning, thought)

    def without_reasoning(self, thoughts: Thoughts | None, writing: Writing, note: Note) -> str:
        """The text of an answer that has none."""
        opened = self._answers.opens(self)
        if not opened:
            text = self._rest if self._follows else self._words(thoughts)
            if _without_thought(text, thoughts) == text:
                return text
        assert thoughts is not None
        if writing.missing_reasoning != "empty":
            kind = NoReasoning if writing.missing_reasoning == "skip" else DataError
            raise kind(
                "the chat template asks the model to think, and turn "
                f"{self._number + 1} has no reasoning",
                remedy='missing_reasoning = "empty" closes the thought at once, "skip" leaves '
                "such records out",
            )
        note(NO_REASONING)
        if not opened:
            return text
        if not thoughts.written:
            return thoughts.after + self._words(thoughts)
        content = self._turn.content.strip()
        if self._follows and not (content and self._rest.lstrip().startswith(content)):
            return self._rest
        text, thought = self.probed()
        return text[thought + len(THOUGHT) :]

    def _closed(self, thoughts: Thoughts) -> bool:
        """Whether the prompt ends with a thought that is over."""
        return self.prompt.rstrip().endswith(thoughts.after.strip())

    def _words(self, thoughts: Thoughts | None) -> str:
        """The answer from its words or calls on, without any thought before them."""
        if self._follows:
            return _without_thought(self._rest, thoughts)
        start = self._start_of_words()
        shared = common(self.prompt, self.whole if start is None else self.whole[:start])
        asked = self.prompt[shared:]
        opening = "" if start is None else self.whole[shared:start]
        thoughtful = _speaks_of_thought(asked, thoughts)
        if start is not None:
            if opening.endswith(asked) and _speaks_of_thought(opening, thoughts):
                return self.whole[start:]
            if thoughtful and self.prompt.endswith(opening):
                return self.whole[start:]
            if (place := self._after_header(start)) is not None:
                return self.whole[place:]
        if not thoughtful:
            raise self._unlike()
        return _without_thought(self.whole[shared:], thoughts)

    def _after_header(self, start: int) -> int | None:
        """Where the answer begins after the mark with which the template asks for any answer.

        Templates may write what was said before otherwise once it is answered: Mistral Nemo puts
        the system prompt before the last question only, gpt-oss drops what was thought before a
        call. Apertus writes an answer after a tool's result without the mark.

        Args:
            start: of the answer's words.
        """
        header = self._answers.header
        if not header or not self.prompt.endswith(header):
            return None
        if self.prompt == self.whole[:start] + header:
            return start
        place = self.whole.rfind(header, 0, start) + len(header)
        given = self._before[-1].content.strip()
        between = self.whole[place:start]
        return None if place < len(header) or (given and holds(between, given)) else place

    def _start_of_words(self) -> int | None:
        """Where the content of the answer begins in the whole text; None if that is unknown."""
        content = self._turn.content.strip()
        if not content:
            return None
        text = self._with(replace(self._turn, content=WORDS))
        start = text.find(WORDS)
        written = start >= 0 and self.whole[:start] == text[:start]
        return start if written and self.whole[start:].lstrip().startswith(content) else None

    def _unlike(self) -> DataError:
        start = common(self.prompt, self.whole)
        return DataError(
            f"where the answer of turn {self._number + 1} begins cannot be told: the chat template "
            f"asks for it with {_shown(self.prompt[start:])} and writes it as "
            f"{_shown(self.whole[start:])}",
            remedy="set model.chat_template to a template whose generation prompt is the "
            "beginning of an answer",
        )


def _split(turn: Turn, tags: tuple[str, str]) -> Turn:
    """Reasoning between tags at the beginning of the content, as reasoning of its own."""
    opening, closing = tags
    if turn.reasoning or not turn.content.lstrip().startswith(opening):
        return turn
    reasoning, closed, words = turn.content.lstrip().removeprefix(opening).partition(closing)
    if not closed:
        return turn
    return replace(turn, content=words.strip(), reasoning=reasoning.strip())


def _blanked(turn: Turn, marks: re.Pattern[str]) -> Turn:
    """An answer with as many letters in the place of each mark that is said in it."""

    def blank(value: Any) -> Any:
        if isinstance(value, str):
            return marks.sub(lambda found: _LETTER * len(found[0]), value)
        if isinstance(value, Mapping):
            return {blank(key): blank(part) for key, part in value.items()}
        return [blank(part) for part in value] if isinstance(value, list | tuple) else value

    calls = tuple(
        replace(call, name=blank(call.name), arguments=blank(call.arguments))
        for call in turn.tool_calls
    )
    return replace(
        turn, content=blank(turn.content), reasoning=blank(turn.reasoning), tool_calls=calls
    )


def _without_thought(text: str, thoughts: Thoughts | None) -> str:
    """A text without the empty thought, or the end of one, that it begins with."""
    if thoughts is None or not thoughts.after:
        return text
    rest = text.lstrip()
    if thoughts.before and rest.startswith(thoughts.before.strip()):
        rest = rest.removeprefix(thoughts.before.strip()).lstrip()
        if not thoughts.closes(rest):
            return text
    if not thoughts.closes(rest):
        return text
    return rest.removeprefix(thoughts.after.strip()).lstrip()


def _speaks_of_thought(text: str, thoughts: Thoughts | None) -> bool:
    """Whether what a template writes beside an answer is about thinking."""
    ends = thoughts is not None and thoughts.after and thoughts.after.strip() in text
    return bool(ends or re.search("think|thought", text, re.IGNORECASE))


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}…", ensure_ascii=False)


def last_said(turn: Turn) -> str:
    """What an answer ends with: the last of its calls, or its words, or its reasoning."""
    if turn.tool_calls:
        return turn.tool_calls[-1].name
    return turn.content.strip() or turn.reasoning.strip()


def unsaid(turn: Turn, text: str) -> Iterator[str]:
    """What a template leaves out of an answer.

    What is said twice, as in words that name the tool they call, has to be there twice.
    """
    left = turn
    if not holds(text, turn.content):
        yield _words_of(turn)
        left = replace(left, content="")
    if not holds(text, turn.reasoning):
        yield "reasoning"
        left = replace(left, reasoning="")
    for call in turn.tool_calls:
        if not holds(text, call.name):
            yield "tool calls"
        elif not all(holds(text, value) for value in _leaves(call.arguments)):
            yield "arguments of tool calls"
        else:
            continue
        left = replace(left, tool_calls=())
    if lacks(text, left.content, left):
        yield _words_of(turn)
        left = replace(left, content="")
    if lacks(text, left.reasoning, left):
        yield "reasoning"
        left = replace(left, reasoning="")
    if any(lacks(text, call.name, left) for call in left.tool_calls):
        yield "tool calls"
    elif any(lacks(text, v, left) for call in left.tool_calls for v in _leaves(call.arguments)):
        yield "arguments of tool calls"


def _words_of(turn: Turn) -> str:
    return "the words beside a tool call" if turn.tool_calls else "the words of an answer"


def said_in(turn: Turn) -> Iterator[str]:
    """All texts of an answer: words, reasoning and calls."""
    yield from (turn.content, turn.reasoning)
    for call in turn.tool_calls:
        yield call.name
        yield from _leaves(call.arguments, keys=True)


def lacks(text: str, said: str, turn: Turn) -> bool:
    """Whether a text holds what is said less often than a turn says it."""
    said = said.strip()
    times = "\0".join(said_in(turn)).count(said) if said else 0
    forms = {said, *(json.dumps(said, ensure_ascii=ascii_)[1:-1] for ascii_ in (True, False))}
    return times > 1 and sum(text.count(form) for form in forms) < times


def _leaves(value: Any, *, keys: bool = False) -> Iterator[str]:
    """All texts and numbers in a JSON value; with `keys` the names of its fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if keys:
            yield from map(str, value)
        for part in value.values():
            yield from _leaves(part, keys=keys)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, keys=keys)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def holds(text: str, said: str) -> bool:
    """Whether a text holds these words, be it as a JSON string."""
    said = said.strip()
    return said in text or any(
        json.dumps(said, ensure_ascii=ascii_)[1:-1] in text for ascii_ in (True, False)
    )
