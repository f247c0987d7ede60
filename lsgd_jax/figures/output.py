"""Writes figures with their curves and numbers."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lsgd_jax import files
from lsgd_jax.checks import check_path


def write(
    out: Path | str, name: str, figure: Figure, columns: list[str], rows: Iterable[list], summary: dict[str, Any]
) -> None:
    """Write a figure as PNG, SVG and PDF, its curves as CSV and its summary as JSON.

    Raises:
      UsageError: if they can't be written.
    """
    out = check_path("out", out)
    write_formats(out / f"{name}.png", figure, dpi=150, bbox_inches="tight")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    files.write(out / f"{name}.csv", table.getvalue())
    files.write(out / f"{name}.json", json.dumps(summary, indent=2) + "\n")


def write_formats(path: Path, figure: Figure, **options: Any) -> None:
    """Write a figure as PNG and, beside it, as SVG and PDF, in the layout of the first, which the figure keeps."""
    for suffix in (".png", ".svg", ".pdf"):
        write_picture(path.with_suffix(suffix), figure, **options)
        figure.set_layout_engine("none")  # To find it takes as long as to draw.


def write_picture(path: Path, figure: Figure, **options: Any) -> None:
    """Write a figure in the format that the name says; the same figure gives the same bytes.

    Args:
      path: of the file.
      figure: to write.
      **options: of Matplotlib's `savefig`.

    Raises:
      UsageError: if it can't be written.
    """
    kind, picture = path.suffix.removeprefix("."), io.BytesIO()
    unknown = {"png": ["Software"], "svg": ["Date", "Creator"], "pdf": ["CreationDate", "Creator", "Producer"]}[kind]
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(picture, format=kind, metadata=dict.fromkeys(unknown), **options)
    files.write(path, picture.getvalue())
