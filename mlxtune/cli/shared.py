"""What several verbs share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from mlxtune.device import run_with_blas

DTYPE = click.Choice(["float32", "float16", "bfloat16"])
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
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as train.learning_rate=1e-4.",
)


def complete_paths(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """For what may be a path and may be a name: the shell completes it as a path."""
    return [CompletionItem(begun, type="file")]


def quieten_libraries() -> None:
    """transformers is here for its tokenizers; its advice about PyTorch is for others."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def prepare() -> None:
    """What every verb that computes needs before MLX is used."""
    run_with_blas([sys.executable, "-m", "mlxtune", *sys.argv[1:]])
    quieten_libraries()
