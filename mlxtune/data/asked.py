"""One answer as a chat template writes it, and as it asks for it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxtune.data.chat import Tools
from mlxtune.data.records import Turn
from mlxtune.data.said import holds, said_in
from mlxtune.data.thoughts import THOUGHT, WORDS, Thoughts, common
from mlxtune.data.writing import NO_REASONING, NoReasoning, Note, Writing
from mlxtune.errors import DataError

if TYPE_CHECKING:
    from mlxtune.data.answers import Answers

# Characters from which on no template has a text by chance.
_TELLING = 24


class Asked:
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
            if without_thought(text, thoughts) == text:
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
            return without_thought(self._rest, thoughts)
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
        return without_thought(self.whole[shared:], thoughts)

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


def without_thought(text: str, thoughts: Thoughts | None) -> str:
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
