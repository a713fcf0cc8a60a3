"""Answers run, where one asks for it: read-only, without a network, in a tree of our own.

Two guards stand one behind the other. The command is read, and only known programs that
read and print, joined by pipes and lists, go on. Those run under bubblewrap: nothing of
this machine is visible but its programs, read-only; the folder they look at is a small
fixed tree, read-only too; there is no network, no privilege, and little time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlxtune.errors import MlxtuneError
from mlxtune.evaluate.shell import Command, Script, read_command

# Programs that read files and print; what they print is the same on each run.
_NAMES = (
    "basename cat cksum cmp column comm cut diff dirname du echo egrep expand expr false fgrep "
    "file find fold grep head join ls md5sum nl od paste printf pwd readlink realpath rev seq "
    "sha1sum sha256sum sort stat tac tail test tr true uniq wc xargs"
)
READ_ONLY = frozenset(_NAMES.split())
_JOINED = {"|", "&&", "||", ";", "!", "commandsubstitution"}
# Options by which these write files or start programs. uniq writes to its second operand.
_ACTIONS: dict[str, tuple[str, ...]] = {
    "diff": ("-l", "--paginate"),
    "file": ("-C", "-z", "-Z", "--compile", "--uncompress"),
    "find": ("-exec", "-ok", "-delete", "-fprint", "-fls"),
    "sort": ("-o", "-T", "--output", "--compress-program", "--temporary-directory"),
    "uniq": (),
}
# Options of xargs after which the program is where it seems to be: `-i` and `--arg-file`
# may swallow the next word, or not.
_XARGS = frozenset(
    ("-0", "-r", "-t", "-x", "-d", "-n", "-I", "-L", "-P", "--null", "--no-run-if-empty")
)
_SECONDS = 3.0
_LIMITS = "ulimit -t 2 -f 1024 -v 2000000"  # seconds; KiB written; KiB of memory
# 2001-09-09 01:46:40 UTC: listings show the same times in every run.
_TIME = 1_000_000_000

TREE: dict[str, str] = {
    "README.md": "# Garden\n\nNotes about plants.\n\n## TODO\n\n- water the ferns\n- TODO: roses\n",
    "notes.txt": "apple\nbanana\ncherry\napple\ndate\nError: too dry\n",
    "numbers.txt": "10\n9\n2\n33\n2\n",
    "users.csv": "name,city,age\nAda,London,36\nLinus,Helsinki,21\nGrace,New York,45\n",
    "server.log": "INFO start\nERROR disk full\nWARN slow\nERROR timeout\nINFO stop\n",
    "app.log": "INFO ready\nerror: no route\n",
    ".hidden": "secret\n",
    "docs/guide.md": "Guide\n\nSee the README.\n",
    "docs/old/guide.md": "Old guide\n",
    "src/main.py": "import sys\n\n\ndef main():\n    print('hello')\n",
    "src/util.py": "def add(a, b):\n    return a + b\n",
    "src/test_util.py": "from util import add\n",
    "src/main.c": "int main(void) { return 0; }\n",
    "data/a.json": '{"a": 1}\n',
    "data/b.json": '{"b": 2}\n',
    "empty.txt": "",
}


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and how it ended."""

    status: int
    output: bytes


def refusal(text: str) -> str | None:
    """Why a command is not run; None if it may be."""
    script = read_command(text)
    if script is None:
        return "it cannot be read"
    # Inside these bashlex sees no commands.
    if any(mark in text for mark in ("${", "$[", "<<")):
        return "it has an expansion or a document that is not looked into"
    return _refused(script)


def _refused(script: Script) -> str | None:
    for connector in script.connectors:
        if connector not in _JOINED:
            return f"it is more than pipes and lists: {connector}"
    before = None
    for command in script.commands:
        if reason := _refused_command(command) or _refused_under_xargs(command, before):
            return reason
        before = command
    return None


def _refused_command(command: Command) -> str | None:
    program = command.program
    if program not in READ_ONLY:
        return f"{program.partition(chr(0))[0]!r} is not among the programs that only read"
    if command.assignments:
        return "it sets variables"
    if program in _ACTIONS and (reason := _action(command)):
        return reason
    for _source, kind, target in command.redirects:
        harmless = kind == "<" or target == "/dev/null" or (kind == ">&" and target in (1, 2))
        if not harmless:
            return "it writes to a file"
    return None


def _action(command: Command) -> str | None:
    """An argument by which a program that can write does so, or may."""
    program = command.program
    if hidden := _hidden(command):
        return f"{program}: what {hidden!r} becomes is only known when it runs"
    words = [*command.operands, *(str(part) for flag in command.flags for part in flag)]
    for option in _ACTIONS[program]:
        if any(_names(word, option) for word in words):
            return f"{program} {option} writes or starts programs"
    if program == "uniq" and len(command.operands) > 1:
        return "uniq writes to its second operand"
    return None


