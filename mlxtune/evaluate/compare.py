"""Models side by side, on the same records: base, tuned, and whatever was made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.adapters.store import fitted, put_adapter
from mlxtune.data.records import Conversation, Turn
from mlxtune.errors import DataError, MlxtuneError
from mlxtune.evaluate.bootstrap import Interval, mean_interval, paired_difference, ratio_interval
from mlxtune.evaluate.comparison import BASE, TUNED, Answered, Comparison, Figures, Source
from mlxtune.evaluate.judge import Judge
from mlxtune.evaluate.measure import Measured, RecordLoss, measure, read_records
from mlxtune.evaluate.sandbox import sandbox
from mlxtune.evaluate.scores import Scorer
from mlxtune.evaluate.suite import Suite, suite_of
from mlxtune.evaluate.text import bits_per_byte, perplexity
from mlxtune.layers.inject import fuse_lora
from mlxtune.models.load import LoadedModel
from mlxtune.models.resolve import resolve_model
from mlxtune.recipe.schema import DataSource, ModelSection, Recipe, TrainSection
from mlxtune.train.ending import ending_notes
from mlxtune.train.kept import held_out_rows, trained_on
from mlxtune.train.model import load_base
from mlxtune.train.outcome import adapter_name, advice_of
from mlxtune.train.run import Run
from mlxtune.train.subject import Subject, find_subject

# A model alone has no recipe that limits its records.
_NO_LIMIT = 1 << 20


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes:
        suite: what is measured; by default what the run's recipe says.
        data: a file of records instead of the suite's or the recipe's.
        limit: use the first so many records.
        max_tokens: cut answers off there, whatever the suite says.
        others: name to model, evaluated too: a folder, a file, a run, a hub id.
        execute: run answers in a sandbox and compare what they print.
        progress: is told what is being done.
    """

    suite: Suite | None = None
    data: Path | None = None
    limit: int | None = None
    max_tokens: int | None = None
    others: Mapping[str, str] | None = None
    execute: bool = False
    progress: Callable[[str], None] = lambda _stage: None

    def sources(self) -> list[DataSource]:
        """The records named; none to take those that the recipe holds out."""
        if self.data is not None:
            return [DataSource(path=str(self.data))]
        return [section.source() for section in self.suite.data] if self.suite else []


def compare_run(
    path: Path, *, adapter: Path | None = None, options: Options | None = None, **how: Any
) -> Comparison:
    """Evaluate a run's base model, its adapter, and other models on held-out records.

    Args:
        path: the run.
        adapter: another run, or an adapter's folder, to use instead of the run's own.
        options: how.
        how: fields of `Options`, to change them.

    Raises:
        RunError, DataError, ModelError, MlxtuneError: as `compare_subject`.
    """
    Run.open(path)
    return compare_subject(find_subject(str(path), adapter=adapter), options=options, **how)


def compare_models(name: str, *, options: Options | None = None, **how: Any) -> Comparison:
    """Evaluate a model alone, or beside others, on records that the options name.

    Args:
        name: a folder, a `.gguf` file, a hub id, …: what a recipe's `model.path` takes.
        options: how.
        how: fields of `Options`, to change them.

    Raises:
        DataError, ModelError, MlxtuneError: as `compare_subject`.
    """
    subject = Subject(name, ModelSection(path=name))
    return compare_subject(subject, options=options, **how)


def compare_subject(subject: Subject, *, options: Options | None = None, **how: Any) -> Comparison:
    """Evaluate a model, or a base and the adapter on it, and other models beside them.

    Args:
        subject: what is measured.
        options: how.
        how: fields of `Options`, to change them.

    Raises:
        RunError: the adapter is damaged, or does not fit its model.
        DataError: there are no held-out records.
        ModelError: another model cannot be found. One that cannot be loaded is left out,
            and told in the notes.
        MlxtuneError: a metric needs what is not installed.
    """
    options = replace(options or Options(), **how)
    saved = subject.saved() if subject.adapter is not None else None
    subject.require_base()
    if subject.run is None:
        resolve_model(subject.model.path, revision=subject.model.revision)
    sources = _sources(subject, options)
    recipe = _recipe(subject, sources)

    def models() -> Iterator[tuple[str, LoadedModel]]:
        model = load_base(recipe.model, for_inference=True)
        if saved is None:
            yield "model", model
            return
        fitting = fitted(saved, model.model)  # before minutes are spent on the base
        yield BASE, model
        put_adapter(fitting, model.model)
        model.model.eval()
        if model.dtype == "float32":
            # Nothing is lost, and an answer is a third faster without the adapters' products.
            fuse_lora(model.model)
        yield TUNED, model

    compared = _compare(subject, recipe, models, options, sources)
    if subject.adapter is None:
        return compared
    advice = advice_of(subject.run) if subject.run is not None and subject.own else None
    return replace(
        compared,
        source=replace(compared.source, tuned=adapter_name(subject.adapter)),
        notes=(*compared.notes, *([advice] if advice else [])),
    )


