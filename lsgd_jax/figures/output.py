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
    """Write a figure as PNG and, beside it, as SVG and PDF."""
    for suffix in (".png", ".svg", ".pdf"):
        write_picture(path.with_suffix(suffix), figure, **options)


def write_picture(path: Path, figure: Figure, dpi: float, **options: Any) -> None:
    """Write a figure in the format that the name says; the same figure gives the same bytes.

    A figure with a layout engine is laid out when it is first written, and keeps this layout.

    Args:
      path: of the file.
      figure: to write.
      dpi: dots per inch.
      **options: others of Matplotlib's `savefig`.

    Raises:
      UsageError: if it can't be written.
    """
    kind, picture = path.suffix.removeprefix("."), io.BytesIO()
    unknown = {"png": ["Software"], "svg": ["Date", "Creator"], "pdf": ["CreationDate", "Creator", "Producer"]}[kind]
    with matplotlib.rc_context(
        {
            "svg.hashsalt": path.name,
            "svg.fonttype": "none",
            "figure.autolayout": False,
            "figure.constrained_layout.use": False,
        }
    ):
        if engine := figure.get_layout_engine():  # With one, `savefig` draws everything twice.
            figure.set_dpi(dpi)
            engine.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(picture, format=kind, dpi=dpi, metadata=dict.fromkeys(unknown), **options)
    files.write(path, picture.getvalue())
