"""Conversations to tokens with a loss weight each, through the model's chat template.

What is trained is found by rendering prefixes of the conversation: the text that the
template adds when an assistant turn is appended to everything before it (generation
prompt included) is exactly what the model will have to produce there. A template that
rewrites earlier turns, as those do that drop old reasoning, gives one sample for each
answer, each rendered as it would be asked. So `{% generation %}` marks are not needed:
they mark the rewritten form of earlier answers, which the model is never asked for, and
some mark the line break after the end of a turn. What cannot be told is refused, never
masked by guess, and so is what a template leaves out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.records import Conversation, ToolCall, Turn
from mlxtune.errors import DataError, MlxtuneError, ModelError
from mlxtune.gguf.ends import end_of_turn

Tools = Sequence[Any]
Span = tuple[int, int]

# Stands in a turn's place to find where the template would put its words.
_PROBE = "\u2042probe\u2042"


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
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    record: int
    where: str = ""
    fingerprint: int = 0

    @property
    def supervised(self) -> int:
        """How many tokens carry weight."""
        return int(np.count_nonzero(self.weights))


class _Rewritten(Exception):
    """The template writes earlier turns otherwise once others follow."""


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
        self._tokenizer = _unwrapped(tokenizer)
        self._core = core
        self.rows = rows
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        # A tokenizer names few of its special tokens; Phi's end of turn is not among them.
        added = core.get_added_tokens_decoder().items()
        self._special = {*tokenizer.all_special_ids, *(i for i, t in added if t.special)}
        if (end := end_of_turn(tokenizer)) is not None:
            self._special.add(end)  # it may have been added without being called special

    def identity(self) -> str:
        """All that decides which tokens a conversation becomes."""
        return "\n".join(
            [self._core.to_str(), str(self._tokenizer.chat_template), str(sorted(self._special))]
        )

    @property
    def has_template(self) -> bool:
        """Whether it can render turns at all; a base model's may not."""
        return bool(self._tokenizer.chat_template)

    def text(self, turns: Sequence[Turn], *, tools: Tools = (), ask: bool = False) -> str:
        """The turns as the template writes them; with `ask`, ready for an answer.

        Raises:
            ModelError: the model has no chat template.
        """
        if not self.has_template:
            raise ModelError(
                "the model has no chat template, so conversations cannot be rendered",
                where="model.chat_template",
                remedy="name a .jinja file there, or use the instruct variant of the model",
            )
        return str(
            self._tokenizer.apply_chat_template(
                [_message(turn) for turn in turns],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=ask,
            )
        )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids that ask for the conversation's last answer."""
        turns = conversation.prompt_turns()
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
        self, conversation: Conversation, record: int = 0, masking: Masking | None = None
    ) -> list[Sample]:
        """Tokens and weights of one conversation: one sample, if the template allows.

        Raises:
            NothingTrained: no token carries weight.
            DataError: the template cannot be rendered, or where a turn begins and ends
                in its text cannot be told.
            ModelError: see `text`, or a token has no row in the embedding.
        """
        masking = masking or Masking()
        where = conversation.where
        masking.require_target(conversation)
        try:
            made = list(self._parts(conversation, masking))
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
        self, conversation: Conversation, masking: Masking
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        if conversation.segments:
            yield self._segments(conversation)
            return
        turns, tools = conversation.turns, conversation.tools
        trained = [i for i, turn in enumerate(turns) if masking.trains(turn) and not turn.empty]
        try:
            yield self._whole(turns, tools, trained, masking)
        except _Rewritten as rewritten:
            if any(turns[i].role != "assistant" for i in trained) or masking.train_on_inputs:
                raise DataError(
                    f"the chat template rewrites earlier turns ({rewritten}), so where others "
                    "than the assistant's begin and end in its text cannot be told",
                    remedy="train the assistant's turns alone, or set model.chat_template to a "
                    "template that only appends",
                ) from None
            for i in trained:
                yield self._whole(turns[: i + 1], tools, [i], masking)

    def _whole(
        self, turns: Sequence[Turn], tools: Tools, trained: Sequence[int], masking: Masking
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """All turns in one sample."""
        full = self.text(turns, tools=tools)
        _require_written(turns, tools, full)
        encoded = self._core.encode(full, add_special_tokens=False)
        tokens = np.asarray(encoded.ids, np.int32)
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        weights = np.zeros(len(tokens), np.float32)
        if masking.train_on_inputs:
            weights[:] = 1
            kept = [i for i, turn in enumerate(turns) if not masking.trains(turn)]
            for span in (self._span(turns, tools, i, full) for i in kept):
                weights[_inside(offsets, *span)] = 0
            return tokens, weights
        for i in trained:
            start, end = self._span(turns, tools, i, full)
            _require_said(turns[i], i, full[start:end])
            weights[self._targets(tokens, offsets, full, start, end)] = 1
        return tokens, weights

    def _span(self, turns: Sequence[Turn], tools: Tools, number: int, full: str) -> Span:
        """Where the text of one turn begins and ends in the text of all of them."""
        last = number + 1 == len(turns)
        upto = full if last else self.text(turns[: number + 1], tools=tools)
        if not full.startswith(upto):
            # Some templates close a conversation that ends with an answer.
            upto = upto.removesuffix(str(self._tokenizer.eos_token))
        if not full.startswith(upto):
            raise _Rewritten(f"turn {number + 1}")
        turn = turns[number]
        if turn.role != "assistant":
            return self._words_of(turns, tools, number, upto), len(upto)
        if number == 0:
            raise DataError(
                "the conversation begins with its answer: nothing was asked",
                remedy="put a message of role 'user' or 'system' first",
            )
        before = self.text(turns[:number], tools=tools, ask=True)
        if upto.startswith(before):
            return len(before), len(upto)
        if not last:
            raise _Rewritten(f"turn {number + 1}")
        raise DataError(
            "the chat template asks for an answer in other words than it writes one "
            f"(turn {number + 1}), so where the answer begins cannot be told",
            remedy="set model.chat_template to a template whose generation prompt is the "
            "beginning of an assistant turn",
        )

    def _words_of(self, turns: Sequence[Turn], tools: Tools, number: int, upto: str) -> int:
        """Where the words of a turn that no prompt asks for begin, after the template's own."""
        turn = turns[number]
        probe = self.text([*turns[:number], replace(turn, content=_PROBE)], tools=tools)
        start = probe.find(_PROBE)
        as_written = (turn.content, turn.content.strip())
        if start < 0 or upto[:start] != probe[:start] or not upto.startswith(as_written, start):
            raise DataError(
                f"the chat template does not write turn {number + 1} as it stands, so its "
                "place in the text cannot be told"
            )
        return start

    def _targets(
        self,
        tokens: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        full: str,
        start: int,
        end: int,
    ) -> npt.NDArray[np.int64]:
        """Indices of the tokens of one span, up to and with its end-of-turn token.

        Templates put a line break after the end of a turn. The model stops before it,
        so it is no target.
        """
        inside = _inside(offsets, start, end)
        if len(inside) and offsets[inside[0], 0] < start:
            raise DataError(
                "the answer's first characters share a token with the template's text before it",
                remedy="remove white space from the start of the answer",
            )
        ends = [i for i in inside if int(tokens[i]) in self._special]
        if ends and not full[offsets[ends[-1], 1] : end].strip():
            inside = inside[inside <= ends[-1]]
        return inside

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


def _unwrapped(tokenizer: Any) -> Any:
    """The tokenizer in mlx-lm's wrapper, unless the wrapper renders chats in its own way."""
    inner = vars(tokenizer).get("_tokenizer")
    if vars(tokenizer).get("_chat_template") is not None:
        return tokenizer
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def _message(turn: Turn) -> dict[str, Any]:
    """A turn in the form that chat templates take."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [_call(call) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    return made if call.id is None else {"id": call.id, **made}


def _require_written(turns: Sequence[Turn], tools: Tools, full: str) -> None:
    """See that the template leaves nothing out of what the model is given."""
    for number, turn in enumerate(turns, start=1):
        if turn.role != "assistant" and not _holds(full, turn.content):
            raise DataError(
                f"the chat template leaves out turn {number}, of role {turn.role}",
                remedy="leave such turns out of the data, or set model.chat_template to a "
                "template that writes them",
            )
    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if not _holds(full, str(name)):
            raise DataError(
                "the chat template does not write tools, so the model would call what it was "
                "never told of",
                remedy="set model.chat_template to a template that knows tools",
            )


def _require_said(turn: Turn, number: int, text: str) -> None:
    """See that the template leaves nothing out of what is trained."""
    for what, said in [
        ("reasoning", turn.reasoning),
        *(("tool call", call.name) for call in turn.tool_calls),
    ]:
        if not _holds(text, said):
            raise DataError(
                f"the chat template leaves out the {what} of turn {number + 1}",
                remedy="set model.chat_template to a template that writes it, or leave it out of "
                "the data",
            )


def _holds(text: str, said: str) -> bool:
    """Whether a text holds these words, be it as a JSON string."""
    said = said.strip()
    return said in text or json.dumps(said)[1:-1] in text or _json(said) in text


def _json(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)[1:-1]


def _inside(offsets: npt.NDArray[np.int64], start: int, end: int) -> npt.NDArray[np.int64]:
    inside: npt.NDArray[np.int64]
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    return inside
