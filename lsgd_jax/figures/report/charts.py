"""The charts in a report, as SVG."""

import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsgd_jax.figures import run as figures
from lsgd_jax.figures.report.reading import Run

MOST_POINTS = 2000
"""In the lines of a chart; more are drawn as pixels."""
MOST_STEPS = 300
"""In a band; of more, neighbours are taken together."""


_FOREGROUND = "#012345"
"""Of a chart's text and frame; the page puts its own colour there."""
_CHART: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": False,  # Lines may become pixels, but not the numbers at the axes.
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.transparent": True,
    "text.color": _FOREGROUND,
    "axes.edgecolor": _FOREGROUND,
    "axes.labelcolor": _FOREGROUND,
    "grid.color": _FOREGROUND,
    "xtick.color": _FOREGROUND,
    "ytick.color": _FOREGROUND,
}


def picture(draw: Callable[[Axes], None], caption: str, name: str) -> str:
    """A chart with its caption.

    Args:
      draw: draws it.
      caption: below it.
      name: of the run. With the caption it tells the charts of a page apart.
    """
    with matplotlib.rc_context(_CHART | {"svg.hashsalt": f"{name} {caption}"}):
        figure = Figure(figsize=(5.6, 3.3))
        axes = figure.add_axes((0.13, 0.14, 0.85, 0.82))
        draw(axes)
        if sum(np.size(line.get_xdata()) for line in axes.lines) > MOST_POINTS:
            axes.set_rasterization_zorder(2.1)  # Just above lines.
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(
        r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", svg[svg.index("<svg") :]
    )  # In a page they aren't needed.
    svg = svg.replace(_FOREGROUND, "currentColor").replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def draw_band(axes: Axes, values: list[tuple[int, np.ndarray]], label: str) -> None:
    """Draw the median of the values on each step, and from the lowest to the highest."""
    steps = np.concatenate([np.full(of.shape, step) for step, of in values])
    numbers = np.concatenate([of for _, of in values])
    steps, numbers = steps[np.isfinite(numbers)], numbers[np.isfinite(numbers)]
    distinct = np.unique(steps)
    rows = []
    for some in np.array_split(distinct, min(len(distinct), MOST_STEPS)):
        on_these = numbers[(steps >= some[0]) & (steps <= some[-1])]
        rows.append((some[-1], *np.quantile(on_these, (0, 0.5, 1))))
    x, low, middle, high = np.array(rows).T
    axes.fill_between(x, low, high, color="tab:blue", alpha=0.25, linewidth=0)
    axes.plot(x, middle, color="tab:blue", linewidth=1.2, marker=figures.marker_of(x))
    axes.set(xlabel="local steps", ylabel=label)
    figures.scale(axes, numbers)


def _draw_losses(axes: Axes, run: Run) -> None:
    x, there = run.errors.steps, np.isfinite(run.losses)
    means = np.where(there, run.losses, 0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)
    figures.draw_workers(axes, x, run.losses)
    axes.plot(x, means, color="tab:red", linewidth=1.5, marker=figures.marker_of(x), label="mean")
    axes.set(xlabel="local steps", ylabel="training loss")
    figures.scale(axes, run.losses)
    axes.legend()


def _draw_bytes(axes: Axes, run: Run) -> None:
    x = run.errors.steps
    axes.plot(x, run.bytes_sent / 1e6, marker=figures.marker_of(x))
    axes.set(xlabel="local steps", ylabel="MB sent by a worker", ylim=(0, None))


def _draw_own_steps(axes: Axes, run: Run) -> None:
    figures.draw_workers(axes, run.errors.seconds, run.worker_steps)
    axes.set(xlabel="seconds of training", ylabel="a worker's local steps", ylim=(0, None))


class Chart(NamedTuple):
    """A chart to be."""

    title: str
    """Of the charts that stand together."""
    caption: str
    draw: Callable[[Axes], None]


def charts_of(run: Run) -> Iterator[Chart]:
    """The charts about a run."""
    errors = run.errors
    if len(errors.steps):
        title = "Test error and training loss"
        by_step = partial(figures.draw_errors, x=errors.steps, errors=errors, label="local steps")
        by_time = partial(figures.draw_errors, x=errors.seconds, errors=errors, label="seconds of training")
        yield Chart(title, "Test error by step.", by_step)
        yield Chart(title, "Test error by wall-clock, without the time that evaluations took.", by_time)
        yield Chart(title, "Training loss, the mean since the evaluation before.", partial(_draw_losses, run=run))
        yield Chart(title, "What each worker has sent.", partial(_draw_bytes, run=run))
        if run.worker_steps.size:
            yield Chart(title, "How far each worker has come.", partial(_draw_own_steps, run=run))
    for title, (steps, leaders, _) in run.elections.items():
        if len(leaders):
            count = max(run.config.groups * run.config.workers, errors.workers.shape[1], leaders.max() + 1)
            by_step = partial(figures.draw_leaders, steps=steps, leaders=leaders, count=count)
            yield Chart(title, f"{title}, by step.", by_step)
            share = partial(figures.draw_shares, leaders=leaders, count=count)
            yield Chart(title, f"{title}: how often each worker was it, of {len(leaders):,} times.", share)
    spreads = {f"distance to {title.lower()}": of.distances for title, of in run.elections.items()}
    for label, values in (spreads | {"score": run.scores}).items():
        if any(np.isfinite(of).any() for _, of in values):
            caption = f"The workers' {label} at exchanges: the median, and from the lowest to the highest."
            yield Chart("How far workers are apart", caption, partial(draw_band, values=values, label=label))
