"""How `mlxtune data inspect` shows records."""

from __future__ import annotations

from itertools import dropwhile

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtune.data.inspect import stretches
from mlxtune.data.render import Sample
from mlxtune.data.rules import Tally
from mlxtune.train.inspection import Inspection, Shown


def show(found: Inspection, *, ids: bool) -> None:
    """Rows with what is trained in colour, then the figures."""
    console = Console()
    for shown in found.rows:
        sample = shown.sample
        side = f"  {shown.side}" if shown.side else ""
        console.print(
            f"record {sample.record}{side}  {sample.where}  {len(sample.tokens)} tokens, "
            f"{sample.supervised} trained",
            style="bold",
            highlight=False,
            markup=False,
        )
        if shown.side == "rejected":
            begins = f"… begins with the same {shown.shared} tokens as the chosen side\n"
            console.print(begins, style="dim", highlight=False, markup=False, end="")
        console.print(_text(shown, console))
        if ids:
            console.print(_ids(sample, console))
        console.print()
    for number, reason in found.left_out.items():
        console.print(f"record {number} is left out: {reason}\n", highlight=False, markup=False)
    if found.rows:
        shown_as = "green" if _colours(console) else "between ⟦ and ⟧"
        console.print(f"What is {shown_as} is trained.\n", highlight=False)
    for path, tally in found.tallies:
        console.print(_totals(path, tally, found.unit), highlight=False, markup=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print()
    console.print(_lengths(found, console))
    prefix = found.prefix
    if prefix.tokens:
        console.print(
            f"{prefix.samples:.0%} of the samples begin with the same {prefix.tokens} tokens: "
            f"{prefix.share:.0%} of all tokens, which packing computes once a batch.",
            highlight=False,
        )


def _text(shown: Shown, console: Console) -> Text:
    text = Text()
    # What both sides of a pair begin with stands with the first of them.
    parts = shown.parts[1:] if shown.side == "rejected" else shown.parts
    for trained, part in parts:
        if not trained:
            text.append(part, style="dim")
        elif _colours(console):
            text.append(part, style="bold green")
        else:
            text.append(f"⟦{part}⟧")
    return text


def _ids(sample: Sample, console: Console) -> Text:
    text = Text()
    for trained, tokens in stretches(sample):
        ids = " ".join(map(str, tokens.tolist()))
        if trained and not _colours(console):
            ids = f"⟦{ids}⟧"
        text.append(f"{ids} ", style="bold green" if trained else "dim")
    return text


def _colours(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _totals(path: str, tally: Tally, unit: str) -> str:
    lines = [
        path,
        f"  {tally.rows:,} records, {tally.samples:,} {unit}, {tally.tokens:,} tokens, "
        f"{tally.trained:,} of them trained ({tally.trained / tally.tokens:.0%}); the longest "
        f"has {tally.longest:,}",
    ]
    return "\n".join(lines)


def _lengths(found: Inspection, console: Console) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_row("tokens", "", "samples")
    most = max(bin.count for bin in found.lengths)
    room = max(10, min(50, console.width - 30))
    for bin in dropwhile(lambda bin: not bin.count, found.lengths):
        bar = "█" * round(room * bin.count / most) or ("▏" if bin.count else "")
        table.add_row(f"{bin.low}-{bin.high}", Text(bar, style="cyan"), f"{bin.count:,}")
    return table
