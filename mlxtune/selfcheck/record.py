"""What is written of checks: the file to send, the verdict, and a line of each."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import mlxtune
from mlxtune.files import require_no_file, write_json
from mlxtune.selfcheck.check import FAILED, LEFT_OUT, NOT_RUN, PASSED, Difference, Outcome

FORMAT = 1
MEMORY = "memory is given back"
# What a check may leave behind: tables that are kept for the next time.
_KEPT_AT_MOST = 16 << 20


def with_memory(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes, and one more: whether each check gave back the memory that it took."""
    kept = {each.name: each.kept_bytes for each in outcomes if each.state in (PASSED, FAILED)}
    errors = tuple(
        f"{name}: {size / 1e6:.0f} MB are still held after it"
        for name, size in kept.items()
        if size > _KEPT_AT_MOST
    )
    state = FAILED if errors else PASSED
    told = Outcome(MEMORY, state if kept else NOT_RUN, errors=errors, figures={"kept_bytes": kept})
    return [*outcomes, told]


def record(outcomes: Sequence[Outcome], *, stopped: str | None = None) -> dict[str, Any]:
    """All that the file holds; nothing in it says whose machine it is.

    Args:
        outcomes: of all checks, in their order.
        stopped: why not all were run, if something stopped them.
    """
    anonymous = [
        replace(
            each,
            figures=without_names(each.figures),
            errors=tuple(map(without_names, each.errors)),
        )
        for each in outcomes
    ]
    return {
        "format": FORMAT,
        "mlxtune": mlxtune.__version__,
        "day": datetime.now(UTC).date().isoformat(),
        "verdict": verdict(outcomes),
        "stopped": stopped,
        "checks": [each.as_json() for each in anonymous],
    }


def write_record(path: Path, values: dict[str, Any], *, overwrite: bool) -> None:
    """Write the file, whole or not at all.

    Raises:
        OutputExists: it is there and may not be replaced.
        StorageError: the disk refuses it.
    """
    require_no_file(path, overwrite)
    write_json(path, values)


def failed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that something is wrong with."""
    return [each for each in outcomes if each.state == FAILED]


def verdict(outcomes: Sequence[Outcome]) -> str:
    """What came of all, in a sentence."""
    wrong, count = failed(outcomes), len(outcomes)
    others = [
        f"{number} {state}"
        for state in (LEFT_OUT, NOT_RUN)
        if (number := sum(each.state == state for each in outcomes))
    ]
    aside = f" ({', '.join(others)})" if others else ""
    if wrong:
        return f"{len(wrong)} of {count} checks failed{aside}: " + "; ".join(
            each.name for each in wrong
        )
    if not others:
        return f"all {count} checks passed"
    return f"{sum(each.state == PASSED for each in outcomes)} of {count} checks passed{aside}"


def line_of(outcome: Outcome) -> str:
    """What is most worth knowing of a check, in a line."""
    if outcome.errors:
        return outcome.errors[0].splitlines()[0]
    if outcome.differences:
        worst = max(outcome.differences, key=_of_allowed)
        return f"{worst.what}: {worst.value:.1g} ({worst.allowed:g} allowed)"
    return _figures_line(outcome.figures)


def _of_allowed(difference: Difference) -> float:
    share = difference.value / difference.allowed
    return share if share == share else float("inf")


def _figures_line(figures: dict[str, Any]) -> str:
    """Of a machine its name, of steps their rate, of rates that of the best product."""
    if "findings" in figures:
        return f"{len(figures['findings'])} things looked at"
    if figures.get("same_bytes"):
        return "the bytes of NumPy"
    if "device" in figures:
        return f"{figures['device']}, {figures['memory_bytes'] / 2**30:.0f} GB"
    if "products" in figures:
        return f"products {max(figures['products'].values()) / 1e12:.2f} TFLOP/s"
    steps = [
        f"{figures[way]['tokens_per_second']:.0f} tokens/s {way}"
        for way in ("compiled", "plain")
        if way in figures
    ]
    return ", ".join(steps)


# ------------------------------------------------------------------ nothing that says whose


def without_names(value: Any) -> Any:
    """Text, or all text in a value, without names of people, machines and folders."""
    if isinstance(value, str):
        return _anonymous(value)
    if isinstance(value, dict):
        return {key: without_names(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_names(each) for each in value]
    return value


# An absolute path, whose last part alone is kept.
_PATH = re.compile(r"(?<![\w.])[~/][^\s:'\"(),]*/(?P<last>[^\s/:'\"(),]+)")
_ADDRESS = re.compile(r"(?P<scheme>https?)://\S+")


def _anonymous(text: str) -> str:
    text = _ADDRESS.sub(r"\g<scheme> address", text)
    for folder in _folders():
        text = text.replace(folder, "/…")
    text = _PATH.sub(r"…/\g<last>", text)
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "NAME", text, flags=re.IGNORECASE)
    return text


@cache
def _folders() -> tuple[str, ...]:
    """Folders that may have spaces in their names, the longest first."""
    known = [Path.home(), Path.cwd(), Path(sys.prefix), Path(mlxtune.__file__).parents[1]]
    texts = {str(path) for each in known for path in (each, each.resolve())} - {"/"}
    return tuple(sorted(texts, key=len, reverse=True))


@cache
def _names() -> tuple[str, ...]:
    """The user's and the machine's, and the parts of them that are names too."""
    host = socket.gethostname()
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # nobody of that number is known here
        user = ""
    found = {host, host.partition(".")[0], user, Path.home().name}
    return tuple(sorted(found - {"", "localhost", "root"}, key=len, reverse=True))
