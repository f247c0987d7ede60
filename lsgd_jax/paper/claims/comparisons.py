"""Networks: test error and communication of LSGD compared with other methods."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax import files
from lsgd_jax.checks import check_path
from lsgd_jax.compare.statistics import over_seeds
from lsgd_jax.errors import UsageError
from lsgd_jax.paper.claims.base import Findings, Row

RIVALS = {"easgd": "EASGD", "downpour": "DOWNPOUR", "data_parallel": "data-parallel SGD"}


def read(runs: Path | str) -> Findings:
    """Read test error and communication from the comparisons by `lsgd compare` in the subfolders of `runs`.

    Raises:
      UsageError: if a file there was not written by a comparison.
    """
    rows, numbers = [], {}
    for path in sorted(check_path("runs", runs).glob("*/comparison.json")):
        try:
            summary = files.parse_json(files.read_text(path))
            methods, name = summary["methods"], path.parent.name
            measure = summary.get("headline", {}).get("name", "error")
            if "lsgd" not in methods or measure != "error":  # Without LSGD, or of another task than classification.
                continue
            command = summary["environment"]["command"]
            rivals = [rival for rival in RIVALS if rival in methods]
            finals = {
                method: np.ravel(methods[method]["final_error"]["values"]).astype(float) for method in ("lsgd", *rivals)
            }
            differences = {rival: 100 * (finals[rival] - finals["lsgd"]) for rival in rivals}
            rows += [_error_row(name, rival, command, differences[rival]) for rival in rivals]
            rows += [_bytes_row(name, rival, command, methods, summary["target_error"]) for rival in rivals]
        except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"{path} was not written by a comparison ({error}): name another runs folder.") from None
        numbers[name] = {rival: _with_none(difference) for rival, difference in differences.items()}
    return Findings(rows, [], {"test error minus LSGD's (%), paired by seed": numbers} if numbers else {})


def _with_none(values: np.ndarray) -> list[float | None]:
    """The values as JSON has them: None for seeds that have failed."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _error_row(name: str, rival: str, command: str, difference: np.ndarray) -> Row:
    count, of = len(difference), over_seeds(difference)
    mean, half = of["mean"], of["half_width"]
    known = half is not None  # Not with failed seeds, with one seed, or where all differ by the same.
    verdict = "tie"
    if (known and mean - half > 0) or (count >= 5 and (difference > 0).all()):
        verdict = "holds"
    elif (known and mean + half < 0) or (count >= 5 and (difference < 0).all()):
        verdict = "fails"
    failed = np.isnan(difference).sum()
    shown = f"{failed} failed" if failed else f"{mean:.2f} %" + (f" ± {half:.2f}" if known else "")
    return Row(
        f"lower test error than {RIVALS[rival]} ({name})",
        "experiments",
        command,
        f"{RIVALS[rival]} minus LSGD, paired by seed: {shown}, higher in {(difference > 0).sum()} of"
        f" {count} seeds, after equal steps",
        verdict,
    )


def _bytes_row(name: str, rival: str, command: str, methods: dict[str, Any], target: float) -> Row:
    own, other = methods["lsgd"]["megabytes_to_target"], methods[rival]["megabytes_to_target"]
    shown = ["never" if number is None else f"{number:.1f} MB" for number in (own, other)]
    if own is None:
        verdict = "tie" if other is None else "fails"
    elif other is None or other > 1.1 * own:
        verdict = "holds"
    else:
        verdict = "tie" if other > own / 1.1 else "fails"
    return Row(
        f"less communication than {RIVALS[rival]} ({name})",
        "experiments",
        command,
        f"sent by a worker to {target:.0%} test error: LSGD {shown[0]}, {RIVALS[rival]} {shown[1]}",
        verdict,
    )
