"""What the model is asked, and what it has to write: the prompt and the answer of one turn.

The prompt is what a server sends: the turns before, with the template's generation prompt. The
answer is what follows it in the rendered conversation. Most templates begin an answer with their
generation prompt, so that the answer is what comes after it. Others ask for more than they write
of a finished answer: they open a thought, and write no reasoning of past answers; or they write
an empty thought, so that the model does not think. Then the answer is put together: reasoning,
the tag after it, and the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mlxtune.data.asked import Asked, without_thought
from mlxtune.data.chat import INLINE_TAGS, ChatTemplate, Tools, inlined
from mlxtune.data.records import Turn
from mlxtune.data.said import blanked, holds, last_said, said_in
from mlxtune.data.thoughts import (
    QUESTION,
    THOUGHT,
    WORDS,
    Thoughts,
    find_thoughts,
    first_mark,
    last_mark,
)
from mlxtune.data.writing import Note, Writing
from mlxtune.errors import DataError


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
        asked = Asked(self, turns, number, tools, whole)
        if turns[number].reasoning and self.thoughts is not None:
            text = asked.with_reasoning(self.thoughts)
        else:
            text = asked.without_reasoning(self.thoughts, writing, note)
        turn = turns[number]
        blank = turn if marks is None else blanked(turn, marks)
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
        return without_thought(before, self.thoughts).strip(), after.strip()

    def opens(self, asked: Asked) -> bool:
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


def _split(turn: Turn, tags: tuple[str, str]) -> Turn:
    """Reasoning between tags at the beginning of the content, as reasoning of its own."""
    opening, closing = tags
    if turn.reasoning or not turn.content.lstrip().startswith(opening):
        return turn
    reasoning, closed, words = turn.content.lstrip().removeprefix(opening).partition(closing)
    if not closed:
        return turn
    return replace(turn, content=words.strip(), reasoning=reasoning.strip())
