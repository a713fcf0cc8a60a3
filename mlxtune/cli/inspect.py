"""How `mlxtune data inspect` looks at a recipe's records, and how it shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import dropwhile, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtune.data.inspect import Bin, SharedPrefix, histogram, shared_prefix, stretches
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.tokens import Tally, record_samples, tokenize
from mlxtune.errors import DataError
from mlxtune.recipe.schema import Recipe
from mlxtune.train.corpus import rules_of, source_of
from mlxtune.train.session import tokenizer_of


@dataclass(frozen=True)
class Shown:
    """A sample as text: its tokens, and its stretches, trained or not."""

    sample: Sample
    parts: tuple[tuple[bool, str], ...]


@dataclass(frozen=True)
class Inspection:
    """All that `mlxtune data inspect` tells."""

    tallies: dict[str, Tally]
    lengths: tuple[Bin, ...]
    prefix: SharedPrefix
    max_seq_length: int
    rows: tuple[Shown, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "sources": [{"path": path} | asdict(tally) for path, tally in self.tallies.items()],
            "max_seq_length": self.max_seq_length,
            "lengths": [asdict(bin) for bin in self.lengths],
            "shared_prefix": asdict(self.prefix),
            "rows": [
                {
                    "where": shown.sample.where,
                    "record": shown.sample.record,
                    "parts": [{"trained": trained, "text": text} for trained, text in shown.parts],
                    "tokens": shown.sample.tokens.tolist(),
                    "trained": np.flatnonzero(shown.sample.weights).tolist(),
                }
                for shown in self.rows
            ],
        }


def inspect_recipe(recipe: Recipe, *, rows: int, chosen: int | None) -> Inspection:
    """Tokenize what a recipe trains on and look at it; no model is loaded.

    Args:
        recipe: checked.
        rows: show so many records, the first ones.
        chosen: show this record of the first source instead.

    Raises:
        DataError: a record is wrong, or there is none of that number.
    """
    renderer = Renderer(tokenizer_of(recipe.model))
    stores = {}
    for section in recipe.data:
        rules = rules_of(section, recipe.train.max_seq_length)
        stores[section.path] = tokenize(source_of(section), renderer, rules)
    lengths = np.concatenate([store.lengths() for store in stores.values()])
    first = recipe.data[0]
    source, rules = source_of(first), rules_of(first, recipe.train.max_seq_length)
    start, count = (0, rows) if chosen is None else (chosen - 1, 1)
    picked = list(islice(source.rows(), start, start + count))
    if chosen is not None and not picked:
        raise DataError(f"there is no record {chosen}", where=first.path)
    samples = [
        sample
        for number, row in enumerate(picked, start=start + 1)
        for sample in record_samples(source, row, number, renderer, rules, Tally())
    ]
    return Inspection(
        tallies={path: store.tally for path, store in stores.items()},
        lengths=tuple(histogram(lengths)),
        prefix=shared_prefix(max(stores.values(), key=len)),
        max_seq_length=recipe.train.max_seq_length,
        rows=tuple(
            Shown(sample, tuple((kind, renderer.decode(ids)) for kind, ids in stretches(sample)))
            for sample in samples
        ),
    )


def show(found: Inspection, *, ids: bool) -> None:
    """Rows with what is trained in colour, then the figures."""
    console = Console()
    for shown in found.rows:
        sample = shown.sample
        console.print(
            f"record {sample.record}  {sample.where}  {len(sample.tokens)} tokens, "
            f"{sample.supervised} trained",
            style="bold",
            highlight=False,
            markup=False,
        )
        console.print(_text(shown, console))
        if ids:
            console.print(_ids(sample, console))
        console.print()
    if found.rows:
        shown_as = "green" if _colours(console) else "between ⟦ and ⟧"
        console.print(f"What is {shown_as} is trained.\n", highlight=False)
    for path, tally in found.tallies.items():
        console.print(_totals(path, tally), highlight=False, markup=False)
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
    for trained, part in shown.parts:
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


def _totals(path: str, tally: Tally) -> str:
    lines = [
        path,
        f"  {tally.rows:,} records, {tally.samples:,} samples, {tally.tokens:,} tokens, "
        f"{tally.trained:,} of them trained ({tally.trained / tally.tokens:.0%}); the longest "
        f"has {tally.longest:,}",
    ]
    lines += [f"  left out: {count:,} {reason}" for reason, count in tally.dropped.items()]
    if tally.truncated:
        lines.append(f"  cut off: {tally.truncated:,}")
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
