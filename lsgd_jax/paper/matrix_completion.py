"""Low-rank matrix completion (the paper's F3): elastic averaging stalls on plateaus, the leader converges linearly.

lsgd figure matrix-completion
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from lsgd_jax.figures.output import write
from lsgd_jax.paper.descent import COLORS, METHODS, descend, methods
from lsgd_jax.paper.objectives import matrix_completion, matrix_completion_problem

DIMENSION, RANKS, WORKERS, ITERATIONS = 1000, (1, 10, 50, 100), 8, 50
ETA, LAMBDA = 5e-4, 0.5
"""The paper's pull is that of the objective (eq. 1): a step pulls by eta lambda = 2.5e-4."""
Curves = dict[int, dict[str, np.ndarray]]
"""Objective values [workers, iterations] by rank and method."""


def make(out: Path | str) -> str:
    """Compute the figure and write it to a folder; returns a text summary."""
    curves = solve(DIMENSION)
    with jax.enable_x64(True):
        double = solve(DIMENSION)
    plateaus = {f"lambda {scale}": _plateaus(ETA * scale) for scale in (0.1, 0.2, 1.0)}
    summary = {
        "dimension": DIMENSION,
        "workers": WORKERS,
        "iterations": ITERATIONS,
        "eta": ETA,
        "lambda": LAMBDA,
        "float32": _summary(curves),
        "float64": _summary(double),
        f"best EAGD worker after {ITERATIONS} iterations with other pulls": plateaus,
    }
    rows = (
        [rank, method, worker, iteration, value]
        for rank, by_method in curves.items()
        for method, values in by_method.items()
        for worker, series in enumerate(values.tolist())
        for iteration, value in enumerate(series)
    )
    write(out, "matrix_completion", _draw(curves), ["rank", "method", "worker", "iteration", "value"], rows, summary)
    lines = [
        f"rank {rank:3} {method:12} after {ITERATIONS} iterations: best {values[:, -1].min():.1e}, median"
        f" {np.median(values[:, -1]):.1e}, worst {values[:, -1].max():.1e}"
        f" (float64: best {double[rank][method][:, -1].min():.1e})"
        for rank, by_method in curves.items()
        for method, values in by_method.items()
    ]
    lines += [
        f"EAGD's plateaus with {scale}: " + ", ".join(f"{rank} {value:.2g}" for rank, value in values.items())
        for scale, values in plateaus.items()
    ]
    return "\n".join(lines)


def _plateaus(pull: float) -> dict[str, float]:
    """Final value of the best EAGD worker with another pull, by rank."""
    ends = {}
    for rank in RANKS:
        target, starts = matrix_completion_problem(jax.random.key(0), DIMENSION, rank, WORKERS)
        method = methods(ETA, pull)["EAGD"]
        values = descend(method, matrix_completion, starts, ITERATIONS, target, keep_x=False).values
        ends[f"rank {rank}"] = float(values[:, -1].min())
    return ends


def solve(dimension: int, eta: float = ETA, ranks: tuple[int, ...] = RANKS) -> Curves:
    """Solve each problem with each method; returns all workers' values at every iteration."""
    curves: Curves = {}
    for rank in ranks:
        target, starts = matrix_completion_problem(jax.random.key(0), dimension, rank, WORKERS)
        curves[rank] = {
            name: np.asarray(descend(method, matrix_completion, starts, ITERATIONS, target, keep_x=False).values)
            for name, method in methods(eta, eta * LAMBDA).items()
        }
    return curves


def _summary(curves: Curves) -> dict[str, Any]:
    def of(values: np.ndarray) -> dict[str, float]:
        return {"best": float(values.min()), "median": float(np.median(values)), "worst": float(values.max())}

    return {
        f"rank {rank}": {
            method: {f"iteration {i}": of(values[:, i]) for i in (0, 30, 40, ITERATIONS)}
            for method, values in by_method.items()
        }
        for rank, by_method in curves.items()
    }


def _draw(curves: Curves) -> Figure:
    figure = Figure(figsize=(16, 4), layout="constrained")
    for axes, (rank, by_method) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for method in METHODS:
            values, color = by_method[method], COLORS[method]
            # The best independent worker lies on the leader's curve: dotted, so that both show.
            style, shade = (":", "black") if method == "independent" else ("-", color)
            axes.semilogy(values.min(0), style, color=shade, linewidth=2, label=f"{method}: best")
            axes.semilogy(np.median(values, 0), "--", color=color, linewidth=1, label=f"{method}: median")
            axes.fill_between(np.arange(ITERATIONS + 1), values.min(0), values.max(0), color=color, alpha=0.12)
        axes.set(title=f"rank {rank}", xlabel="iteration")
    figure.axes[0].set_ylabel("F(X), best, median and range of 8 workers")
    figure.axes[0].legend(fontsize=8)
    return figure
