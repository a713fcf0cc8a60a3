"""An answer's scores, metric by metric."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from mlxtune.evaluate.sandbox import Sandbox
from mlxtune.evaluate.shell import (
    command_score,
    read_command,
    require_bashlex,
    same_flags,
    same_programs,
)
from mlxtune.evaluate.suite import Suite
from mlxtune.evaluate.syntax import SHELLS, parses, shell_versions
from mlxtune.evaluate.text import NORMALISATIONS, edit_similarity, exact_match, token_f1

Scores = dict[str, float | None]


class Scorer:
    """Scores answers as a suite asks.

    Every score is in [0, 1]; None where it cannot be told, which no mean counts.

    Args:
        suite: which metrics.
        box: where answers are run; None to run none.

    Raises:
        MlxtuneError: shell metrics are asked for, and bashlex is not installed.
    """

    def __init__(self, suite: Suite, box: Sandbox | None = None) -> None:
        self._suite, self._box = suite, box
        self._normalise: Callable[[str], str] = NORMALISATIONS[suite.normalise]
        if "shell" in suite.metrics:
            require_bashlex()

    def notes(self, expected: Sequence[str]) -> list[str]:
        """What cannot be measured here, and why."""
        if "shell" not in self._suite.metrics:
            return []
        notes = [
            f"{shell} is not installed, so what it parses is not measured"
            for shell in SHELLS
            if shutil.which(shell) is None
        ]
        if unread := sum(read_command(text) is None for text in expected):
            notes.append(
                f"{unread} of {len(expected)} expected commands are in syntax that bashlex "
                "does not know: they are left out of programs, flags and shell"
            )
        return notes

    def shells(self) -> dict[str, str]:
        """Shell to version, of those that say what parses; empty without shell metrics."""
        return shell_versions() if "shell" in self._suite.metrics else {}

    def score(self, answer: str, expected: str) -> Scores:
        """Metric to score."""
        scores: Scores = {}
        ours, theirs = self._normalise(answer), self._normalise(expected)
        for metric in self._suite.metrics:
            match metric:
                case "exact":
                    scores[metric] = exact_match(answer, expected)
                case "normalised":
                    scores[metric] = float(ours == theirs)
                case "f1":
                    scores[metric] = token_f1(ours, theirs)
                case "edit":
                    scores[metric] = edit_similarity(answer, expected)
                case "shell":
                    scores |= shell_scores(answer, expected)
        if self._box is not None:
            same = self._box.same_output(answer, expected)
            scores["output"] = None if same is None else float(same)
        return scores


def shell_scores(answer: str, expected: str) -> Scores:
    """Does it parse under bash and dash; same programs, same flags, how much is the same.

    An answer that bashlex cannot read says something else than an expected command that it
    can read. Nothing is said of those whose expected command it cannot read.
    """
    read = {shell: parses(answer, shell) for shell in SHELLS}
    scores: Scores = {shell: None if well is None else float(well) for shell, well in read.items()}
    theirs = read_command(expected)
    ours = read_command(answer) if theirs is not None else None
    if theirs is None or ours is None:
        none = None if theirs is None else 0.0
        return scores | dict.fromkeys(("programs", "flags", "shell"), none)
    scores["programs"] = float(same_programs(ours, theirs))
    scores["flags"] = float(same_flags(ours, theirs))
    scores["shell"] = command_score(ours, theirs)
    return scores
