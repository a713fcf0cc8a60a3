"""Conversations to tokens with a loss weight each, through the model's chat template.

What is trained is found by rendering prefixes of the conversation: the text that the
template adds when an assistant turn is appended to everything before it (generation
prompt included) is exactly what the model will have to produce there. A template that
does not extend its own prefixes is refused, never masked by guess.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.data.records import Conversation, Turn
from mlxtune.errors import DataError, ModelError


@dataclass(frozen=True)
class Sample:
    """A tokenized conversation.

    Attributes:
        tokens: int32 (n,).
        weights: float32 (n,), the loss weight of each token as a target; 0 for what
            the model is given rather than trained to say.
        record: number of the record in its source, from 1.
        where: `file:line` of the record.
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    record: int
    where: str = ""

    @property
    def supervised(self) -> int:
        """How many tokens carry weight."""
        return int(np.count_nonzero(self.weights))


class Renderer:
    """Turns conversations into samples with one tokenizer and template.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or mlx-lm's wrapper around one.
        max_seq_length: the longest sample allowed, in tokens.

    Raises:
        ModelError: the tokenizer has no chat template, or gives no character offsets.
    """

    def __init__(self, tokenizer: Any, *, max_seq_length: int | None = None) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template, so conversations cannot be rendered",
                where="model.chat_template",
                remedy="name a .jinja file there, or use the instruct variant of the model",
            )
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
        self._max_seq_length = max_seq_length
        self._ends = set(tokenizer.all_special_ids)

    def text(self, turns: Sequence[Turn], *, ask: bool = False) -> str:
        """The turns as the template writes them; with `ask`, ready for an answer."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids that ask for the conversation's last answer."""
        return self.encode(self.text(conversation.prompt_turns(), ask=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; the template has put all special tokens in it."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def sample(self, conversation: Conversation, record: int = 0) -> Sample:
        """Tokens and weights of one conversation.

        Raises:
            DataError: it is longer than `max_seq_length`, the template cannot be
                rendered or does not extend its own prefixes.
        """
        where = conversation.where
        try:
            full = self.text(conversation.turns)
            spans = self._trained_spans(conversation, full)
        except DataError:
            raise
        except Exception as error:  # Jinja templates raise whatever they like
            raise DataError(
                f"the model's chat template refuses this conversation: {error}", where=where
            ) from None
        encoded = self._core.encode(full, add_special_tokens=False)
        tokens = np.asarray(encoded.ids, np.int32)
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        weights = np.zeros(len(tokens), np.float32)
        for start, end in spans:
            weights[self._tokens_of(tokens, offsets, start, end, where)] = 1
        if not weights[1:].any():
            raise DataError(
                "the chat template leaves out what was to be trained: no token of this record "
                "carries weight",
                where=where,
                remedy="set model.chat_template to a template that writes assistant turns",
            )
        if self._max_seq_length is not None and len(tokens) > self._max_seq_length:
            raise DataError(
                f"this record has {len(tokens)} tokens, more than train.max_seq_length = "
                f"{self._max_seq_length}",
                where=where,
                remedy="raise it, or shorten the record",
            )
        return Sample(tokens, weights, record, where)

    def _trained_spans(self, conversation: Conversation, full: str) -> list[tuple[int, int]]:
        spans = []
        for number, turn in enumerate(conversation.turns):
            if not turn.train:
                continue
            if number == 0:
                raise DataError(
                    "the conversation begins with its answer: nothing was asked",
                    where=conversation.where,
                    remedy="put a message of role 'user' or 'system' first",
                )
            before = self.text(conversation.turns[:number], ask=True)
            upto = self.text(conversation.turns[: number + 1])
            if not upto.startswith(before):
                raise DataError(
                    "the chat template asks for an answer in other words than it writes one "
                    f"(turn {number + 1}), so where the answer begins cannot be told",
                    where=conversation.where,
                    remedy="set model.chat_template to a template whose generation prompt is the "
                    "beginning of an assistant turn",
                )
            if not full.startswith(upto):
                raise DataError(
                    f"the chat template rewrites earlier turns, so where turn {number + 1} "
                    "begins and ends in the text cannot be told",
                    where=conversation.where,
                    remedy="split the conversation so that each record ends at its answer, or "
                    "set model.chat_template to a template that only appends",
                )
            spans.append((len(before), len(upto)))
        return spans

    def _tokens_of(
        self,
        tokens: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        start: int,
        end: int,
        where: str,
    ) -> npt.NDArray[np.int64]:
        """Indices of the tokens of one span, up to and with its end-of-turn token.

        Templates put a line break after the end of a turn. The model stops before it,
        so it is no target.
        """
        inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
        if len(inside) and offsets[inside[0], 0] < start:
            raise DataError(
                "the answer's first characters share a token with the template's text before it",
                where=where,
                remedy="remove white space from the start of the answer",
            )
        ends = [i for i in inside if int(tokens[i]) in self._ends]
        return inside[inside <= ends[-1]] if ends else inside


def render_all(renderer: Renderer, conversations: Sequence[Conversation]) -> list[Sample]:
    """Samples of all conversations, numbered from 1.

    Raises:
        DataError: as `Renderer.sample`, for the first record that cannot be rendered.
    """
    return [renderer.sample(c, record) for record, c in enumerate(conversations, start=1)]
