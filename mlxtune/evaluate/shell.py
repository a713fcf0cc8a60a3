"""Shell commands compared as commands: whether they say the same.

Nothing is executed here. What a command says is read by bashlex and broken into facts:
programs in their order, what stands between them, and each program's flags, operands,
assignments and redirections. Two commands of the same facts are the same command, however they are
quoted and in whatever order their flags come.

A flag's value has to be told from an operand, and only the program knows which of its
flags take one. Those of common programs are listed; a flag of any other program takes
none, and what follows it is an operand.
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

# Nobody asks for a longer command, and a parser in Python would take its time over it.
MAX_LENGTH = 4000
# Of Python, in reading one command: a hundred times what a long one takes.
_LINES = 1_000_000

# Letters of short options that take a value: `-n5`, `-n 5`.
TAKES_VALUE: dict[str, str] = {
    "awk": "Ffv",
    "curl": "AHXdeoubFmTK",
    "cut": "bcdf",
    "date": "drf",
    "dd": "",
    "df": "tx",
    "diff": "UC",
    "du": "d",
    "env": "uCS",
    "grep": "ABCDdefm",
    "egrep": "ABCDdefm",
    "fgrep": "ABCDdefm",
    "gzip": "S",
    "head": "cn",
    "join": "12aejotv",
    "kill": "s",
    "ln": "St",
    "ls": "IwT",
    "mkdir": "m",
    "nice": "n",
    "nl": "bdfhilnsvw",
    "od": "AjNtw",
    "paste": "d",
    "ping": "ciIstWw",
    "ps": "CGOUgopstu",
    "rsync": "efBT",
    "scp": "FiloPSc",
    "sed": "ef",
    "seq": "fs",
    "sort": "STkot",
    "split": "abCln",
    "ssh": "BDEFIJLObceilmopRSWw",
    "stat": "cf",
    "sudo": "ugUpCh",
    "tail": "cn",
    "tar": "bCfITX",
    "tee": "",
    "touch": "drt",
    "tree": "LPI",
    "uniq": "fsw",
    "watch": "n",
    "wget": "OPoatTUQ",
    "xargs": "EILPadns",
    "zip": "x",
}
# Options of these are words behind a single dash, each with the words up to the next.
_WORD_OPTIONS = {"find", "java", "javac", "openssl", "ffmpeg", "convert", "magick", "xcodebuild"}
# These run the program that their operands begin with, whose flags are its own.
_WRAPPERS = {"sudo", "xargs", "env", "nohup", "nice", "command", "exec", "watch", "doas"}

# Where one of find's is among them, the order of the others means something.
_ORDERED = {"-o", "-or", "!", "-not", "(", ")", ","}
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
                ("redirect", command.redirects),
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
            remedy='pip install "mlxtune[shell]"; it is under the GPL',
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
                for part in _children(node):
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
    if program in _WORD_OPTIONS:
        yield Command(program, *_word_options(rest), runner=runner)
        return
    flags, operands = _options(rest, TAKES_VALUE.get(program, ""), program in _WRAPPERS)
    if program in _WRAPPERS:
        assigned = 0
        while program == "env" and assigned < len(operands) and "=" in operands[assigned]:
            assigned += 1
        yield Command(program, flags, tuple(operands[:assigned]), runner=runner)
        yield from _simple(operands[assigned:], program)
        return
    yield Command(program, flags, tuple(operands), runner=runner)


def _options(
    words: list[str], with_value: str, first_operand_ends: bool
) -> tuple[Counter[Fact], list[str]]:
    """Flags and operands, as getopt tells them apart; `--` ends the flags."""
    flags: Counter[Fact] = Counter()
    operands: list[str] = []
    left = list(reversed(words))
    while left:
        word = left.pop()
        if word == "--" or (operands and first_operand_ends):
            operands += [] if word == "--" else [word]
            operands += reversed(left)
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags[(name, value) if equals else (name,)] += 1
        elif not word.startswith("-") or word == "-":
            operands.append(word)
        elif word[1:].isdigit():
            flags[word,] += 1  # head -5
        else:
            _letters(word[1:], with_value, left, flags)
    return flags, operands


def _word_options(words: list[str]) -> tuple[Counter[Fact], tuple[str, ...]]:
    """Options that are words, each with its values, and the operands before them."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and word != "-":
            groups.append([])
        groups[-1].append(word)
    ordered = not _ORDERED.isdisjoint(words)
    return Counter(map(tuple, groups[1:])), tuple(words if ordered else groups[0])


def _letters(word: str, with_value: str, left: list[str], flags: Counter[Fact]) -> None:
    """`-xzf a` is `-x -z -f a`; the first letter that takes a value takes the rest."""
    for place, letter in enumerate(word):
        if letter not in with_value:
            flags[f"-{letter}",] += 1
            continue
        value = word[place + 1 :] or (left.pop() if left else "")
        flags[f"-{letter}", value] += 1
        return
