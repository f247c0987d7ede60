"""What an exchange costs as workers and parameters grow: a model, checked against what exchanges.py has measured.

    python -m benchmarks.communication.scaling

A way of sending that takes m messages one after the other, and b bytes through the busiest link, takes

    t = latency * m + stretch * b / bandwidth

with m = 2 (n - 1) and b = 2 (n - 1) / n |x| for an all-reduce among n workers, m = K + n - 2 and b = m / K |x| for a
ring or a chain of K chunks. The latency and the stretch (headers, and what the processors add) of each are fitted to
the least disturbed times with 2 and 4 workers over links of 200 Mbit/s, in their logarithms; those with 8 check them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from lsgd_jax.exchange import CHUNKS
from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results"
MEGABITS = 200
WAYS = ("all-reduce", "ring", "chain")
WORKERS = (2, 4, 8, 16, 32, 64)
PARAMETERS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)


def main() -> None:
    """Fit, check, and print and keep what the model says."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measured = json.loads((RESULTS / "exchanges.json").read_text())["cells"]
    cells = [cell for cell in measured if cell["megabits"] == MEGABITS]
    result: dict[str, Any] = {"megabits": MEGABITS, "latency, s": {}, "stretch": {}, "checked": [], "model, s": {}}
    for way in WAYS:
        fitted = [cell for cell in cells if cell["processes"] <= 4]
        sizes = [(cell["processes"], cell["parameters"]) for cell in fitted]
        times = np.array([np.min(cell["ways"][way]["seconds"]) for cell in fitted])
        latency, stretch = fit(way, sizes, times)
        result["latency, s"][way], result["stretch"][way] = latency, stretch
        result["model, s"][way] = [
            [seconds(way, workers, parameters, latency, stretch) for workers in WORKERS] for parameters in PARAMETERS
        ]
        for cell in cells:
            took = float(np.min(cell["ways"][way]["seconds"]))
            ratio = seconds(way, cell["processes"], cell["parameters"], latency, stretch) / took
            where = {"processes": cell["processes"], "parameters": cell["parameters"]}
            result["checked"].append({"way": way, **where, "seconds": took, "model / measured": ratio})
    (RESULTS / "scaling.json").write_text(json.dumps(result | {"environment": environment()}, indent=1) + "\n")
    print("\n".join(tables(result)))


def seconds(way: str, workers: int, parameters: int, latency: float, stretch: float) -> float:
    """The model's time of an exchange."""
    if way == "all-reduce":
        messages, share = 2 * (workers - 1), 2 * (workers - 1) / workers
    else:
        messages, share = CHUNKS + workers - 2, (CHUNKS + workers - 2) / CHUNKS
    return latency * messages + stretch * share * 4 * parameters * 8 / (MEGABITS * 1e6)


def fit(way: str, sizes: list[tuple[int, int]], times: np.ndarray) -> tuple[float, float]:
    """The latency and the stretch that come nearest to the times."""

    def misfit(logarithms: np.ndarray) -> np.ndarray:
        latency, stretch = np.exp(logarithms)
        return np.log([seconds(way, *size, latency, stretch) for size in sizes] / times)

    latency, stretch = np.exp(least_squares(misfit, np.log([1e-3, 1.0])).x)
    return float(latency), float(stretch)


def tables(result: dict[str, Any]) -> list[str]:
    """The check and the model as markdown."""
    lines = ["| way | latency | stretch | workers | parameters | model / measured |", "|---|---|---|---|---|---|"]
    for row in result["checked"]:
        way, held_out = row["way"], "" if row["processes"] <= 4 else " (not fitted)"
        fitted = f"{1000 * result['latency, s'][way]:.2f} ms | {result['stretch'][way]:.2f}"
        cells = f"{row['processes']}{held_out} | {row['parameters']:,} | {row['model / measured']:.2f}"
        lines.append(f"| {way} | {fitted} | {cells} |")
    lines += ["", f"chain's time / all-reduce's, {MEGABITS} Mbit/s, by the model", ""]
    lines += ["| parameters | " + " | ".join(f"{n} workers" for n in WORKERS) + " |", "|---|" + "---|" * len(WORKERS)]
    for parameters, chain, whole in zip(
        PARAMETERS, result["model, s"]["chain"], result["model, s"]["all-reduce"], strict=True
    ):
        ratios = " | ".join(f"{a / b:.2f}" for a, b in zip(chain, whole, strict=True))
        lines.append(f"| {parameters:,} | {ratios} |")
    return lines


if __name__ == "__main__":
    main()
