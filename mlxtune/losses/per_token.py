"""Figures of each token's distribution, differentiable token by token, no logits kept.

What training needs of a model is a few numbers for each target: its cross-entropy, the entropy of
its distribution, how far that is from another one. Each of them depends on one row of logits, so
its gradient for the hidden state of that row is known as soon as the logits are. Both are made
chunk by chunk in the forward pass,

    value[t]                          float32 (m,)
    unit[t] = d value[t] / d hidden[t]        (m, width), kept

and the backward pass multiplies each unit by what comes from above. So a loss may be any function
of the values, and costs one pass over the head. Where arrays of the head are trained too, their
gradient is a sum over tokens that is not known before the backward pass: each chunk's logits are
made again there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtune.arrays import custom_gradient
from mlxtune.device import on_cpu
from mlxtune.losses.measures import CROSS_ENTROPY, Logits, Measure

# Makes random numbers the same whenever a chunk, known by its number, is computed.
Drawing = Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Chunked:
    """A head that is applied to some hidden states at a time.

    Attributes:
        head: (n, width), and what is trained of it, to (n, vocabulary), row by row. Without
            `trained` it is called with the hidden states alone.
        rows: in a chunk.
        trained: arrays of the head to differentiate for; its others are taken as constants.
        drawing: of a head that draws random numbers, such as dropout.
    """

    head: Callable[..., mx.array]
    rows: int
    trained: Sequence[mx.array] = ()
    drawing: Drawing = lambda _: nullcontext()

    def parts(self, count: int) -> list[slice]:
        """Which of `count` rows each chunk has."""
        return [slice(start, start + self.rows) for start in range(0, count, self.rows)]


def per_token(
    chunked: Chunked,
    hidden: mx.array,
    measures: Sequence[Measure],
    given: Sequence[mx.array],
    *,
    gradient: bool = True,
) -> tuple[mx.array, ...]:
    """The measures of the distribution that each hidden state predicts.

    Args:
        chunked: the head.
        hidden: (m, width) of any float type.
        measures: what is measured.
        given: arrays (m, …) that the measures take, such as targets; constants.
        gradient: whether the values will be differentiated. Without it, nothing but them is
            computed.

    Returns:
        For each measure float32 (m,). Those without a slope have no gradient.
    """
    parts = chunked.parts(hidden.shape[0])
    if not gradient:
        return _joined([v for v, _ in _forward(chunked, hidden, measures, given, parts, False)])
    keep = not chunked.trained

    def backward(primals: Any, cotangents: Any, results: Any) -> Any:
        inputs, *trained = [primals] if isinstance(primals, mx.array) else primals
        if keep:
            units = results[len(measures) :]
            sloped = [c for c, m in zip(cotangents, measures, strict=False) if m.slope]
            products = [c[:, None] * unit for c, unit in zip(sloped, units, strict=True)]
            return sum(products[1:], products[0]).astype(inputs.dtype)
        return _again(chunked, inputs, trained, measures, given, parts, cotangents)

    @custom_gradient(backward)
    def forward(hidden: mx.array, *trained: mx.array) -> tuple[mx.array, ...]:
        own = Chunked(chunked.head, chunked.rows, trained, chunked.drawing)
        made = _forward(own, hidden, measures, given, parts, keep)
        values, units = zip(*made, strict=True)
        return (*_joined(list(values)), *(_joined(list(units)) if keep else ()))

    results = forward(hidden, *chunked.trained)
    return tuple(results[: len(measures)])


def added(total: list[mx.array], more: list[mx.array]) -> list[mx.array]:
    """The sums of arrays of two chunks; those of the second where there is no first."""
    return [a + b for a, b in zip(total, more, strict=True)] if total else more


def _joined(chunks: list[tuple[mx.array, ...]]) -> tuple[mx.array, ...]:
    return tuple(mx.concatenate(list(each)) for each in zip(*chunks, strict=True))


_Made = tuple[tuple[mx.array, ...], tuple[mx.array, ...]]


def _forward(
    chunked: Chunked,
    hidden: mx.array,
    measures: Sequence[Measure],
    given: Sequence[mx.array],
    parts: list[slice],
    units: bool,
) -> list[_Made]:
    """Of each chunk the values, and with `units` the gradients of those that have a slope."""
    made: list[_Made] = []
    for number, part in enumerate(parts):
        chunk = hidden[part]
        if made:
            # Not before the last chunk is done with its logits.
            [chunk] = mx.depends([chunk], [*made[-1][0], *made[-1][1]])
        own = [array[part] for array in given]
        with chunked.drawing(number):
            made.append(_of_chunk(chunked, chunk, measures, own, units))
    return made


def _of_chunk(
    chunked: Chunked,
    hidden: mx.array,
    measures: Sequence[Measure],
    given: Sequence[mx.array],
    units: bool,
) -> _Made:
    def head(hidden: mx.array) -> mx.array:
        return chunked.head(hidden, *chunked.trained)

    if units and not on_cpu() and list(measures) == [CROSS_ENTROPY]:
        # The kernel's gradient is written over the logits; ours would take three arrays more.
        def losses(hidden: mx.array) -> mx.array:
            return mx.fast.cross_entropy(head(hidden), given[0])

        [each], [unit] = mx.vjp(losses, [hidden], [mx.ones(hidden.shape[0])])
        return (each,), (unit,)
    raw = head(hidden)
    logits = Logits(raw, sloped=units)
    values = tuple(measure.value(logits, *given) for measure in measures)
    if not units:
        return values, ()
    slopes = [measure.slope(logits, *given) for measure in measures if measure.slope]
    return values, tuple(mx.vjp(head, [hidden], [s.astype(raw.dtype)])[1][0] for s in slopes)


def _again(
    chunked: Chunked,
    hidden: mx.array,
    trained: list[mx.array],
    measures: Sequence[Measure],
    given: Sequence[mx.array],
    parts: list[slice],
    cotangents: Sequence[mx.array],
) -> list[mx.array]:
    """Gradients for the hidden states and for what is trained of the head, logits made again."""
    for_hidden: list[mx.array] = []
    for_trained: list[mx.array] = []
    for number, part in enumerate(parts):
        chunk = hidden[part]
        if for_hidden:
            [chunk] = mx.depends([chunk], [for_hidden[-1], *for_trained])
        own = [array[part] for array in given]
        with chunked.drawing(number):
            raw = chunked.head(chunk, *trained)
            logits = Logits(raw, sloped=True)
            sloped = [
                cotangent[part][:, None] * measure.slope(logits, *own)
                for cotangent, measure in zip(cotangents, measures, strict=False)
                if measure.slope
            ]
        above = sum(sloped[1:], sloped[0]).astype(raw.dtype)
        with chunked.drawing(number):
            _, [for_chunk, *more] = mx.vjp(chunked.head, [chunk, *trained], [above])
        for_hidden.append(for_chunk)
        for_trained = added(for_trained, more)
    return [mx.concatenate(for_hidden), *for_trained]
