"""A conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.evaluate.answers import stream_answer
from mlxtune.models.load import LoadedModel
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import load_base
from mlxtune.train.run import STATUS
from mlxtune.train.session import open_run


def talk(model: str, *, prompt: str | None, max_tokens: int) -> None:
    """Answer one prompt, or go on until the input ends.

    Args:
        model: a run's folder, or anything that `[model] path` takes.
        prompt: the only question; without one, questions are read from the terminal.
        max_tokens: an answer is cut off there.
    """
    loaded = _load(model)
    renderer = loaded.renderer()
    turns: list[Turn] = []
    if prompt is not None:
        _answer(loaded, renderer, [Turn("user", prompt)], max_tokens)
        return
    if sys.stdin.isatty():
        click.echo("Ctrl-D ends it, an empty line starts a new conversation.", err=True)
    while (line := _read()) is not None:
        if not line:
            turns = []
            continue
        turns.append(Turn("user", line))
        turns.append(Turn("assistant", _answer(loaded, renderer, turns, max_tokens)))


def _load(model: str) -> LoadedModel:
    path = Path(model).expanduser()
    if (path / STATUS).is_file():
        return open_run(path)[1]
    return load_base(ModelSection(path=model), for_inference=True)


def _answer(loaded: LoadedModel, renderer: Renderer, turns: list[Turn], max_tokens: int) -> str:
    prompt = renderer.encode(renderer.text(turns, ask=True))
    pieces = []
    for piece in stream_answer(loaded.model, loaded.tokenizer, prompt, max_tokens=max_tokens):
        pieces.append(piece)
        click.echo(piece, nl=False)
    click.echo()
    return "".join(pieces)


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
