"""What a figure leaves behind."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lsgd_jax.checks import check_path


def write(
    out: Path | str, name: str, figure: Figure, columns: list[str], rows: Iterable[list], summary: dict[str, Any]
) -> None:
    """Write a figure, the curves in it as CSV, and its summary as JSON."""
    out = check_path("out", out)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    with (out / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    (out / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
