"""Which changes to a recipe save memory, and which of them make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune.recipe.schema import Recipe

# Widths that MLX packs to, and what its 8-bit mode narrows to.
_NARROWER: dict[Any, tuple[Any, ...]] = {
    None: (4,), 8: (6, 5, 4), 6: (5, 4), 5: (4,), "mxfp8": ("mxfp4",),
}  # fmt: skip
_LEAST_RANK, _LEAST_LENGTH = 4, 256
# Of the peak; what saves less is not worth a line.
_WORTH = 0.01


@dataclass(frozen=True)
class Advice:
    """A change to a recipe, and what it saves.

    Attributes:
        changes: keys of the recipe to their new values.
        saves_bytes: of the peak.
        fits: whether it alone makes the recipe fit.
        why: what it costs.
    """

    changes: dict[str, Any]
    saves_bytes: int
    fits: bool
    why: str


@dataclass(frozen=True)
class Trial:
    """What a changed recipe comes to.

    Attributes:
        peak: bytes at most; of what is out of reach, those that lie there all the time.
        fits: whether the machine has them.
        out_of_reach: whether it is too much before a step begins.
        floor: bytes that lie there all the time.
    """

    peak: int
    fits: bool
    out_of_reach: bool = False
    floor: int = 0

    @property
    def size(self) -> tuple[bool, int]:
        """By which trials are compared: a peak is more than what is there all the time."""
        return self.out_of_reach, self.peak


Values = dict[str, Any]
Try = Callable[[Values], Trial]


@dataclass(frozen=True)
class _Knob:
    """What can be turned down.

    Attributes:
        levels: values of its keys, from the one that costs least to the one that saves most.
        why: what it costs.
        stops: whether records may be refused for it.
    """

    levels: Sequence[Values]
    why: str
    stops: bool = False


def advice_for(recipe: Recipe, before: Trial, tried: Try) -> tuple[Advice, ...]:
    """What each change saves by itself, most first: as little of it as fits, or all there is.

    Args:
        recipe: that does not fit.
        before: what it comes to.
        tried: what the recipe comes to with other values.
    """
    found = []
    for knob in _knobs(recipe):
        values = _turned(knob, tried)
        after = tried(values)
        saved = before.peak - after.peak
        if before.out_of_reach:  # its peak is not known, and no less is saved of it than this
            saved = before.floor - after.floor
        if after.fits or saved >= _WORTH * before.peak:
            found.append(Advice(values, saved, after.fits, knob.why))
    return tuple(sorted(found, key=lambda advice: -advice.saves_bytes))


def fitting_changes(recipe: Recipe, before: Trial, tried: Try) -> tuple[Values | None, int]:
    """Changes with which a recipe fits, none of which it could do without.

    It trains on the same records: none is refused for its length that was not before.

    Args:
        recipe: that does not fit.
        before: what it comes to.
        tried: what the recipe comes to with other values.

    Returns:
        The changes, or None where nothing makes it fit, and the peak that they come to.
    """
    knobs = [knob for knob in _knobs(recipe) if not knob.stops]
    values: dict[int, Values] = {}
    peak = before
    for number, knob in enumerate(knobs):
        # One that saves nothing yet may do so once others have been turned.
        after = tried(_together(values | {number: knob.levels[-1]}))
        if after.size <= peak.size:
            values[number], peak = knob.levels[-1], after
        if peak.fits:
            break
    else:
        return None, peak.peak
    # Each back as far as it goes, what costs most first.
    for number in reversed(list(values)):
        levels = [{}, *knobs[number].levels]

        def fits(level: Values, number: int = number) -> bool:
            return tried(_together(values | {number: level})).fits

        values[number] = _first(levels, fits)
    return _together(values), tried(_together(values)).peak


def least_values(recipe: Recipe) -> Values:
    """All changes together that save memory and refuse no record, each as far as it goes."""
    return {k: v for knob in _knobs(recipe) if not knob.stops for k, v in knob.levels[-1].items()}


def with_changes(recipe: Recipe, changes: Values) -> Recipe:
    """The recipe with other values of some keys, such as `train.batch_size`."""
    for key, value in changes.items():
        section, name = key.split(".")
        own = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: own})
    return recipe


def _turned(knob: _Knob, tried: Try) -> Values:
    """The first level with which it fits, or else the last."""
    first, *others = knob.levels
    if not others or tried(first).fits or not tried(others[-1]).fits:
        return first if tried(first).fits or not others else others[-1]
    return _first(others, lambda level: tried(level).fits)


def _first(levels: Sequence[Values], fits: Callable[[Values], bool]) -> Values:
    """The first of several levels that fits, each saving more than the one before it.

    That the last one fits is known.
    """
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(levels[middle]):
            high = middle
        else:
            low = middle + 1
    return levels[low]


def _together(values: dict[int, Values]) -> Values:
    return {key: value for each in values.values() for key, value in each.items()}


def _knobs(recipe: Recipe) -> Iterator[_Knob]:
    """What saves memory, those that cost least first."""
    train, model = recipe.train, recipe.model
    if train.gradient_checkpointing is not True:
        yield _Knob([{"train.gradient_checkpointing": True}], "steps take about a third longer")
    if batches := _smaller_batches(recipe):
        yield _Knob(batches, "the same steps in smaller passes, a little slower")
    if train.optimizer == "adamw":
        yield _Knob([{"train.optimizer": "adamw_8bit"}], "moments of a byte each")
    if model.dequantize:
        yield _Knob([{"model.dequantize": False}], "weights stay packed as their file has them")
    elif widths := _NARROWER.get(model.quantize):
        why = "QLoRA: a base of fewer bits, which loses a little"
        yield _Knob([{"model.quantize": bits} for bits in widths], why)
    if lengths := list(_halves(train.max_seq_length, _LEAST_LENGTH)):
        yield _Knob(
            [{"train.max_seq_length": length} for length in lengths],
            "longer records need truncate, or are refused",
            stops=any(source.truncate == "error" for source in recipe.data),
        )
    if ranks := list(_halves(recipe.lora.rank, _LEAST_RANK)):
        why = "less to learn with, at the same scale"
        yield _Knob([_of_rank(recipe, rank) for rank in ranks], why)


def _smaller_batches(recipe: Recipe) -> list[Values]:
    """Batches that divide a step evenly: halves, and one of a single record."""
    train, found = recipe.train, []
    size = train.batch_size
    while size > 1:
        size = size // 2 if size % 2 == 0 else 1
        times = train.gradient_accumulation_steps * train.batch_size // size
        found.append({"train.batch_size": size, "train.gradient_accumulation_steps": times})
    return found


def _of_rank(recipe: Recipe, rank: int) -> Values:
    same = recipe.lora.model_copy(update={"rank": rank}).scale / recipe.lora.scale
    return {"lora.rank": rank, "lora.alpha": round(recipe.lora.alpha / same, 6)}


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(least, value // 2)
        yield value
