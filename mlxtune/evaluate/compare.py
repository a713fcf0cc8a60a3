"""Base against tuned, on the same held-out records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlxtune.adapters.store import fitted, put_adapter, read_adapter
from mlxtune.data.records import Conversation
from mlxtune.data.render import Renderer
from mlxtune.errors import DataError, ModelError
from mlxtune.evaluate.answers import answers
from mlxtune.layers.inject import fuse_lora
from mlxtune.models.packed import enable_packs
from mlxtune.recipe.schema import EvalSection
from mlxtune.train.corpus import conversations_of, read_held_out
from mlxtune.train.heldout import held_out_loss
from mlxtune.train.model import layout_for, load_base
from mlxtune.train.run import Run, adapter_folder


@dataclass(frozen=True)
class Scores:
    """One model's figures.

    Attributes:
        held_out_loss: nats a supervised token.
        exact_match: share of answers equal to the expected one, white space around
            both removed; None where nothing was asked.
    """

    held_out_loss: float
    exact_match: float | None


@dataclass(frozen=True)
class Answered:
    """One record and what both models said."""

    prompt: str
    expected: str
    base: str
    tuned: str
    category: str


@dataclass(frozen=True)
class Comparison:
    """Base against tuned."""

    run: str
    records: int
    base: Scores
    tuned: Scores
    answers: tuple[Answered, ...]

    def by_category(self) -> dict[str, tuple[int, float, float]]:
        """Category to (records, exact match of base, of tuned)."""
        groups: dict[str, list[Answered]] = {}
        for answer in self.answers:
            groups.setdefault(answer.category, []).append(answer)
        return {
            category: (
                len(group),
                _share([a.base == a.expected for a in group]),
                _share([a.tuned == a.expected for a in group]),
            )
            for category, group in sorted(groups.items())
        }


def compare_run(
    path: Path,
    *,
    adapter: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[str], None] = lambda _stage: None,
) -> Comparison:
    """Evaluate a run's base model and its adapter on held-out records.

    Args:
        path: the run.
        adapter: another run, or an adapter's folder, to use instead of the run's own.
        data: records to use instead of the recipe's held-out ones.
        limit: use the first so many.
        max_tokens: answers are cut off there; by default a little beyond the longest
            expected one, since a longer answer is wrong however it ends.
        progress: is told what is being done.

    Raises:
        RunError: there is no finished run, or the adapter does not fit its model.
        DataError: there are no held-out records.
    """
    run = Run.open(path)
    saved = read_adapter(adapter_folder(adapter) if adapter else run.finished_adapter())
    recipe = run.recipe()
    if data is not None:  # as if the recipe named it
        section = EvalSection(path=str(data))
        recipe = recipe.model_copy(update={"eval": section})
    model = load_base(recipe.model, for_inference=True)
    saved = fitted(saved, model.model)  # before minutes are spent on the base
    renderer = Renderer(model.tokenizer)
    samples = read_held_out(recipe, renderer)
    if not samples:
        raise DataError(
            "the recipe holds no records out",
            where=str(path),
            remedy="name a file of records with --data",
        )
    held_out = conversations_of(recipe, samples)
    if limit is not None and limit < len(held_out):
        # A record may be of several samples.
        last = sorted({sample.record for sample in samples})[limit - 1]
        samples = [sample for sample in samples if sample.record <= last]
        held_out = held_out[:limit]
    # Plain text has no answer: its loss is all there is to measure.
    chats = [c for c in held_out if c.turns]
    prompts = [renderer.prompt(conversation) for conversation in chats]
    if max_tokens is None:
        max_tokens = 8 + max((len(renderer.encode(c.answer())) for c in chats), default=0)
    packing = False
    with suppress(ModelError):
        enable_packs(model.model)
        packing = True

    def score(name: str) -> tuple[Scores, list[str]]:
        progress(f"{name}: held-out loss")
        loss = held_out_loss(model.model, samples, batch_size=16, layout=layout_for(packing))
        progress(f"{name}: {len(prompts)} answers")
        if not chats:
            return Scores(loss, None), []
        said = answers(model.model, model.tokenizer, prompts, max_tokens=max_tokens)
        expected = [c.answer().strip() for c in chats]
        right = _share([a == b for a, b in zip(said, expected, strict=True)])
        return Scores(loss, right), said

    base, base_said = score("base")
    put_adapter(saved, model.model)
    model.model.eval()
    if model.dtype == "float32":
        # Nothing is lost, and an answer is a third faster without the adapters' products.
        fuse_lora(model.model)
    tuned, tuned_said = score("tuned")
    return Comparison(
        run=str(path),
        records=len(held_out),
        base=base,
        tuned=tuned,
        answers=tuple(map(_answered, chats, base_said, tuned_said)),
    )


def _answered(conversation: Conversation, base: str, tuned: str) -> Answered:
    asked = [turn.content for turn in conversation.prompt_turns() if turn.role == "user"]
    return Answered(
        prompt=asked[-1] if asked else "",
        expected=conversation.answer().strip(),
        base=base,
        tuned=tuned,
        category=str(conversation.tags.get("category", "")),
    )


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
