"""Shell commands compared as commands: whether they say the same.

Nothing is executed here. What a command says is read by bashlex and broken into facts:
programs in their order, what stands between them, and each program's flags, operands,
assignments and redirections. Two commands of the same facts are the same command, however they are
quoted and in whatever order their flags come.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from types import FrameType
from typing import Any

from mlxtune.errors import MlxtuneError
from mlxtune.evaluate.shell_find import read_find
from mlxtune.evaluate.shell_options import WORD_OPTIONS, WRAPPERS, read_options, read_word_options
from mlxtune.install import install_extra

# Nobody asks for a longer command, and a parser in Python would take its time over it.
MAX_LENGTH = 4000
# Of Python, in reading one command: a hundred times what a long one takes.
_LINES = 1_000_000

_SUBSTITUTIONS = ("commandsubstitution", "processsubstitution")

Fact = tuple[Any, ...]


@dataclass(frozen=True)
class Command:
    """One simple command.

    Attributes:
        program: its name, unquoted.
        flags: options without order; bundled letters apart, each with its value if any.
        operands: in order; where the order of the options matters, all words.
        assignments: variables set for it alone.
        redirects: descriptor, operator and target of each.
        runner: the wrapper that runs it, such as xargs; empty if the shell does.
    """

    program: str
    flags: Counter[Fact] = field(default_factory=Counter)
    operands: tuple[str, ...] = ()
    assignments: tuple[str, ...] = ()
    redirects: tuple[Fact, ...] = ()
    runner: str = ""


@dataclass(frozen=True)
class Script:
    """What a text says in shell: simple commands in order, and what stands between them.

    Commands of a substitution follow the one it is in.
    """

    commands: tuple[Command, ...]
    connectors: tuple[str, ...]

    def programs(self) -> tuple[str, ...]:
        """Names of the programs, in order."""
        return tuple(command.program for command in self.commands)

    def flags(self) -> Counter[Fact]:
        """Flags of all programs."""
        return Counter((c.program, *flag) for c in self.commands for flag in c.flags.elements())

    def facts(self) -> Counter[Fact]:
        """Everything that makes it another command if it were otherwise."""
        facts: Counter[Fact] = Counter(
            ("connector", place, word) for place, word in enumerate(self.connectors)
        )
        for place, command in enumerate(self.commands):
            facts["program", place, command.program] += 1
            for flag, count in command.flags.items():
                facts["flag", command.program, *flag] += count
            for kind, values in (
                ("operand", tuple(enumerate(command.operands))),
                ("assignment", command.assignments),
                ("redirect", _placed(command.redirects)),
            ):
                for value in values:
                    facts[kind, command.program, value] += 1
        return facts


def require_bashlex() -> None:
    """See that commands can be compared.

    Raises:
        MlxtuneError: bashlex is not installed.
    """
    try:
        import_module("bashlex")
    except ImportError:
        raise MlxtuneError(
            "comparing shell commands needs another package: bashlex",
            remedy=f"{install_extra('shell')}    (bashlex is under the GPL)",
        ) from None


@lru_cache(maxsize=10_000)
def read_command(text: str) -> Script | None:
    """What a text says in shell.

    Returns:
        None where bashlex cannot read it: a syntax error, or syntax it doesn't know, such
        as `case`, `[[`, arithmetic and `time`. Use `syntax.parses` to tell the two apart.

    Raises:
        MlxtuneError: bashlex is not installed.
    """
    require_bashlex()
    import bashlex

    text = text.strip()
    if not text or len(text) > MAX_LENGTH:
        return None
    try:
        with _at_most(_LINES):
            trees = bashlex.parse(text)
        reader = _Reader(text)
        for number, tree in enumerate(trees):
            if number:
                reader.connectors.append(";")
            reader.node(tree)
    except (Exception, _TooLong):
        # It raises whatever comes: AttributeError for a comment, NotImplementedError, …
        return None
    return Script(tuple(reader.commands), tuple(reader.connectors))


def same_programs(answer: Script, expected: Script) -> bool:
    """Whether both run the same programs in the same order."""
    return answer.programs() == expected.programs()


def same_flags(answer: Script, expected: Script) -> bool:
    """Whether both run the same programs with the same flags, whatever their order."""
    return same_programs(answer, expected) and answer.flags() == expected.flags()


def command_score(answer: Script, expected: Script) -> float:
    """How much of both is the same: 1 for the same command, 0 for nothing in common.

        score = 2 |A ∩ B| / (|A| + |B|)

    the Dice coefficient of their facts, counted with repetition. Flags, operands and
    redirections count only with the program they belong to.
    """
    ours, theirs = answer.facts(), expected.facts()
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


class _TooLong(BaseException):
    """A parser runs in circles; no `except Exception` on the way keeps it there."""


@contextmanager
def _at_most(lines: int) -> Iterator[None]:
    """Let a block run so many lines of Python.

    bashlex 0.18 never ends on `é' ${ '`. A count tells the same on every machine, as a
    time would not, and works in every thread, as a signal would not.

    Raises:
        _TooLong: it would run more.
    """

    def trace(_frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal lines
        lines -= 1
        if lines < 0:
            raise _TooLong
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _Reader:
    """Walks bashlex's tree in the order of the text."""

    def __init__(self, text: str) -> None:
        self.commands: list[Command] = []
        self.connectors: list[str] = []
        self._text = text

    def node(self, node: Any) -> None:
        match node.kind:
            case "command":
                self._command(node)
            case "pipe":
                self.connectors.append(node.pipe)
            case "operator":
                self.connectors.append(";" if node.op == "\n" else node.op)
            case "reservedword":
                if node.word != ";":
                    self.connectors.append(node.word)
            case "redirect":
                self.connectors.append(" ".join(map(str, self._redirect(node))))
            case "word":  # of a `for`
                self.connectors.append(self._word(node))
                self._inside(node)
            case _:
                parts = _children(node)
                if parts and getattr(parts[-1], "op", None) in (";", "\n"):
                    parts.pop()  # it separates nothing
                for part in parts:
                    self.node(part)

    def _command(self, node: Any) -> None:
        words = [part for part in node.parts if part.kind == "word"]
        assignments = tuple(self._word(p) for p in node.parts if p.kind == "assignment")
        redirects = tuple(self._redirect(p) for p in node.parts if p.kind == "redirect")
        made = list(_simple([self._word(word) for word in words]))
        # Those are the shell's doing, for whatever program comes first.
        first = made[0] if made else Command("")
        self.commands.append(
            Command(first.program, first.flags, first.operands, assignments, redirects)
        )
        self.commands += made[1:]
        for part in node.parts:
            self._inside(part)

    def _inside(self, word: Any) -> None:
        """Commands of substitutions."""
        for part in getattr(word, "parts", ()):
            if part.kind in _SUBSTITUTIONS:
                self.connectors.append(part.kind)
                self.node(part.command)

    def _redirect(self, node: Any) -> Fact:
        target = node.output
        if getattr(target, "kind", None) == "word":
            target = self._word(target)
        document = getattr(node, "heredoc", None)
        if document is not None:
            target = document.value
        default = 0 if node.type.startswith("<") else 1
        source = node.input if node.input is not None else default
        return (source, node.type, target)

    def _word(self, word: Any) -> str:
        """The word unquoted; but `*` is not `'*'`, nor `$x` `'$x'`.

        What the shell will expand is told by a mark that no command holds.
        """
        text = str(word.word)
        source = self._text[slice(*word.pos)]
        for part in getattr(word, "parts", ()):
            if part.kind in _SUBSTITUTIONS:  # read apart, so that its flags have no order
                text = text.replace(self._text[slice(*part.pos)], "$()")
        kinds = [str(part.kind) for part in getattr(word, "parts", ()) if part.kind != "tilde"]
        if _expands(source):
            kinds.append("pattern")
        return text + "".join(f"\0{kind}" for kind in kinds)