def _names(word: str, option: str) -> bool:
    """Whether a word is that option, with or without a value, or short for it."""
    short = word.startswith("--") and option.startswith(word)
    return short or word.startswith(option)


def _hidden(command: Command) -> str | None:
    """An argument that the shell makes others of: braces, a variable, a substitution."""
    for flag in command.flags:
        if "\0" in "".join(map(str, flag)) and command.program != "find":
            return str(flag[0]).partition("\0")[0]  # its letters were taken apart, marks too
    words = [*command.operands, *(str(part) for flag in command.flags for part in flag)]
    for word in words:
        text, *marks = word.split("\0")
        # What a pattern can name is known: no file of the tree begins with a dash.
        if any(mark != "pattern" for mark in marks) or (marks and "{" in text):
            return text
    return None


def _refused_under_xargs(command: Command, xargs: Command | None) -> str | None:
    """What xargs hands over is only known when it runs: for some it may be an action."""
    if command.program == "xargs":
        if hidden := _hidden(command):
            return f"xargs: what {hidden!r} becomes is only known when it runs"
        for flag in command.flags:
            if flag[0] not in _XARGS:
                return f"xargs {flag[0]} is not among the options known here"
    if command.runner != "xargs" or xargs is None:
        return None
    if command.program in (*_ACTIONS, "xargs"):
        return f"xargs could hand {command.program} an option that writes or starts programs"
    # `xargs -I cat cat` runs whatever it reads.
    replaced = [str(flag[1]) for flag in xargs.flags if flag[0] == "-I"]
    if any(text in command.program for text in replaced):
        return "xargs replaces the program's name"
    return None


class Sandbox:
    """Runs commands in the fixed tree; made by `sandbox`."""

    def __init__(self, bwrap: str, tree: Path) -> None:
        self._base = [bwrap, *_walls(tree)]
        self.run_read = cache(self._run)

    def same_output(self, answer: str, expected: str) -> bool | None:
        """Whether both end alike and print the same.

        Returns:
            None where the expected command may not be run, or does not end in time; an
            answer that may not, or does not, is not the same.
        """
        wanted = None if refusal(expected) else self.run_read(expected.strip())
        if wanted is None:
            return None
        return refusal(answer) is None and self.run_read(answer.strip()) == wanted

    def _run(self, text: str) -> Outcome | None:
        # To files, which the limit holds for; a pipe would take all that comes.
        inner = ["/bin/bash", "--norc", "--noprofile", "-c"]
        limited = [*inner, f'{_LIMITS}; exec "$@"', "-", *inner, text]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            try:
                done = subprocess.run(
                    [*self._base, *limited],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env={},
                    timeout=_SECONDS,
                )
            except (subprocess.TimeoutExpired, ValueError, OSError):
                return None
            output.seek(0)
            printed = output.read()
            errors.seek(0)
            said = errors.read(1000)
        if said.startswith(b"bwrap: "):
            raise _unusable(said.decode("utf-8", "replace").strip())
        return Outcome(done.returncode, printed)


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A tree and walls around it, for as long as the block runs.

    Raises:
        MlxtuneError: bubblewrap is not there, or may not be used here.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise MlxtuneError(
            "running answers needs bubblewrap (bwrap), which is not installed; nothing was run",
            where="--execute",
            remedy="on Linux install the package bubblewrap; elsewhere leave --execute out",
        )
    with tempfile.TemporaryDirectory(prefix="mlxtune-tree-") as folder:
        tree = Path(folder)
        _plant(tree)
        made = Sandbox(bwrap, tree)
        outcome = made.run_read("true")
        if outcome is None or outcome.status:
            raise _unusable("a trial command did not end well")
        yield made


def _unusable(reason: str) -> MlxtuneError:
    return MlxtuneError(
        f"bubblewrap cannot be used here: {reason}",
        where="--execute",
        remedy="it needs user namespaces, which containers often forbid; leave --execute out",
    )


def _plant(tree: Path) -> None:
    for name, text in TREE.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in sorted(tree.rglob("*"), reverse=True):  # what is in a folder before it
        os.utime(path, (_TIME, _TIME))
        path.chmod(0o755 if path.is_dir() else 0o644)


def _walls(tree: Path) -> list[str]:
    arguments = [
        *("--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *("--cap-drop", "ALL", "--hostname", "tree"),
        *("--setenv", "PATH", "/usr/bin:/bin", "--setenv", "LC_ALL", "C"),
        *("--setenv", "HOME", "/tree", "--setenv", "TZ", "UTC"),
        *("--ro-bind", "/usr", "/usr"),
    ]
    for name in ("bin", "lib", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", f"usr/{name}", f"/{name}"]
        elif path.is_dir():
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    arguments += ["--dev", "/dev", "--ro-bind", str(tree), "/tree", "--chdir", "/tree"]
    return [*arguments, "--remount-ro", "/", "--"]
