"""Where reports go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxtune.files import atomic_file, require_no_file, write_text
from mlxtune.report.collect import Lost, RunRecord
from mlxtune.report.page import page

PAGE = "report.html"


def place_of(runs: Sequence[RunRecord], output: Path | None, lost: Sequence[Lost] = ()) -> Path:
    """Where `write_report` puts the page."""
    if output is not None:
        return output
    return runs[0].path / PAGE if len(runs) + len(lost) == 1 else Path(PAGE)


def write_report(
    runs: Sequence[RunRecord],
    output: Path | None = None,
    *,
    lost: Sequence[Lost] = (),
    png: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the page, and the picture if one is asked for; what was written.

    Args:
        runs: at least one.
        output: the page; by default `report.html` in the run's folder, where it is always
            replaced, or of several runs in the current one.
        lost: other runs, which the page says are missing.
        png: the picture, in another file.
        overwrite: replace other files that are there.

    Raises:
        OutputExists: a file exists and may not be replaced; nothing was written.
        MlxtuneError: matplotlib is not installed, or there is nothing to draw.
        StorageError: the disk refuses the write.
    """
    own = runs[0].path / PAGE if len(runs) + len(lost) == 1 else None
    place = place_of(runs, output, lost)
    for path in (place, png):
        if path is not None and path != own:
            require_no_file(path, overwrite)
    picture = None
    if png is not None:
        from mlxtune.report.png import curves_png

        picture = curves_png(runs)
    # Surrogates that a model may spell have no UTF-8.
    write_text(place, page(runs, lost).encode("utf-8", "replace").decode())
    if png is None or picture is None:
        return [place]
    with atomic_file(png) as handle:
        handle.write(picture)
    return [place, png]
