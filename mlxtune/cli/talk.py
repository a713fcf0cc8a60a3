"""A conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import mlx.core as mx

from mlxtune.cli.stops import Stopped
from mlxtune.data.records import Turn
from mlxtune.errors import ModelError
from mlxtune.evaluate.answers import stream_answer
from mlxtune.models.load import LoadedModel
from mlxtune.train.ending import ending_notes
from mlxtune.train.subject import find_subject

_HELP = """\
An empty line   starts a new conversation
/help           shows this
/exit, exit     ends the chat, as Ctrl-D does
Ctrl-C          stops an answer; at the prompt it ends the chat"""
_EXIT = ("/exit", "/quit")
# Without a slash they may be what a program asks through a pipe.
_EXIT_WORDS = ("exit", "quit")


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        loaded: the model.
        system: a system prompt; None for what the chat template has.
        max_tokens: an answer is cut off there.
        temperature: 0 for the most likely token each time.
        turns: what has been said so far.
    """

    loaded: LoadedModel
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._renderer = self.loaded.renderer()
        self.restart()

    def restart(self) -> None:
        """Forget what has been said."""
        self.turns = [] if self.system is None else [Turn("system", self.system)]

    def ask(self, question: str, say: Callable[[str], None]) -> None:
        """Answer a question; what was said of an answer that is stopped stays in the turns.

        Args:
            question: of the user.
            say: is given the answer's pieces as they come.

        Raises:
            ModelError: the chat template refuses the conversation.
            KeyboardInterrupt: the answer was stopped.
        """
        asked = [*self.turns, Turn("user", question)]
        pieces: list[str] = []
        try:
            for piece in self._pieces(asked):
                pieces.append(piece)
                say(piece)
        finally:
            if answer := "".join(pieces):
                # The thought apart: gpt-oss takes none among the words of earlier answers.
                turn = self._renderer.answers.read(answer)
                as_said = turn.content == answer.strip()
                self.turns = [*asked, Turn("assistant", answer) if as_said else turn]

    def _pieces(self, asked: list[Turn]) -> Iterator[str]:
        return stream_answer(
            self.loaded.model,
            self.loaded.tokenizer,
            self._renderer.encode(self._text(asked)),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )

    def _text(self, asked: list[Turn]) -> str:
        try:
            text = self._renderer.text(asked, ask=True)
        except ModelError:
            raise
        except Exception as error:  # Jinja templates raise whatever they like
            raise ModelError(f"the model's chat template refuses this: {error}") from None
        if self.system is not None and self.system.strip() not in text:
            raise ModelError(
                "the model's chat template leaves system prompts out", where="--system"
            )
        return text


def talk(
    model: str,
    *,
    adapter: Path | None = None,
    base: str | None = None,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
) -> None:
    """Answer one prompt, or go on until the input ends.

    Args:
        model, adapter, base: as in `find_subject`.
        prompt: the only question; without one, questions are read from the terminal.
        system: a system prompt; by default that of the run's data.
        max_tokens: an answer is cut off there.
        temperature: 0 for the most likely token each time.
        seed: of what is drawn at a higher temperature.
    """
    subject = find_subject(model, adapter=adapter, base=base)
    loaded = subject.load()
    if system is None and subject.run is not None:
        system = subject.recipe().system_prompt  # asked as it was trained
    if seed is not None:
        mx.random.seed(seed)
    chat = Chat(loaded, system, max_tokens, temperature)
    for note in ending_notes(loaded.tokenizer):
        click.echo(f"note: {note}", err=True)
    if prompt is not None:
        chat.ask(prompt, _say)
        click.echo()
        return
    if sys.stdin.isatty():
        click.echo("/help says what there is beside asking; Ctrl-D ends the chat.", err=True)
    while (line := _read()) is not None:
        if not line:
            chat.restart()
        elif line == "/help":
            click.echo(_HELP, err=True)
        else:
            _answer(chat, line)


def _answer(chat: Chat, question: str) -> None:
    try:
        chat.ask(question, _say)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped):
            raise
        click.echo(" (stopped)", nl=False)
    click.echo()


def _say(piece: str) -> None:
    click.echo(piece, nl=False)


def _read() -> str | None:
    """What is asked next; None at the end of the chat."""
    interactive = sys.stdin.isatty()
    try:
        line = input("> " if interactive else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped) or not interactive:
            raise
        click.echo()
        return None
    ends = (*_EXIT, *(_EXIT_WORDS if interactive else ()))
    return None if line.lower() in ends else line
