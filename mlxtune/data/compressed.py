"""The bytes of a file, decompressed where its ending says so."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from mlxtune.errors import DataError
from mlxtune.install import install_extra


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where its ending says so."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(path) as unpacked:
            yield cast(IO[bytes], unpacked)
    elif suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise needs_extra("Zstandard", path) from None
        try:
            with path.open("rb") as raw:
                # Archives made with `zstd --long` look back further than the default allows.
                unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
                yield io.BufferedReader(_Frames(raw, unpacker))
        except zstandard.ZstdError as error:
            raise DataError(f"the file cannot be decompressed: {error}", where=str(path)) from None
    else:
        with path.open("rb") as handle:
            yield handle


class _Frames(io.RawIOBase):
    """The content of Zstandard frames.

    The library's own reader takes a frame that is cut off for one that ends there.
    """

    def __init__(self, raw: IO[bytes], unpacker: Any) -> None:
        self._raw, self._unpacker = raw, unpacker
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # Little at a time: 4 bytes may become 128 KiB.
            data = self._packed or self._raw.read(8192)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame has no end")
                return 0
            self._frame = self._frame or self._unpacker.decompressobj()
            self._ready, self._packed = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def needs_extra(what: str, path: Path) -> DataError:
    """What is said where a kind of file needs a package that is not installed."""
    return DataError(
        f"{what} files need another package",
        where=str(path),
        remedy=install_extra("data"),
    )
