"""A heavily nonconvex function (the paper's F2): elastic averaging stalls between the workers' rings, LGD does not.

lsgd figure nonconvex
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsgd_jax.figures.output import write, write_formats
from lsgd_jax.paper.descent import (
    COLORS,
    METHODS,
    PATH_COLUMNS,
    STARTS,
    WORKER_COLORS,
    Descent,
    descend,
    methods,
    path_rows,
)
from lsgd_jax.paper.objectives import sinc_rings

ETA, PULL, ITERATIONS = 0.1, 0.1, 100
BOXES, RUNS = (20, 10, 5), 2000
GLOBAL_MINIMUM = -0.2172
"""Value on the ring r = 1.43; a worker below -0.21 counts as in the global minimum."""
RINGS = ((1.4303, GLOBAL_MINIMUM), (3.4709, -0.0913), (5.4815, -0.0580), (7.4855, -0.0425), (9.4878, -0.0335))


def make(out: Path | str) -> str:
    """Compute the figure and write it to a folder; returns a text summary."""
    descents = {
        name: descend(method, sinc_rings, jnp.array(STARTS), ITERATIONS) for name, method in methods(ETA, PULL).items()
    }
    final = {name: descent.values[:, -1].tolist() for name, descent in descents.items()}
    reached = {f"[-{box}, {box}]^2": random_starts(box) for box in BOXES}
    summary = {
        "eta": ETA,
        "pull": PULL,
        "iterations": ITERATIONS,
        "final values from the paper's starts": final,
        f"workers in the global minimum, {RUNS} runs from random starts": reached,
    }
    write(out, "nonconvex", _draw(descents, reached), PATH_COLUMNS, path_rows(descents), summary)
    write_formats(Path(out) / "leaders_escape.png", _in_short(descents, reached), dpi=150)
    lines = [f"{name:12} ends at {', '.join(f'{value:.4f}' for value in final[name])}" for name in METHODS]
    for box, share in reached.items():
        shares = ", ".join(f"{name} {share[name]:.1%}" for name in METHODS)
        lines.append(f"{RUNS} starts in {box:13} workers in the global minimum: {shares}")
    return "\n".join(lines)


def random_starts(box: float, runs: int = RUNS) -> dict[str, float]:
    """Share of workers in the global minimum, over runs of four workers from uniform starts in a square."""
    starts = jax.random.uniform(jax.random.key(0), (runs, 4, 2), minval=-box, maxval=box)

    def reached(method: object) -> float:
        final = jax.vmap(lambda s: descend(method, sinc_rings, s, ITERATIONS, keep_x=False).values[:, -1])(starts)
        return float(jnp.mean(final < -0.21))

    return {name: reached(method) for name, method in methods(ETA, PULL).items()}


def _draw(descents: dict[str, Descent], reached: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(13, 12), layout="constrained")
    axes = figure.subplots(4, 2, height_ratios=(1, 1, 1, 0.7))
    for (plane, curve), name in zip(axes[:3], METHODS, strict=True):
        _draw_paths(plane, descents[name])
        for worker, values in enumerate(np.asarray(descents[name].values)):
            curve.plot(values, linewidth=1, color=WORKER_COLORS[worker], label=f"worker {worker}")
        for _, height in RINGS[:3]:
            curve.axhline(height, linestyle="--", color="0.75", linewidth=0.8)
        plane.set(title=f"{name}: paths (circles: starts, crosses: ends; gray: minima)", ylabel="y")
        curve.set(title=f"{name}: objective (gray: minima)", ylabel="L(x, y)", ylim=(-0.24, 0.15))
    axes[0, 1].legend(fontsize=8)
    axes[2, 0].set_xlabel("x")
    axes[2, 1].set_xlabel("iteration")
    left, right = axes[3]
    side = np.linspace(-22, 22, 1000)
    left.plot(side, np.sinc(side), color="black", linewidth=1)
    left.set(title="L along a line through the origin", xlabel="distance from the origin", ylabel="L")
    place = np.arange(len(reached))
    for offset, name in enumerate(METHODS):
        shares = [share[name] for share in reached.values()]
        bars = right.bar(place + 0.27 * (offset - 1), shares, 0.25, label=name, color=COLORS[name])
        right.bar_label(bars, fmt="{:.0%}", fontsize=8)
    right.set_xticks(place, [box.replace("^2", "²") for box in reached])
    right.set(title=f"workers in the global minimum, {RUNS} random starts", ylabel="share of workers", ylim=(0, 1))
    right.legend(fontsize=8)
    return figure


def _in_short(descents: dict[str, Descent], reached: dict[str, dict[str, float]]) -> Figure:
    """Three panels that can be read on a phone: the paths with either pull, and how often the minimum is found."""
    with matplotlib.rc_context({"font.size": 13, "axes.titlesize": 14}):
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        *planes, shares = figure.subplots(1, 3)
        for plane, name, title in zip(planes, METHODS, ("elastic averaging", "leader"), strict=False):
            _draw_paths(plane, descents[name], linewidth=2)
            plane.set(title=title, xticks=(), yticks=(), xlim=(-18, 22), ylim=(-21, 17))
        place = np.arange(len(reached))
        for offset, (name, label) in enumerate(zip(METHODS, ("averaging", "leader", "alone"), strict=True)):
            heights = [100 * share[name] for share in reached.values()]
            shares.bar(place + 0.27 * (offset - 1), heights, 0.25, label=label, color=COLORS[name])
        shares.set_xticks(place, [f"±{box}" for box in BOXES])
        shares.set(title="workers in the\nglobal minimum (%)", xlabel="starts", ylim=(0, 100))
        shares.legend(fontsize=11, frameon=False, loc="upper left")
        shares.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_paths(axes: Axes, descent: Descent, linewidth: float = 1) -> None:
    """Plot the workers' paths between the rings of minima."""
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius, _ in RINGS:
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="0.8", linewidth=0.8)
    for worker, path in enumerate(np.asarray(descent.x)):
        color = WORKER_COLORS[worker]
        axes.plot(*path.T, color=color, linewidth=linewidth)
        axes.plot(*path[0], "o", color=color, markerfacecolor="white", markersize=6)
        axes.plot(*path[-1], "x", color="black", markersize=6, zorder=3)
    axes.set_aspect("equal")