def _sources(subject: Subject, options: Options) -> list[DataSource]:
    """The records to measure on: those that the options name, else those that a run held out."""
    suite = suite_of(subject.recipe(), options.suite) if subject.run is not None else options.suite
    if sources := replace(options, suite=suite).sources():
        return sources
    if subject.run is not None:
        if (kept := held_out_rows(subject.run)) is not None:
            return [DataSource(path=str(kept))]
        what, remedy = "this run holds no records out", "name a file of records with --data"
    else:
        what = "a model alone has no held-out records"
        if subject.adapter is not None:
            what = "an adapter that is no run's has no held-out records"
        remedy = "name a file of records with --data, or a suite that has some with --suite"
    raise DataError(what, where=subject.name, remedy=remedy)


def _recipe(subject: Subject, sources: Sequence[DataSource]) -> Recipe:
    """What says how records are measured."""
    if subject.run is not None:
        return subject.recipe()
    return Recipe(
        name="eval",
        model=subject.model,
        data=tuple(sources),
        train=TrainSection(max_seq_length=_NO_LIMIT),
    )


Models = Callable[[], Iterator[tuple[str, LoadedModel]]]


def _compare(
    subject: Subject,
    recipe: Recipe,
    models: Models,
    options: Options,
    sources: Sequence[DataSource],
) -> Comparison:
    suite, others = suite_of(recipe, options.suite), options.others or {}
    options = replace(options, suite=suite)
    for model in others.values():
        beside = find_subject(model)  # before minutes are spent on the first
        if beside.run is None:
            resolve_model(beside.model.path, revision=beside.model.revision)
    judge = Judge(suite.judge, progress=options.progress) if suite.judge is not None else None
    with sandbox() if options.execute else nullcontext() as box:
        scorer = Scorer(suite, box)
        several = _Several(recipe, suite, options, sources)
        for name, loaded in models():
            several.add(name, loaded)
            del loaded  # two models at once may not fit
            mx.clear_cache()
        for name, model in others.items():
            several.try_to_add(name, model)
            mx.clear_cache()
        measured, conversations = several.measured, several.shared()
        answered = [
            _answered(number, c, {k: m.answers[number] for k, m in measured.items()}, scorer)
            for number, c in conversations.items()
            if c.turns
        ]
    notes = _trained_note(subject.run, conversations) + several.notes
    notes += scorer.notes([answer.expected for answer in answered])
    if judge is not None:
        for answer in answered:
            for name, said in answer.said.items():
                answer.scores[name]["judge"] = judge.grade(
                    answer.messages, answer.expected, said, tools=answer.tools
                )
        notes += judge.notes()
    figures = _figures(measured, list(conversations), answered)
    notes += [
        f"the loss of {name} is no number: the model is damaged, or its type too narrow for it"
        for name, of_model in figures.items()
        if not math.isfinite(of_model.held_out_loss)
    ]
    return Comparison(
        subject=subject.name,
        suite=suite.name,
        records=len(conversations),
        figures=figures,
        answers=tuple(answered),
        notes=tuple(notes),
        judge=judge.report() if judge is not None else None,
        shells=scorer.shells(),
        source=Source(
            tuple(source.path for source in options.sources()),
            own=options.data is None,
            limit=options.limit if several.limited else None,
            max_tokens=options.max_tokens,
            adapter=subject.adapter_name,
            models=dict(others),
            executed=options.execute,
        ),
    )


def _trained_note(run: Run | None, conversations: Mapping[int, Conversation]) -> list[str]:
    """Figures of records that were trained on say nothing about new ones."""
    count = trained_on(run, conversations.values()) if run is not None else 0
    if not count:
        return []
    return [f"{count} of the {len(conversations)} records were also trained on"]


