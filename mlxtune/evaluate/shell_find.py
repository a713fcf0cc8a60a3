"""The expression of `find`: tests, which may change places, between words that hold theirs.

`find . -name x -delete` deletes what is called x; `find . -delete -name x` deletes
everything. So what stands before an action or an operator belongs before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS = {"-o", "(", ")", ","}
_SPELLINGS = {"-not": "!", "-or": "-o", "-and": "-a"}
# What follows one of them, up to `;` or `{} +`, is a command.
_RUNS = {"-exec", "-execdir", "-ok", "-okdir"}
_ACTIONS = _RUNS | {
    "-delete", "-fls", "-fprint", "-fprint0", "-fprintf", "-ls", "-print", "-print0", "-printf",
    "-prune", "-quit",
}  # fmt: skip
# They hold for the whole expression, wherever they stand.
_GLOBAL = {"-depth", "-d", "-maxdepth", "-mindepth", "-mount", "-noleaf", "-xdev"}

Group = tuple[str, ...]


@dataclass(frozen=True)
class Expression:
    """What find is told.

    Attributes:
        flags: each test, action and operator with its values.
        operands: where it looks; all words, in an order of ours between those that hold
            their place, where something stands after an action or there are operators.
        commands: words of what it runs, in order.
    """

    flags: Counter[tuple[Any, ...]]
    operands: Group
    commands: tuple[Group, ...]


def read_find(words: Sequence[str]) -> Expression:
    """Read the words after `find`."""
    places, groups, commands = _groups(words)
    inner = [group for group in groups if group[0] not in _GLOBAL]
    held = [number for number, group in enumerate(inner) if _holds(group)]
    operators = any(group[0] in _OPERATORS for group in inner)
    operands = places
    if operators or (held and held[0] < len(inner) - 1):
        operands += tuple(word for group in _settled(inner) for word in group)
    return Expression(Counter(groups), operands, tuple(commands))


def _groups(words: Sequence[str]) -> tuple[Group, list[Group], list[Group]]:
    """Where to look, then each option with its values, and the commands that are run."""
    places: list[str] = []
    groups: list[list[str]] = []
    commands: list[Group] = []
    left = list(reversed([_SPELLINGS.get(word, word) for word in words]))
    negated: list[str] = []
    while left:
        word = left.pop()
        if word == "!":
            negated.append(word)
        elif word in _RUNS:
            command, end = _command(left)
            commands.append(command)
            groups.append([*negated, word, end])
            negated = []
        elif word in _OPERATORS or (word.startswith("-") and word != "-"):
            if word != "-a":  # the same as nothing
                groups.append([*negated, word])
                negated = []
        else:
            (groups[-1] if groups else places).append(word)
    groups += [negated] if negated else []
    return tuple(places), [tuple(group) for group in groups], commands


def _command(left: list[str]) -> tuple[Group, str]:
    """Take a command off `left`, where the next word is the last; how it ends."""
    command: list[str] = []
    while left:
        word = left.pop()
        if word == ";" or (word == "+" and command and command[-1] == "{}"):
            return tuple(command), word
        command.append(word)
    return tuple(command), ""


def _holds(group: Group) -> bool:
    return group[0] in _OPERATORS or not _ACTIONS.isdisjoint(group[:2])


def _settled(groups: Sequence[Group]) -> list[Group]:
    """Sorted between those that hold their place."""
    settled: list[Group] = []
    between: list[Group] = []
    for group in groups:
        if _holds(group):
            settled += [*sorted(between), group]
            between = []
        else:
            between.append(group)
    return settled + sorted(between)
