"""Writes figures with their curves and numbers."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lsgd_jax import files
from lsgd_jax.checks import check_path


def write(
    out: Path | str, name: str, figure: Figure, columns: list[str], rows: Iterable[list], summary: dict[str, Any]
) -> None:
    """Write a figure as PNG, its curves as CSV and its summary as JSON.

    Raises:
      UsageError: if they can't be written.
    """
    out = check_path("out", out)
    write_picture(out / f"{name}.png", figure, dpi=150, bbox_inches="tight")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    files.write(out / f"{name}.csv", table.getvalue())
    files.write(out / f"{name}.json", json.dumps(summary, indent=2) + "\n")


def write_picture(path: Path, figure: Figure, **options: Any) -> None:
    """Write a figure as PNG; `options` are passed to Matplotlib's `savefig`.

    Raises:
      UsageError: if it can't be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None}, **options)
    files.write(path, picture.getvalue())