class _Several:
    """Models measured one after the other, so that one is in memory at a time."""

    def __init__(
        self, recipe: Recipe, suite: Suite, options: Options, sources: Sequence[DataSource]
    ) -> None:
        self._recipe, self._sources = recipe, sources
        self._suite, self._options = suite, options
        self._records: dict[int, Conversation] | None = None
        self.limited = False
        self.measured: dict[str, Measured] = {}
        self.notes: list[str] = []

    def shared(self) -> dict[int, Conversation]:
        """Number to record, of those that all models were measured on."""
        return self._records or {}

    def add(self, name: str, loaded: LoadedModel) -> None:
        """Measure a model on the records that those before it were measured on.

        A tokenizer decides which records are too long, or have nothing to train: those that
        one model lacks are left out for all.
        """
        options, before = self._options, self._records
        renderer = loaded.renderer()
        records = read_records(self._recipe, self._sources, renderer)
        if before is None:
            whole, records = len(records.conversations), records.first(options.limit)
            self.limited = len(records.conversations) < whole
            self.notes += ending_notes(loaded.tokenizer)
        else:
            records = records.only(before)
        if not records.conversations:
            raise DataError("none of the records is left in its tokens", where=name)
        suite = self._suite
        self.measured[name] = measure(
            loaded,
            renderer,
            records,
            max_tokens=options.max_tokens or suite.max_tokens,
            general_text=Path(suite.general_text) if suite.general_text else None,
            progress=partial(_tell, options.progress, name),
        )
        if before is not None and len(records.conversations) < len(before):
            lost = len(before) - len(records.conversations)
            self.notes.append(
                f"{lost} of {len(before)} records are left out: in the tokens of {name} they "
                "are too long, or nothing of them is trained"
            )
        self._records = records.conversations

    def try_to_add(self, name: str, model: str) -> None:
        """A model beside the others, whose figures do not go with it if it fails."""
        try:
            self.add(name, find_subject(model).load())
        except (MlxtuneError, OSError, RuntimeError, ValueError) as error:
            # What reading a damaged file, or a model too large, ends in.
            reason = error.what if isinstance(error, MlxtuneError) else str(error)
            text = " ".join(reason.split())[:300]
            self.notes.append(f"{name} is missing: {model} cannot be measured: {text}")


def _tell(progress: Callable[[str], None], name: str, stage: str) -> None:
    progress(f"{name}: {stage}")


def _answered(
    number: int, conversation: Conversation, said: dict[str, str], scorer: Scorer
) -> Answered:
    turns = conversation.prompt_turns()
    asked = [turn.content for turn in turns if turn.role == "user"]
    expected = conversation.answer().strip()
    return Answered(
        record=number,
        prompt=asked[-1] if asked else "",
        messages=tuple(map(_message, turns)),
        tools=conversation.tools,
        expected=expected,
        category=str(conversation.tags.get("category", "")),
        said=said,
        scores={name: scorer.score(answer, expected) for name, answer in said.items()},
    )


def _message(turn: Turn) -> dict[str, Any]:
    """A turn with what it holds, as OpenAI's API names it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in turn.tool_calls
        ]
    return message | ({"name": turn.name} if turn.name is not None else {})


def _figures(
    measured: Mapping[str, Measured], numbers: Sequence[int], answered: Sequence[Answered]
) -> dict[str, Figures]:
    first = next(iter(measured))
    names = list(answered[0].scores[first]) if answered else []

    def values(model: str, metric: str) -> list[float | None]:
        return [answer.scores[model][metric] for answer in answered]

    figures = {}
    for name, m in measured.items():
        losses = [m.losses[number] for number in numbers]
        whole = sum(losses, RecordLoss())
        loss = whole.total / whole.weight
        scores = {metric: values(name, metric) for metric in names}
        kept = {k: [v for v in some if v is not None] for k, some in scores.items()}
        gains = {k: paired_difference(values(first, k), scores[k]) for k in names}
        figures[name] = Figures(
            held_out_loss=loss,
            loss_interval=ratio_interval([r.total for r in losses], [r.weight for r in losses]),
            perplexity=perplexity(loss),
            bits_per_byte=bits_per_byte(loss, whole.tokens, whole.size),
            tokens=whole.tokens,
            general_loss=m.general_loss,
            metrics={k: mean_interval(v) for k, v in kept.items()}
            | _preferences(m, measured[first], numbers),
            gains={} if name == first else gains,
        )
    return figures


def _preferences(
    measured: Measured, base: Measured, numbers: Sequence[int]
) -> dict[str, Interval | None]:
    """How often a model prefers the chosen side of a pair; nothing where there are no pairs.

    `chosen_likelier` is of the model by itself, `preference` of its log-ratio to the base.
    """
    if not measured.margins:
        return {}
    own = [measured.margins[number] for number in numbers]
    apart = [margin - base.margins[n] for margin, n in zip(own, numbers, strict=True)]
    return {
        "chosen_likelier": mean_interval([float(margin > 0) for margin in own]),
        "preference": None if measured is base else mean_interval([float(m > 0) for m in apart]),
    }
