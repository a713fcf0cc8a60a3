"""How training and evaluation look: live in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxtune.cli.curve import History
from mlxtune.train.metrics import Outline, Report

# Seconds of silence before one is told that something is being done.
_PATIENCE = 5.0


class PlainDisplay:
    """A line for each report; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._outline: Outline | None = None
        self._begun = self._started = time.monotonic()
        self._history = History()

    def tokenized(self, path: str, rows: int) -> None:
        """Say it every few seconds: large data takes minutes."""
        now = time.monotonic()
        if now - self._begun >= _PATIENCE:
            self._begun = now
            self._tell(f"tokenizing {path}: {rows:,} records")

    def referenced(self, done: int, total: int) -> None:
        """Say it every few seconds."""
        now = time.monotonic()
        if now - self._begun >= _PATIENCE:
            self._begun = now
            self._tell(
                f"log-probabilities of the model before training: {done:,} of {total:,} tokens"
            )

    def _tell(self, line: str) -> None:
        self._say(line)

    def started(self, outline: Outline) -> None:
        """Say what is about to be trained."""
        self._outline = outline
        self._begun = self._started = time.monotonic()
        for line in _describe(outline):
            self._say(line)

    def stepped(self, step: int) -> None:
        """Nothing: reports are enough."""
        self._history.step = step

    def reported(self, report: Report) -> None:
        """One line."""
        assert self._outline is not None
        self._history.losses.append(report.loss)
        left = _time_left(self._outline, report.step, time.monotonic() - self._begun)
        self._say(
            f"step {report.step}/{self._outline.total_steps}  loss {report.loss:.4f}  "
            f"{_figures(report.figures, self._outline.shown)}"
            f"lr {report.learning_rate:.2e}  {report.tokens_per_second:.0f} tok/s  "
            f"{report.examples_per_second:.2f} ex/s  {_gigabytes(report.peak_memory_bytes)}  "
            f"{left} left"
        )

    def measured(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """One line."""
        assert self._outline is not None
        if step == self._outline.first_step:
            self._begun = time.monotonic()  # what comes before the first step is no step
        self._history.held_out[step] = loss = figures["loss"]
        when = f"step {step}" if step else "before training"
        line = f"{when}  held-out loss {loss:.4f}  {_figures(figures, self._outline.shown)}"
        self._say(f"{line.rstrip()}{' (best so far)' * (best and step > 0)}")

    def saved(self, path: Path) -> None:
        """One line."""
        self._say(f"saved {path}")

    def ended(self) -> None:
        """What stays on the screen, whichever way training ended."""
        if self._outline is None:
            return
        first, total = self._outline.first_step, self._outline.total_steps
        seconds, width = time.monotonic() - self._started, self._console.width
        plain = self._console.options.ascii_only
        for line in self._history.lines(first, total, seconds, width, plain=plain):
            self._say(line)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _figures(figures: Mapping[str, float], shown: tuple[str, ...]) -> str:
    """Those of an objective's figures that a line has room for, each followed by two spaces."""
    return "".join(f"{name} {figures[name]:.3f}  " for name in shown if name in figures)


class LiveDisplay(PlainDisplay):
    """A bar and the latest figures, redrawn in place; held-out losses stay above it."""

    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live
        self._report: Report | None = None

    def _tell(self, line: str) -> None:
        self._live.update(Text(line), refresh=True)

    def stepped(self, step: int) -> None:
        """Move the bar."""
        self._history.step = step
        self._draw(step)

    def reported(self, report: Report) -> None:
        """Show the figures."""
        self._history.losses.append(report.loss)
        self._report = report
        self._draw(report.step)

    def saved(self, path: Path) -> None:
        """Nothing: the bar goes on."""

    def _draw(self, step: int) -> None:
        assert self._outline is not None
        total = self._outline.total_steps
        left = _time_left(self._outline, step, time.monotonic() - self._begun)
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total, completed=step, width=min(40, self._console.width // 3))
        head.add_row(bar, f"{step}/{total}", f"{left} left")
        figures = Text()
        if report := self._report:
            parts = {
                "loss": f"{report.loss:.4f}",
                "lr": f"{report.learning_rate:.2e}",
                "tok/s": f"{report.tokens_per_second:.0f}",
                "ex/s": f"{report.examples_per_second:.2f}",
                "peak": _gigabytes(report.peak_memory_bytes),
            }
            for name, value in parts.items():
                # A figure and its name stay on one line in a narrow terminal.
                kept = value.replace(" ", "\u00a0")
                figures.append(f"{name}\u00a0", style="dim").append(f"{kept}  ")
        self._live.update(Group(head, figures), refresh=True)


@contextmanager
def training_display() -> Iterator[PlainDisplay]:
    """The display that fits where the output goes."""
    console = Console()
    display = PlainDisplay(console)
    try:
        if not console.is_terminal:
            yield display
            return
        # Redrawn with each figure: nothing moves in between.
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield (display := LiveDisplay(console, live))
    finally:
        display.ended()  # below where the bar was


@contextmanager
def status_line(
    first: str, *, every: float = 0.0, rare: Callable[[str], bool] = lambda _: True
) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done; a function that changes it.

    Args:
        first: what it says at first, on a terminal.
        every: seconds between two changes, at least,
        rare: to lines for which this is true; the others are always shown.
    """
    console = Console(stderr=True)
    changed = time.monotonic()

    def limited(tell: Callable[[str], None]) -> Callable[[str], None]:
        def change(stage: str) -> None:
            nonlocal changed
            if not rare(stage) or time.monotonic() - changed >= every:
                changed = time.monotonic()
                tell(stage)

        return change

    if not console.is_terminal:
        yield limited(
            lambda stage: console.print(stage, highlight=False, soft_wrap=True, markup=False)
        )
        return
    with console.status(first) as status:
        yield limited(lambda stage: status.update(Text(stage)))


@contextmanager
def transfer_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar of bytes on stderr; a function that is told what is done, and how far it is.

    Where stderr is no terminal, a line for each thing that is done.
    """
    console = Console(stderr=True)
    said = ""
    if not console.is_terminal:

        def say(what: str, _done: int, _total: int) -> None:
            nonlocal said
            if what != said:
                said = what
                console.print(what, highlight=False, soft_wrap=True, markup=False)

        yield say
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            nonlocal said
            if what != said:
                said = what
                bars.reset(task, description=what)
            bars.update(task, completed=done, total=total or None)

        yield show


def _describe(outline: Outline) -> list[str]:
    share = outline.trainable / outline.parameters
    held_out = f", {outline.held_out} held out" if outline.held_out else ""
    lines = [
        *outline.plan,
        f"model    {outline.model}",
        f"device   {outline.device}, {outline.dtype}",
        f"adapter  {outline.trainable / 1e6:.2f} M of {outline.parameters / 1e6:.0f} M "
        f"parameters train ({share:.1%})",
        f"data     {outline.samples} records{held_out}, "
        f"{'packed' if outline.packed else 'padded'} batches",
        f"run      {outline.run}",
    ]
    if outline.workers > 1:
        lines.append(f"workers  {outline.workers}, each with its share of every step's records")
    lines += [f"note     {note}" for note in outline.notes]
    if outline.first_step:
        lines.append(f"resumed  at step {outline.first_step}")
    return lines


def _time_left(outline: Outline, step: int, elapsed: float) -> str:
    done = step - outline.first_step
    if done <= 0:
        return "?"
    seconds = round(elapsed / done * (outline.total_steps - step))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
