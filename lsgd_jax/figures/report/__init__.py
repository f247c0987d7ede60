"""Report on runs as one self-contained HTML file: data, styles and the plotting library uPlot are in it.

uPlot is small enough to be part of every page (50 kB, where Plotly takes 4 MB and Vega 0.8 MB), and has what runs need:
values under the cursor, zoom, logarithmic axes, bands, and legends that hide lines.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from lsgd_jax import files
from lsgd_jax.checks import check_path
from lsgd_jax.errors import UsageError
from lsgd_jax.figures.report.page import HEAD, render
from lsgd_jax.figures.report.reading import read

RENEWED_EVERY = 10
"""Seconds after which a watched report is written, and loaded by a browser, again."""


def write(runs: Sequence[Path | str], out: Path | str, *, refresh: int | None = None) -> bool:
    """Write a report on runs.

    Args:
      runs: run folders.
      out: output file; an existing report is replaced, any other file is not.
      refresh: seconds after which a browser loads the report again; None: never.

    Returns:
      Whether all runs have taken all their steps.

    Raises:
      UsageError: if a folder is not a run folder, or `out` exists and is not a report or can't be written.
    """
    folders, out = [check_path("runs", run) for run in runs], check_path("out", out)
    try:
        if out.exists() and not _is_report(out):
            raise UsageError(f"{out} exists and is not a report: name another out file.")
    except OSError as error:
        raise UsageError(f"the report {out} can't be written ({error.strerror}): name another out file.") from None
    found = [read(run, name) for run, name in zip(folders, _names(folders), strict=True)]
    finished = all(run.is_finished for run in found)
    files.write(out, render(found, refresh=None if finished else refresh))
    return finished


def watch(runs: Sequence[Path | str], out: Path | str) -> None:
    """Write a report again and again until all its runs have taken all their steps.

    Raises:
      UsageError: as `write` does.
    """
    while not write(runs, out, refresh=RENEWED_EVERY):
        time.sleep(RENEWED_EVERY)


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with files.reading(path) as file:
        return file.read(len(HEAD)) == HEAD.encode()


def _names(runs: list[Path]) -> list[str]:
    """Paths of the runs relative to their common folder; bytes that are not text are shown as escapes."""
    paths = [Path(os.fsencode(run.resolve()).decode(errors="backslashreplace")) for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]
