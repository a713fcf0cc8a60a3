"""What several verbs share."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlxtune.cli.completing import complete_set
from mlxtune.cli.suggest import NearChoice
from mlxtune.device import run_with_blas, say_blas
from mlxtune.files import cache_folder
from mlxtune.install import program


class Words(click.types.StringParamType):
    """A text for a model: bytes that the locale could not read are taken for UTF-8."""

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: Any) -> str:
        """Text without the surrogates that stand for such bytes."""
        try:
            value.encode()
        except UnicodeEncodeError:
            return os.fsencode(value).decode("utf-8", "replace")
        return str(value)


DTYPE = NearChoice(["float32", "float16", "bfloat16"])
PATH = click.Path(path_type=Path)
ADAPTER = click.option(
    "--adapter",
    type=PATH,
    help="The adapter to use on the model, or instead of the run's own: a run, RUN@step-N, or an "
    "adapter's folder as mlxtune, mlx-lm or PEFT writes it.",
)
BASE = click.option(
    "--model",
    "base",
    metavar="MODEL",
    help="The base model, where the run or the adapter no longer finds its own.",
)
KEEP_TEMPLATE = click.option(
    "--keep-template",
    is_flag=True,
    help="Leave the chat template as it was. By default it is given the values that the model "
    "was trained with, so that every program asks it as it was trained.",
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as train.learning_rate=1e-4.",
    shell_complete=complete_set,
)


def complete_paths(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """For what may be a path and may be a name: the shell completes it as a path."""
    return [CompletionItem(begun, type="file")]


def complete_presets(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """The names of presets."""
    from mlxtune.recipe.presets import presets

    found = presets().items()
    return [CompletionItem(name, help=said) for name, said in found if name.startswith(begun)]


def quieten_libraries() -> None:
    """transformers is here for its tokenizers; its advice about PyTorch is for others."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def prepare(*, long: bool = False) -> None:
    """What every verb that computes needs before MLX is used.

    Args:
        long: whether the verb may take minutes: then the BLAS matters, and is spoken of.
    """
    say = _say_blas if long else lambda _: None
    run_with_blas([sys.executable, "-m", "mlxtune", *sys.argv[1:]], say)
    quieten_libraries()


def _say_blas(blas: Path | None) -> None:
    """A slow BLAS is spoken of each time; a fast one once, which a file in the cache notes."""
    if blas is not None and not _first_time(f"blas-{blas.name}"):
        return
    say_blas(blas)


def _first_time(what: str) -> bool:
    """Whether something has not been said yet to this user; from now on it has."""
    note = cache_folder() / "said" / what
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch(exist_ok=False)
        return True
    return not note.exists()


def steps(said: dict[str, str], path: Path) -> str:
    """A line for each verb that comes next, ready to be typed.

    Args:
        said: verb to what it is for.
        path: what the verbs are called with.
    """
    commands = {f"{program()} {verb} {quote(str(path))}": why for verb, why in said.items()}
    width = max(map(len, commands))
    return "\n".join(f"  {command:<{width}}   {why}" for command, why in commands.items())
