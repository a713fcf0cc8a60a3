"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as train.learning_rate=1e-4.",
)
