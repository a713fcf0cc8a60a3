"""`mlxtune doctor --check`: run the checks, show each, and write the file to send."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxtune.cli.output import json_text
from mlxtune.files import require_no_file, require_writable

if TYPE_CHECKING:
    from mlxtune.selfcheck.check import Outcome

FILE = Path("mlxtune-check.json")
_SIGNS = {
    "passed": ("ok", "green"),
    "failed": ("!!", "red"),
    "left out": ("--", "yellow"),
    "not run": ("--", "yellow"),
}
_WIDTH = 36


def check_machine(path: Path, *, overwrite: bool, as_json: bool) -> bool:
    """Run all checks; returns whether none has failed.

    After Ctrl-C the file holds the checks that were done, and says so.

    Raises:
        OutputExists, StorageError: the file may not be written, told before anything is run.
        KeyboardInterrupt: after Ctrl-C, when the file is written.
    """
    require_no_file(path, overwrite)
    require_writable(path)
    click.echo(f"takes up to ten minutes, downloads nothing, writes {path}", err=True)
    from mlxtune.selfcheck.check import NOT_RUN, Outcome
    from mlxtune.selfcheck.record import (
        failed,
        record,
        verdict,
        with_memory,
        write_record,
    )
    from mlxtune.selfcheck.registry import CHECKS
    from mlxtune.selfcheck.run import run_checks

    names = [check.name for check in CHECKS]
    outcomes: list[Outcome] = []
    stopped: KeyboardInterrupt | None = None
    progress = _Progress(len(names))
    try:
        with closing(run_checks(names, begins=progress.begins)) as running:
            for outcome in running:
                outcomes.append(outcome)
                progress.clear()
                if not as_json:
                    show(outcome)
    except KeyboardInterrupt as error:
        stopped = error
        progress.clear()
        if not outcomes:
            raise  # there is nothing to keep
        rest = names[len(outcomes) :]
        outcomes += [Outcome(name, NOT_RUN, errors=("interrupted",)) for name in rest]
    outcomes = with_memory(outcomes)
    values = record(outcomes, stopped=_why(outcomes, stopped))
    # Shown before it is written: the disk may have filled up meanwhile.
    if as_json:
        click.echo(json_text(values))
    else:
        show(outcomes[-1])
        click.echo(verdict(outcomes))
    write_record(path, values, overwrite=overwrite)
    click.echo(f"{path}: written; it names no person, folder or computer", err=as_json)
    if stopped is not None:
        raise stopped
    return not failed(outcomes)


def _why(outcomes: list[Outcome], stopped: KeyboardInterrupt | None) -> str | None:
    """Why not all checks were run."""
    if stopped is not None:
        return "interrupted"
    return "out of time" if any(each.state == "not run" for each in outcomes[:-1]) else None


def show(outcome: Outcome) -> None:
    """A line of the table, and below it all that is wrong."""
    from mlxtune.selfcheck.record import line_of

    sign, colour = _SIGNS[outcome.state]
    spent = f"{outcome.seconds:6.1f} s {outcome.peak_bytes / 1e9:6.2f} GB"
    click.echo(
        f"{click.style(sign, fg=colour)} {outcome.name:<{_WIDTH}}{spent}  {line_of(outcome)}"
    )
    if outcome.state == "failed":
        for error in outcome.errors:
            click.echo("\n".join(f"     {line}" for line in error.splitlines()))
        for each in outcome.differences:
            if each.exceeds:
                click.echo(f"     {each.what}: {each.value:.2g}, and {each.allowed:g} is allowed")


class _Progress:
    """A line that says which check runs, on a terminal."""

    def __init__(self, count: int) -> None:
        self._count, self._number = count, 0
        self._shown = sys.stderr.isatty()

    def begins(self, name: str) -> None:
        """The next check is begun."""
        self._number += 1
        if self._shown:
            click.echo(f"\r\033[K[{self._number}/{self._count}] {name} …", err=True, nl=False)

    def clear(self) -> None:
        """Make place for a line."""
        if self._shown:
            click.echo("\r\033[K", err=True, nl=False)
