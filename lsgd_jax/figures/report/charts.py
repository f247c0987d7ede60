"""Charts of a report, as SVG."""

import html
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
"""Points per chart up to which lines are vectors; beyond, they are rasterized."""
MOST_STEPS = 300
"""Steps per band; beyond, neighboring steps are merged."""


_FOREGROUND = "#012345"
"""Placeholder color of a chart's text and frame; the page substitutes its own."""
_CHART: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": False,  # Lines may be rasterized, but not the tick labels.
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
    """Render a chart with its caption as HTML.

    Args:
      draw: draws the chart.
      caption: caption below the chart.
      name: name of the run, which together with the caption makes element ids unique in the page.
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
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])  # Not needed in a page.
    caption = html.escape(caption)
    svg = svg.replace(_FOREGROUND, "currentColor").replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def draw_band(axes: Axes, values: list[tuple[int, np.ndarray]], label: str) -> None:
    """Plot the median of the values per step, and their range."""
    steps = np.concatenate([np.full(each.shape, step) for step, each in values])
    numbers = np.concatenate([each for _, each in values])
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
    x, there = run.curves.steps, np.isfinite(run.losses)
    means = np.where(there, run.losses, 0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)
    figures.draw_workers(axes, x, run.losses)
    axes.plot(x, means, color="tab:red", linewidth=1.5, marker=figures.marker_of(x), label="mean")
    axes.set(xlabel="local steps", ylabel="training loss")
    figures.scale(axes, run.losses)
    axes.legend()


def _draw_bytes(axes: Axes, run: Run) -> None:
    x = run.curves.steps
    axes.plot(x, run.bytes_sent / 1e6, marker=figures.marker_of(x))
    axes.set(xlabel="local steps", ylabel="MB sent per worker", ylim=(0, None))


def _draw_own_steps(axes: Axes, run: Run) -> None:
    figures.draw_workers(axes, run.curves.seconds, run.worker_steps)
    axes.set(xlabel="seconds of training", ylabel="a worker's local steps", ylim=(0, None))


def capital(text: str) -> str:
    """Return a text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


class Chart(NamedTuple):
    """Chart that is not drawn yet."""

    title: str
    """Heading of the charts shown side by side."""
    caption: str
    draw: Callable[[Axes], None]


def charts_of(run: Run) -> Iterator[Chart]:
    """Yield the charts of a run."""
    curves, headline = run.curves, run.config.task.headline
    if len(curves.steps):
        measure = capital(headline.title)
        title, draw = f"{measure} and training loss", partial(figures.draw_curves, curves=curves, headline=headline)
        yield Chart(title, f"{measure} by step.", partial(draw, x=curves.steps, label="local steps"))
        by_time = partial(draw, x=curves.seconds, label="seconds of training")
        yield Chart(title, f"{measure} by wall-clock time, evaluations excluded.", by_time)
        yield Chart(title, "Training loss, averaged since the previous evaluation.", partial(_draw_losses, run=run))
        yield Chart(title, "Communication per worker.", partial(_draw_bytes, run=run))
        if run.worker_steps.size:
            yield Chart(title, "Progress of each worker.", partial(_draw_own_steps, run=run))
    for title, (steps, leaders, _) in run.elections.items():
        if len(leaders):
            count = max(run.config.groups * run.config.workers, curves.workers.shape[1], leaders.max() + 1)
            by_step = partial(figures.draw_leaders, steps=steps, leaders=leaders, count=count)
            yield Chart(title, f"{title}, by step.", by_step)
            share = partial(figures.draw_shares, leaders=leaders, count=count)
            yield Chart(title, f"{title}: number of exchanges led by each worker ({len(leaders):,} total).", share)
    spreads = {f"distance to the {title.lower()}": elections.distances for title, elections in run.elections.items()}
    for label, values in (spreads | {"score": run.scores}).items():
        if any(np.isfinite(each).any() for _, each in values):
            caption = f"Workers' {label} at exchanges: median and range."
            yield Chart("Worker divergence", caption, partial(draw_band, values=values, label=label))
