"""Whether a shell can read a text: what `bash -n` and `dash -n` say, which read and stop."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache, lru_cache

SHELLS = ("bash", "dash")
_SECONDS = 5.0
# Without a start-up file, and whatever the caller's environment holds.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


def parses(text: str, shell: str) -> bool | None:
    """Whether a shell can read this text; it is never executed.

    Prose often can be read as a command and its operands. An empty text is no command.

    Args:
        text: the command.
        shell: `bash` or `dash`.

    Returns:
        None where the shell is not installed, or takes longer than 5 seconds.
    """
    path = shutil.which(shell)
    return None if path is None else _reads(path, text.strip())


def shell_versions() -> dict[str, str]:
    """The version of each installed shell that says its own; dash does not.

    Bash 3.2, which macOS has, reads other texts than newer ones do.
    """
    found = {shell: _version(path) for shell in SHELLS if (path := shutil.which(shell))}
    return {shell: said for shell, said in found.items() if said}


@cache
def _version(shell: str) -> str:
    try:
        done = subprocess.run(
            [shell, "--version"],
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = re.search(rb"version ([0-9][^ \n]*)", done.stdout)
    return said[1].decode(errors="replace") if said else ""


@lru_cache(maxsize=10_000)
def _reads(shell: str, text: str) -> bool | None:
    if not text or "\0" in text:
        return False
    # Through stdin: a text may be longer than an argument, or begin with a dash.
    try:
        done = subprocess.run(
            [shell, "-n"],
            input=text.encode("utf-8", "replace") + b"\n",
            env=_ENVIRONMENT,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # A here-document that lacks its end is a warning to bash, and exits 0.
    return done.returncode == 0 and b"delimited by end-of-file" not in done.stderr
