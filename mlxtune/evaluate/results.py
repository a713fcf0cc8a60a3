"""An evaluation as JSON and on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlxtune
from mlxtune.evaluate.compare import Answered, Comparison
from mlxtune.files import atomic_files, write_text


def as_json(result: Comparison) -> dict[str, Any]:
    """Figures and answers."""
    return figures_json(result) | {"answers": [answer_json(a) for a in result.answers]}


def figures_json(result: Comparison) -> dict[str, Any]:
    """Figures without the answers; `base` and `tuned` in short where there are any."""
    short = {
        name: {"held_out_loss": f.held_out_loss, "exact_match": f.exact_match}
        for name, f in result.figures.items()
        if name in ("base", "tuned")
    }
    metrics = next(iter(result.figures.values())).metrics
    return {
        "version": mlxtune.__version__,
        "run": result.subject,
        "suite": result.suite,
        "records": result.records,
        **short,
        "targets": {name: asdict(figures) for name, figures in result.figures.items()},
        "categories": {
            metric: {
                category: {"records": count, **dict(zip(result.figures, means, strict=True))}
                for category, (count, *means) in result.by_category(metric).items()
            }
            for metric in metrics
        },
        "judge": result.judge,
        "notes": list(result.notes),
    }


def answer_json(answer: Answered) -> dict[str, Any]:
    """One line of the answers' file."""
    return asdict(answer)


def write_results(result: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write `<suite>.json` with the figures and `<suite>.jsonl` with every answer.

    Both appear when both are whole; what an earlier evaluation left is replaced.

    Raises:
        StorageError: the disk refuses them.
    """
    figures, answers = (folder / f"{result.suite}.{kind}" for kind in ("json", "jsonl"))
    lines = [json.dumps(answer_json(a), ensure_ascii=False) + "\n" for a in result.answers]
    with atomic_files(figures, overwrite=True) as temporary:
        # Surrogates that a model may spell have no UTF-8.
        text = "".join(lines).encode("utf-8", "replace").decode()
        write_text(temporary / answers.name, text)
        write_text(temporary / figures.name, json.dumps(figures_json(result), indent=2) + "\n")
    return figures, answers