def _children(node: Any) -> list[Any]:
    redirects = getattr(node, "redirects", [])
    return [*(getattr(node, "list", None) or getattr(node, "parts", [])), *redirects]


def _expands(source: str) -> bool:
    """Whether a word of source text has a pattern, braces or a tilde outside quotes."""
    quote, escaped = "", False
    for place, char in enumerate(source):
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "*?[{" or (char == "~" and not place):
            return source[place:] != "{}"  # find's and xargs' own, which no shell expands
    return False


def _simple(words: list[str], runner: str = "") -> Iterator[Command]:
    """A program with its arguments; a wrapper and the program it runs are two."""
    if not words:
        return
    program, *rest = words
    if program == "find":
        told = read_find(rest)
        yield Command(program, told.flags, told.operands, runner=runner)
        for command in told.commands:
            yield from _simple(list(command), program)
        return
    if program in WORD_OPTIONS:
        yield Command(program, *read_word_options(rest), runner=runner)
        return
    flags, operands = read_options(program, rest)
    if program in WRAPPERS:
        own = 1 if program == "timeout" else 0  # the seconds
        while program == "env" and own < len(operands) and "=" in operands[own]:
            own += 1
        yield Command(program, flags, tuple(operands[:own]), runner=runner)
        yield from _simple(operands[own:], program)
        return
    yield Command(program, flags, tuple(operands), runner=runner)


def _placed(redirects: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """In order where one copies what another set: `> f 2>&1` is not `2>&1 > f`."""
    copies = any("&" in str(operator) for _, operator, _ in redirects)
    return tuple(enumerate(redirects)) if copies else redirects
