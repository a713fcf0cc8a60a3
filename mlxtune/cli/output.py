"""Printing to whatever reads our output: nothing that is printed may end in an error.

Not every stream takes every character: with LC_ALL=C or PYTHONIOENCODING=ascii only ASCII,
in older locales Latin-1; and not even UTF-8 takes what stands for the bytes of a file name
that is no UTF-8. Our own signs then become ASCII that reads alike, any other character
becomes its escape, as in JSON.
"""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import Any

from mlxtune.errors import MlxtuneError

_ERRORS, _ASCII = "mlxtune-legible", "mlxtune-ascii"
# None of these means anything in JSON, whose strings may hold what becomes of them.
_LEGIBLE = {
    "…": "...",
    "–": "-",
    "—": "-",
    "→": "->",
    "±": "+/-",
    "×": "x",
    "·": "-",
    "Δ": "d",
    "≤": "<=",
    "≥": ">=",
    "⟦": "[[",
    "⟧": "]]",
    "\u00a0": " ",
} | dict.fromkeys("▏▎▍▌▋▊▉█", "#")


def make_printable() -> None:
    """Have stdout and stderr take any text from here on."""
    codecs.register_error(_ERRORS, _legible)
    codecs.register(_find)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=_ASCII if _is_ascii(stream) else None, errors=_ERRORS)
    # What is typed, or piped, in a locale of ASCII is UTF-8 nowadays, if it is more than ASCII.
    if isinstance(sys.stdin, io.TextIOWrapper) and _is_ascii(sys.stdin):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def json_text(value: Any) -> str:
    """A value as JSON to print: characters that stdout does not take are escaped."""
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(value, indent=2, ensure_ascii=escaped)


def of_locale(error: Exception) -> MlxtuneError | None:
    """What to tell people of a name or text that this locale cannot hold, if that is the error."""
    encoding = sys.getfilesystemencoding()
    if not isinstance(error, UnicodeEncodeError) or encoding == "utf-8":
        return None
    return MlxtuneError(
        f"{error.object!r} cannot be used in this locale, whose encoding is {encoding}",
        remedy="call it with PYTHONUTF8=1 in its environment",
    )


def _is_ascii(stream: io.TextIOWrapper) -> bool:
    return codecs.lookup(stream.encoding).name == "ascii"


def _find(name: str) -> codecs.CodecInfo | None:
    """ASCII by another name: where a stream is ASCII by name, click writes UTF-8 to it."""
    if name.replace("_", "-") != _ASCII:
        return None
    ascii = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii.encode,
        ascii.decode,
        ascii.streamreader,
        ascii.streamwriter,
        ascii.incrementalencoder,
        ascii.incrementaldecoder,
        name=_ASCII,
    )


def _legible(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: what is written in the place of what cannot be."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_LEGIBLE.get(sign) or json.dumps(sign)[1:-1] for sign in text), error.end
