"""Conversations to tokens with a loss weight each, through the model's chat template.

What is trained of an answer is what the model has to write after the prompt that a server sends
(`data.answers`), up to and with the token at which generation stops. Its tokens are those of the
answer alone, after the prompt's own: that is how they are generated. Where the tokens of the whole
conversation agree with all its answers, it is one sample. Where they do not, as with templates
that leave out the reasoning of earlier turns, each answer is a sample of its own. So
`{% generation %}` marks are not needed: they mark the rewritten form of earlier answers, which the
model is never asked for, and some mark the line break after the end of a turn. What cannot be
told is refused, never masked by guess.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.data.answer_tokens import (
    AnswerTokenizer,
    Weighted,
    apart,
    refuse_or_note,
    rewrites,
    weights_of,
)
from mlxtune.data.answers import Answer, Answers
from mlxtune.data.chat import INLINE_TAGS, ChatTemplate, Tools
from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.records import Conversation, Turn
from mlxtune.data.thoughts import TAG, WORDS
from mlxtune.data.writing import Note, Writing
from mlxtune.errors import DataError, MlxtuneError, ModelError
from mlxtune.gguf.ends import end_of_call, end_of_turn, stop_tokens

Span = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A tokenized conversation.

    Attributes:
        tokens: int32 (n,).
        weights: float32 (n,), the loss weight of each token as a target; 0 for what
            the model is given rather than trained to say.
        record: number of the record in its source, from 1.
        where: `file:line` of the record.
        fingerprint: of the record, see `Conversation.fingerprint`.
        side: which sample of its group it is, from 0; see `groups`.
        references: float32 (n,), the log-probability of each trained token under the model that
            an objective compares with; None where there is no such model.
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    record: int
    where: str = ""
    fingerprint: int = 0
    side: int = 0
    references: npt.NDArray[np.float32] | None = None

    @property
    def supervised(self) -> int:
        """How many tokens carry weight."""
        return int(np.count_nonzero(self.weights))


class Renderer:
    """Turns conversations into samples with one tokenizer and template.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or mlx-lm's wrapper around one.
        rows: of the embedding of the model that the tokens are for; None if unknown. A
            tokenizer may have tokens beyond them, as Gemma 3's does, which no text may use.

    Raises:
        ModelError: the tokenizer gives no character offsets.
    """

    def __init__(self, tokenizer: Any, *, rows: int | None = None) -> None:
        # The Rust core of a fast tokenizer gives ids and offsets in one call.
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise ModelError(
                "the model's tokenizer is not a fast one: it gives no character offsets",
                remedy="use a copy of the model that has tokenizer.json",
            )
        if core.truncation or core.padding:
            # Settings saved with a tokenizer that would cut records or fill them up.
            core = copy.deepcopy(core)
            core.no_truncation()
            core.no_padding()
        self._tokenizer = tokenizer
        self._core = core
        self.rows = rows
        self.answers = Answers(ChatTemplate(tokenizer))
        self._last: tuple[str, Any] | None = None
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        # A tokenizer names few of its special tokens; Phi's end of turn is not among them.
        added = core.get_added_tokens_decoder().items()
        self._special = {*tokenizer.all_special_ids, *(i for i, t in added if t.special)}
        self._end = end_of_turn(tokenizer)
        self._stops = stop_tokens(tokenizer)
        if self._end is not None:
            # It may have been added without being called special.
            self._special.add(self._end)
            self._stops.add(self._end)

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer writes a space before every text, as SentencePiece's do."""
        return str(self._core.encode("a", add_special_tokens=False).tokens[0]).startswith("\u2581")

    @cached_property
    def _end_of_call(self) -> int | None:
        return end_of_call(self._tokenizer)

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """What ends an answer, or a thought, if it stands in what is said."""
        thoughts = self.answers.thoughts
        around = "" if thoughts is None else f"{thoughts.before} {thoughts.after}"
        tags = {*INLINE_TAGS, *TAG.findall(around)}
        ends = {str(self._core.id_to_token(number)) for number in self._stops}
        named = sorted(tags | ends, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, named)))

    def identity(self) -> str:
        """All that decides which tokens a conversation becomes."""
        return "\n".join(
            [
                self._core.to_str(),
                self.answers.template.source,
                str(sorted(self._special)),
                str(sorted(self._stops)),
            ]
        )

    @property
    def has_template(self) -> bool:
        """Whether it can render turns at all; a base model's may not."""
        return bool(self.answers.template.source)

    def text(self, turns: Sequence[Turn], *, tools: Tools = (), ask: bool = False) -> str:
        """The turns as the template writes them; with `ask`, ready for an answer.

        Raises:
            ModelError: the model has no chat template.
        """
        return self.answers.text(turns, tools=tools, ask=ask)

    def prompt(self, conversation: Conversation, writing: Writing | None = None) -> list[int]:
        """Token ids that ask for the conversation's last answer."""
        turns = self.answers.prepared(
            conversation.prompt_turns(), writing or Writing(reasoning="drop")
        )
        return self.encode(self.text(turns, tools=conversation.tools, ask=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; the template has put all special tokens in it.

        Raises:
            ModelError: one of them has no row in the embedding.
        """
        ids = list(self._core.encode(text, add_special_tokens=False).ids)
        self.require_rows(ids)
        return ids

    def require_rows(self, tokens: Sequence[int] | npt.NDArray[np.int32], where: str = "") -> None:
        """See that each token has a row in the embedding.

        Raises:
            ModelError: one has none; MLX would read whatever lies behind the last row.
        """
        largest = int(np.max(tokens, initial=0))
        if self.rows is not None and largest >= self.rows:
            raise ModelError(
                f"the token {self._core.id_to_token(largest)!r} has the id {largest}, and the "
                f"model's embedding has {self.rows} rows: it was not resized when tokens were "
                "added",
                where=where or None,
                remedy="resize it in transformers, model.resize_token_embeddings(len(tokenizer)), "
                "and save the model anew",
            )

    def decode(self, tokens: Iterable[int], *, special: bool = True) -> str:
        """The text of tokens; with `special` that of special ones too."""
        return str(self._core.decode([int(t) for t in tokens], skip_special_tokens=not special))

    def samples(
        self,
        conversation: Conversation,
        record: int = 0,
        masking: Masking | None = None,
        writing: Writing | None = None,
        note: Note = lambda _: None,
    ) -> list[Sample]:
        """Tokens and weights of one conversation: one sample, if the template allows.

        Args:
            conversation: a record.
            record: its number.
            masking: which tokens carry weight; those of answers by default.
            writing: what becomes of what the template has no place for.
            note: is given remarks on the record, the same words for all that are alike.

        Raises:
            NothingTrained: no token carries weight.
            NoReasoning: see `Writing.missing_reasoning`.
            DataError: the template cannot be rendered, leaves something out, or where a turn
                begins and ends in its text cannot be told.
            ModelError: see `text`, or a token has no row in the embedding.
        """
        masking, writing = masking or Masking(), writing or Writing()
        where = conversation.where
        masking.require_target(conversation)
        try:
            made = list(self._parts(conversation, masking, writing, note))
        except MlxtuneError as error:
            if error.where or not isinstance(error, DataError):
                raise
            raise type(error)(error.what, where=where, remedy=error.remedy) from None
        except Exception as error:  # Jinja templates raise whatever they like
            raise DataError(
                f"the model's chat template refuses this conversation: {error}", where=where
            ) from None
        for tokens, weights in made:
            self.require_rows(tokens, where)
            if len(tokens) > 1 and self._bos is not None and (tokens[:2] == self._bos).all():
                raise DataError(
                    "this record begins with two tokens that mean the beginning of a text",
                    where=where,
                    remedy="the template or the tokenizer puts one there: leave it out of the data",
                )
            if not weights[1:].any():
                raise NothingTrained(
                    "the chat template leaves out what was to be trained: no token of this "
                    "record carries weight",
                    where=where,
                    remedy="set model.chat_template to a template that writes these turns",
                )
        said = conversation.fingerprint()
        return [Sample(tokens, weights, record, where, said) for tokens, weights in made]

    def _parts(
        self, conversation: Conversation, masking: Masking, writing: Writing, note: Note
    ) -> Iterator[Weighted]:
        if conversation.segments:
            yield self._segments(conversation)
            return
        turns, tools = self.answers.prepared(conversation.turns, writing), conversation.tools
        full = self.text(turns, tools=tools)
        written = {len(turns): full}
        trained = [i for i, turn in enumerate(turns) if masking.trains(turn) and not turn.empty]
        others = [i for i in trained if turns[i].role != "assistant"]
        if others or masking.train_on_inputs:
            missing = self.answers.left_out(turns, tools, full, ask=False)
            refuse_or_note(missing, "this record", writing, note)
        if masking.train_on_inputs:
            kept = [i for i, turn in enumerate(turns) if not masking.trains(turn)]
            yield self._all_but(turns, tools, kept, full, writing)
            return
        tell = AnswerTokenizer(self, turns, tools, writing, note, written)
        told = [tell(i) for i in trained if turns[i].role == "assistant"]
        encoded = self._encoded(full)
        tokens = np.asarray(encoded.ids, np.int32)
        weights = weights_of(encoded.ids, told)
        if weights is None and others:
            raise rewrites()
        if weights is None:
            yield from apart(told)
            return
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        for number in others:
            start, end = self._span(turns, tools, number, full)
            weights[self._ended(encoded.ids, offsets, full, start, end)] = 1
        yield tokens, weights

    def _all_but(
        self,
        turns: Sequence[Turn],
        tools: Tools,
        kept: Sequence[int],
        full: str,
        writing: Writing,
    ) -> Weighted:
        """All turns in one sample in which everything is trained but these turns."""
        encoded = self._core.encode(full, add_special_tokens=False)
        tokens = np.asarray(encoded.ids, np.int32)
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        weights = np.ones(len(tokens), np.float32)
        tell = AnswerTokenizer(self, turns, tools, writing, lambda _: None, {len(turns): full})
        for number in kept:
            if turns[number].role == "assistant":
                answered = weights_of(encoded.ids, [tell(number)])
                if answered is None:
                    raise rewrites()
                weights[answered > 0] = 0
            else:
                weights[_inside(offsets, *self._span(turns, tools, number, full))] = 0
        return tokens, weights

    def _span(self, turns: Sequence[Turn], tools: Tools, number: int, full: str) -> Span:
        """Where a turn that no prompt asks for begins and ends in the text of all of them."""
        upto = full
        if number + 1 < len(turns):
            upto = self.text(turns[: number + 1], tools=tools)
        if not full.startswith(upto):
            # Some templates close a conversation that ends with an answer.
            upto = upto.removesuffix(str(self._tokenizer.eos_token))
        if not full.startswith(upto):
            raise rewrites()
        turn = turns[number]
        probe = self.text([*turns[:number], replace(turn, content=WORDS)], tools=tools)
        start = probe.find(WORDS)
        as_written = (turn.content, turn.content.strip())
        if start < 0 or upto[:start] != probe[:start] or not upto.startswith(as_written, start):
            raise DataError(
                f"the chat template does not write turn {number + 1} as it stands, so its "
                "place in the text cannot be told"
            )
        return start, len(upto)

    def _ended(
        self,
        tokens: Sequence[int],
        offsets: npt.NDArray[np.int64],
        full: str,
        start: int,
        end: int,
    ) -> npt.NDArray[np.int64]:
        """Indices of the tokens of a span, up to and with its end: no line break after it."""
        inside = _inside(offsets, start, end)
        ends = [i for i in inside if tokens[i] in self._special]
        if ends and not full[offsets[ends[-1], 1] : end].strip():
            inside = inside[inside <= ends[-1]]
        return inside

    def answered(self, answer: Answer, *, calls: bool) -> tuple[list[int], list[int], list[int]]:
        """Tokens of a prompt, of the answer with its end, and of the text of both.

        The answer's tokens are those that it has alone where they would share one with the
        prompt's text.

        Args:
            answer: its prompt and its text.
            calls: whether it calls tools.
        """
        whole = self._encoded(answer.prompt + answer.text)
        prompt = self._begins(whole, answer.prompt)
        skipped, ids, offsets = len(answer.prompt), whole.ids, whole.offsets
        if ids[: len(prompt)] == prompt:
            ids, offsets = ids[len(prompt) :], offsets[len(prompt) :]
        else:
            # A line break before it: some tokenizers write a space before a text.
            lead = "\n" if self._adds_space else ""
            alone = self._core.encode(lead + answer.text, add_special_tokens=False)
            first = next(
                (i for i, (start, _) in enumerate(alone.offsets) if start >= len(lead)), len(alone)
            )
            skipped, ids, offsets = len(lead), alone.ids[first:], alone.offsets[first:]
        spans = [(start - skipped, end - skipped) for start, end in offsets]
        return prompt, self._with_end(answer, ids, spans, calls), whole.ids

    def _encoded(self, text: str) -> Any:
        """A text in tokens, with their places; the last text is not encoded twice."""
        if self._last is None or self._last[0] != text:
            self._last = text, self._core.encode(text, add_special_tokens=False)
        return self._last[1]

    def _begins(self, whole: Any, prompt: str) -> list[int]:
        """The tokens that a prompt has alone, of which those of a longer text are known.

        Text after a special token is tokenized apart from what is before it, so only what
        follows the last one in the prompt is tokenized again.
        """
        ids, offsets = whole.ids, whole.offsets
        count = bisect_left(offsets, (len(prompt), 0))
        last = next((i for i in range(count - 1, -1, -1) if ids[i] in self._special), None)
        if last is not None and not self._adds_space and offsets[last][1] <= len(prompt):
            rest = self._core.encode(prompt[offsets[last][1] :], add_special_tokens=False).ids
            if rest == ids[last + 1 : count]:
                begin: list[int] = ids[:count]
                return begin
        alone: list[int] = self._core.encode(prompt, add_special_tokens=False).ids
        return alone

    def _with_end(
        self, answer: Answer, ids: list[int], spans: list[Span], calls: bool
    ) -> list[int]:
        """The tokens of an answer up to and with the first at which generation stops.

        Where the template writes none, the one that it writes before the next turn.
        """
        words = answer.plain
        for number, (start, end) in zip(ids, spans, strict=True):
            if number in self._special:  # words are not looked for in the names of marks
                words = words[:start] + "\0" * (end - start) + words[end:]
        places = (text.rfind(answer.said) for text in (words, answer.plain))
        over = next((place + len(answer.said) for place in places if place >= 0), 0)
        for index, (number, (start, end)) in enumerate(zip(ids, spans, strict=True)):
            said = answer.plain[start:end] != answer.text[start:end]
            if number in self._stops and end > over and not said:
                return ids[: index + 1]
        between = self._end_of_call if calls else None
        mark = self._end if between is None else between
        return ids if mark is None else [*ids, mark]

    def _segments(
        self, conversation: Conversation
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Segments tokenized one by one: no token lies across their borders."""
        tokens: list[int] = []
        weights: list[float] = []
        for segment in conversation.segments:
            ids = self._core.encode(segment.text, add_special_tokens=conversation.closed).ids
            tokens += ids
            weights += [float(segment.train)] * len(ids)
        if conversation.closed and self._eos is not None and tokens[-1] != self._eos:
            tokens.append(self._eos)
            weights.append(1.0)
        return np.asarray(tokens, np.int32), np.asarray(weights, np.float32)


def _inside(offsets: npt.NDArray[np.int64], start: int, end: int) -> npt.NDArray[np.int64]:
    inside: npt.NDArray[np.int64]
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    return inside
