"""Flags and operands of a program, told apart as it would itself.

A flag's value has to be told from an operand, and only the program knows which of its
flags take one. Those of common programs are listed; a flag of any other program takes
none, and what follows it is an operand.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

# Letters of short options that take a value: `-n5`, `-n 5`.
_TAKES_VALUE: dict[str, str] = {
    "awk": "Ffv",
    "base64": "w",
    "curl": "AHXdeoubFmTK",
    "crontab": "u",
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
    "fold": "w",
    "gzip": "S",
    "head": "cn",
    "install": "gmo",
    "join": "12aejotv",
    "journalctl": "nSUu",
    "kill": "s",
    "ln": "St",
    "ls": "IwT",
    "make": "CfIjloW",
    "mkdir": "m",
    "mktemp": "p",
    "mount": "Lot",
    "nice": "n",
    "nl": "bdfhilnsvw",
    "od": "AjNtw",
    "paste": "d",
    "perl": "eEIMm",
    "pgrep": "gGPtuU",
    "ping": "ciIstWw",
    "pkill": "gGPtuU",
    "ps": "CGOUgopstu",
    "python": "cmWX",
    "python3": "cmWX",
    "rsync": "efBT",
    "scp": "FiloPSc",
    "sed": "ef",
    "seq": "fs",
    "shuf": "ino",
    "sort": "STkot",
    "split": "abCln",
    "ssh": "BDEFIJLObceilmopRSWw",
    "ssh-keygen": "bCfNPt",
    "stat": "cf",
    "sudo": "ugUpCh",
    "tail": "cn",
    "tar": "bCfITX",
    "tee": "",
    "timeout": "ks",
    "touch": "drt",
    "tree": "LPI",
    "truncate": "rs",
    "uniq": "fsw",
    "useradd": "cdegGsu",
    "usermod": "cdegGlsu",
    "watch": "n",
    "wget": "OPoatTUQ",
    "xargs": "EILPadns",
    "zip": "x",
}
# Of those that take a value, the order of the values means something.
_VALUES_IN_ORDER = {"sort": "k", "sed": "ef", "awk": "f"}
# Long options that take a value in every program that has them: `--key=2`, `--key 2`. Not
# `--lines`: of `wc` it takes none.
_LONG_WITH_VALUE = {
    "--delimiter", "--directory-prefix", "--exclude", "--exclude-dir", "--exclude-from",
    "--fields", "--files-from", "--key", "--max-args", "--max-depth", "--max-procs",
    "--output-document", "--regexp", "--request",
}  # fmt: skip
# Options of these are words behind a single dash, each with the words up to the next.
WORD_OPTIONS = {"java", "javac", "openssl", "ffmpeg", "convert", "magick", "xcodebuild"}
# These run the program that their operands begin with, whose flags are its own.
WRAPPERS = {
    "sudo", "xargs", "env", "nohup", "nice", "command", "exec", "watch", "doas", "timeout",
}  # fmt: skip

Flag = tuple[Any, ...]


def read_options(program: str, words: list[str]) -> tuple[Counter[Flag], list[str]]:
    """Flags and operands, as getopt tells them apart; `--` ends the flags."""
    flags: Counter[Flag] = Counter()
    operands: list[str] = []
    left = list(reversed(_spelled_out(program, words)))
    while left:
        word = left.pop()
        if word == "--" or (operands and program in WRAPPERS):
            operands += [] if word == "--" else [word]
            operands += reversed(left)
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            if not equals and name in _LONG_WITH_VALUE and left:
                equals, value = "=", left.pop()
            flags[(name, value) if equals else (name,)] += 1
        elif not word.startswith("-") or word == "-":
            operands.append(word)
        elif word[1:].isdigit():
            flags[word,] += 1  # kill -9
        else:
            _letters(word[1:], program, left, flags)
    return flags, operands


def read_word_options(words: list[str]) -> tuple[Counter[Flag], tuple[str, ...]]:
    """Options that are words, each with its values, and the operands before them."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and word != "-":
            groups.append([])
        groups[-1].append(word)
    return Counter(map(tuple, groups[1:])), tuple(groups[0])


def _spelled_out(program: str, words: list[str]) -> list[str]:
    """The old spellings `tar xzf a` and `head -5` in today's."""
    if not words:
        return words
    first, *left = words
    if program in ("head", "tail") and first.startswith("-") and first[1:].isdigit():
        return ["-n", first[1:], *left]
    if program == "tar" and first.isalpha() and not set("Acdrtux").isdisjoint(first):
        spelled = []
        for letter in first:  # each that takes a value takes the next word
            spelled.append(f"-{letter}")
            if letter in _TAKES_VALUE[program] and left:
                spelled.append(left.pop(0))
        return spelled + left
    return words


def _letters(word: str, program: str, left: list[str], flags: Counter[Flag]) -> None:
    """`-xzf a` is `-x -z -f a`; the first letter that takes a value takes the rest."""
    for place, letter in enumerate(word):
        if letter not in _TAKES_VALUE.get(program, ""):
            flags[f"-{letter}",] += 1
            continue
        value = word[place + 1 :] or (left.pop() if left else "")
        before: tuple[int, ...] = ()
        if letter in _VALUES_IN_ORDER.get(program, ""):
            before = (sum(flag[0] == f"-{letter}" for flag in flags.elements()),)
        flags[(f"-{letter}", value, *before)] += 1
        return
