"""Report on runs as one self-contained HTML file, with inline SVG charts and styles; works offline."""

import os
from collections.abc import Sequence
from pathlib import Path

from lsgd_jax import files
from lsgd_jax.checks import check_path
from lsgd_jax.errors import UsageError
from lsgd_jax.figures.report.page import HEAD, render
from lsgd_jax.figures.report.reading import read


def write(runs: Sequence[Path | str], out: Path | str) -> None:
    """Write a report on runs.

    Args:
      runs: run folders.
      out: output file; an existing report is replaced, any other file is not.

    Raises:
      UsageError: if a folder is not a run folder, or `out` exists and is not a report or can't be written.
    """
    folders, out = [check_path("runs", run) for run in runs], check_path("out", out)
    try:
        if out.exists() and not _is_report(out):
            raise UsageError(f"{out} exists and is not a report: name another out file.")
    except OSError as error:
        raise UsageError(f"the report {out} can't be written ({error.strerror}): name another out file.") from None
    files.write(out, render([read(run, name) for run, name in zip(folders, _names(folders), strict=True)]))


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
