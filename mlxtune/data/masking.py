"""Which of a record's tokens are trained."""

from __future__ import annotations

from dataclasses import dataclass

from mlxtune.data.records import Conversation, Turn
from mlxtune.errors import DataError


class NothingTrained(DataError):
    """No token of a record carries weight."""


@dataclass(frozen=True)
class Masking:
    """Which tokens carry loss weight.

    Attributes:
        roles: whose turns are trained, unless a turn says otherwise of itself.
        train_on_inputs: everything is trained, what the template writes too, but for
            turns that say otherwise of themselves.
    """

    roles: tuple[str, ...] = ("assistant",)
    train_on_inputs: bool = False

    def trains(self, turn: Turn) -> bool:
        """Whether a turn's tokens carry weight."""
        if turn.train is not None:
            return turn.train
        return self.train_on_inputs or turn.role in self.roles

    def require_target(self, conversation: Conversation) -> None:
        """See that something in it carries weight.

        Raises:
            NothingTrained: nothing does.
            DataError: it is a preference pair.
        """
        if conversation.rejected:
            raise DataError(
                'this record is a preference pair, and objective = "sft" trains single answers',
                where=conversation.where,
                remedy='objective = "dpo" trains pairs; format = "prompt_completion" with '
                'columns = {completion = "chosen"} trains the chosen side',
            )
        if conversation.segments:
            if any(segment.train and segment.text for segment in conversation.segments):
                return
            what = "all its segments are given"
        else:
            if any(self.trains(turn) and not turn.empty for turn in conversation.turns):
                return
            what = f"it has no {' or '.join(self.roles)} turn that may be"
        raise NothingTrained(
            f"nothing in this record is trained: {what}",
            where=conversation.where,
            remedy="roles_to_train says which roles are trained, and 'train' in a message or "
            "'label' in a segment which of them; unusable = \"skip\" leaves such records out",
        )
