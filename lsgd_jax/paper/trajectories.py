"""Trajectories in a convex bowl (the paper's F1): EAGD bends paths toward the workers' mean, LGD toward the leader.

lsgd figure trajectories
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from lsgd_jax.figures.output import write
from lsgd_jax.paper.descent import (
    METHODS,
    PATH_COLUMNS,
    STARTS,
    WORKER_COLORS,
    Descent,
    descend,
    methods,
    path_rows,
)
from lsgd_jax.paper.objectives import bowl

ETA, PULL, ITERATIONS = 0.02, 0.1, 100


def make(out: Path | str) -> str:
    """Compute the figure and write it to a folder; returns a text summary."""
    descents = {
        name: descend(method, bowl, jnp.array(STARTS), ITERATIONS) for name, method in methods(ETA, PULL).items()
    }
    lengths = {name: _path_lengths(descent).tolist() for name, descent in descents.items()}
    after = ITERATIONS // 10
    summary = {
        "eta": ETA,
        "pull": PULL,
        "iterations": ITERATIONS,
        "path lengths": lengths,
        f"best value after {after} iterations": {n: float(d.values[:, after].min()) for n, d in descents.items()},
        f"values after {after} iterations": {n: d.values[:, after].tolist() for n, d in descents.items()},
    }
    write(out, "trajectories", _draw(descents), PATH_COLUMNS, path_rows(descents), summary)
    lines = [
        f"{name:12} path lengths {', '.join(f'{length:.1f}' for length in lengths[name])};"
        f" values after {after} iterations {', '.join(f'{v:.1f}' for v in descents[name].values[:, after])}"
        for name in METHODS
    ]
    return "\n".join(lines)


def _path_lengths(descent: Descent) -> np.ndarray:
    return np.linalg.norm(np.diff(np.asarray(descent.x), axis=1), axis=-1).sum(axis=1)


def _draw(descents: dict[str, Descent]) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    side = np.linspace(-24, 24, 200)
    heights = side[None] ** 2 + side[:, None] ** 2
    for axes, name in zip(figure.subplots(1, 3, sharex=True, sharey=True), METHODS, strict=True):
        axes.contour(side, side, heights, levels=12, colors="0.85", linewidths=0.7)
        for worker, path in enumerate(np.asarray(descents[name].x)):
            color = WORKER_COLORS[worker]
            axes.plot(*path.T, marker=".", markersize=3, linewidth=1, color=color, label=f"worker {worker}")
            axes.plot(*path[0], "o", color=color, markerfacecolor="white", markersize=7)
        axes.plot(0, 0, "*", color="black", markersize=10, label="minimum")
        axes.set(title=f"{name} (circles: starts)", xlabel="x", aspect="equal")
    figure.axes[0].set_ylabel("y")
    figure.axes[0].legend(fontsize=8)
    return figure
