"""Figure of a run: its headline measure, its training loss and the leaders, as in the paper's F8."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lsgd_jax.checks import check_path
from lsgd_jax.errors import UsageError
from lsgd_jax.figures.output import write_picture
from lsgd_jax.figures.palette import look, looks
from lsgd_jax.task import Headline
from lsgd_jax.tracking.run_folder import making_sense_of, read_config, read_metrics

MOST_WORKERS = 2**16
"""Workers per figure."""
MOST_BARS = 256
"""Workers up to which each gets a row and a bar; beyond, the figure shows points and the outline."""
MOST_NUMBERS = 10**8
"""Numbers per metric, over all workers and evaluations of a run."""


def draw(run: Path | str) -> Path:
    """Draw the figure of a run and write it to the run folder; returns its path.

    Raises:
      UsageError: if the folder is not that of a run with an evaluation, or can't be written.
    """
    run = check_path("run", run)
    config = read_config(run)
    headline, curves = config.task.headline, curves_of(run, config.task.headline)
    exchange_steps, leaders = leaders_of(run)
    if not len(curves.steps):
        raise UsageError(f"the run in {run} has not been evaluated yet.")

    rows = 2 if len(leaders) else 1  # The second shows the leaders.
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    measures, losses = panels[0]
    draw_curves(measures, curves, headline)
    draw_losses(losses, curves.steps, losses_of(run))
    name = look(config.method).name
    measures.set_title(f"{name} on {config.task}, {config.groups} x {config.workers} workers, seed {config.seed}")
    losses.set_title(f"final {headline.title} {headline.text(curves.center[-1], space=' ')}")

    if len(leaders):
        count = max(curves.workers.shape[1], leaders.max() + 1)  # Some may have left before an evaluation.
        identity, share = panels[1]
        if count > MOST_BARS:
            draw_leaders(identity, exchange_steps, leaders, count)
        else:
            draw_members(identity, exchange_steps, leaders[:, None] == np.arange(count))
        draw_shares(share, leaders, count)
        identity.set_title("global leader")
        share.set_title(f"exchanges led by each worker ({len(leaders)} total)")
    path = run / "curves.png"
    write_picture(path, figure, dpi=120)
    return path


class Curves(NamedTuple):
    """Headline measure at the evaluations of a run; NaN where it is not finite."""

    steps: Int[np.ndarray, " evaluations"]
    seconds: Float[np.ndarray, " evaluations"]
    """Seconds of training."""
    center: Float[np.ndarray, " evaluations"]
    workers: Float[np.ndarray, "evaluations workers"]
    """Measure of each worker; NaN for absent workers."""
    leader: Float[np.ndarray, " evaluations"]
    """Measure of the latest global leader; NaN before the first election."""


def curves_of(run: Path, headline: Headline) -> Curves:
    """Read the headline measure of a run.

    Raises:
      UsageError: if they can't be read.
    """
    evaluations = read_metrics(run, "evaluation")
    with making_sense_of(run):
        steps = np.array([entry["step"] for entry in evaluations], int)
        seconds = np.array([entry["seconds"] for entry in evaluations], float)
        center = np.array([entry[headline.center] for entry in evaluations], float)
        workers = by_worker(evaluations, headline.workers)
    leader, (exchange_steps, leaders) = np.full(len(steps), np.nan), leaders_of(run)
    if len(leaders):
        last = np.searchsorted(exchange_steps, steps, side="right") - 1
        led = np.where(last >= 0, leaders[np.maximum(last, 0)], -1)
        there = (led >= 0) & (led < workers.shape[1])
        leader[there] = workers[there, led[there]]
    return Curves(steps, seconds, center, workers, leader)


def by_worker(entries: list[dict], name: str) -> Float[np.ndarray, "entries workers"]:
    """Collect a per-worker metric from events; NaN for nonfinite values and for workers absent at an event.

    Raises:
      ValueError: if there are too many values to hold.
    """
    rows = [np.ravel(np.array(entry[name], float)) for entry in entries]
    count = max(map(len, rows), default=0)
    if len(rows) * count > MOST_NUMBERS:
        raise ValueError(f"{name} has {count:,} workers in {len(rows):,} events")
    padded = [np.pad(row, (0, count - len(row)), constant_values=np.nan) for row in rows]
    return np.array(padded).reshape(len(rows), count)


def leaders_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the steps at which a run elected a global leader, and the leaders' indices.

    Raises:
      UsageError: if they can't be read.
    """
    exchanges = [entry for entry in read_metrics(run, "exchange") if "leader" in entry]
    exchanges.sort(key=lambda entry: entry["step"])  # Asynchronous workers may log late.
    with making_sense_of(run):
        return np.array([entry["step"] for entry in exchanges], int), logged_indices(
            [entry["leader"] for entry in exchanges]
        )


def logged_indices(values: Any) -> Int[np.ndarray, "..."]:
    """Convert logged worker indices to an array.

    Raises:
      ValueError: if an index is too large for a figure.
    """
    found = np.array(values, int)
    if found.size and found.max() >= MOST_WORKERS:
        raise ValueError(f"a worker's index is {found.max():,}, but the largest is {MOST_WORKERS - 1:,}")
    return found


def losses_of(run: Path) -> Float[np.ndarray, "evaluations workers"]:
    """Read each worker's training losses, means since the previous evaluation.

    Raises:
      UsageError: if they can't be read.
    """
    evaluations = read_metrics(run, "evaluation")
    with making_sense_of(run):
        return by_worker(evaluations, "train_losses")


def mean_loss(losses: Float[np.ndarray, "evaluations workers"]) -> Float[np.ndarray, " evaluations"]:
    """The mean of the finite losses; NaN where there is none."""
    there = np.isfinite(losses)
    return np.where(there, losses, 0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)


def draw_curves(axes: Axes, curves: Curves, headline: Headline) -> None:
    """Plot the headline measure of the workers, the leader and the evaluated model against steps."""
    leader, center, workers = (headline.scale * each for each in (curves.leader, curves.center, curves.workers))
    draw_workers(axes, curves.steps, workers)
    marker = marker_of(curves.steps)
    if np.isfinite(leader).any():
        axes.plot(curves.steps, leader, "--", color="black", linewidth=1, marker=marker, label="leader")
    axes.plot(curves.steps, center, color="black", linewidth=1.5, marker=marker, label="evaluated model")
    axes.set(xlabel="local steps", ylabel=f"{headline.title}{headline.unit}")
    scale(axes, center, workers)
    axes.legend(frameon=False)


def draw_losses(axes: Axes, steps: np.ndarray, losses: Float[np.ndarray, "evaluations workers"]) -> None:
    """Plot the workers' training losses and their mean."""
    draw_workers(axes, steps, losses)
    mean = mean_loss(losses)
    axes.plot(steps, mean, color="black", linewidth=1.5, marker=marker_of(steps), label="mean")
    axes.set(xlabel="local steps", ylabel="training loss")
    scale(axes, losses)
    axes.legend(frameon=False)


def draw_workers(axes: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """Plot a thin line per worker; `values` [points, workers]."""
    labels = ["workers"] + [None] * (values.shape[1] - 1)
    axes.plot(x, values, color="0.5", alpha=0.4, linewidth=0.8, marker=marker_of(x), label=labels)


def marker_of(x: np.ndarray) -> str | None:
    """Marker of a line's points; only a line of a single point needs one to be visible."""
    return "." if len(x) == 1 else None


def scale(axes: Axes, *values: np.ndarray) -> None:
    """Make the vertical axis logarithmic, with plain numbers, if the values span a large enough range."""
    finite = np.concatenate([each[np.isfinite(each)] for each in values])
    positive = finite[finite > 0]
    ratio = positive.max() / positive.min() if len(positive) else 1.0
    if ratio > 3 and not (finite < 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if ratio > 6 else range(2, 10)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")


def draw_members(
    axes: Axes, steps: Int[np.ndarray, " exchanges"], members: Bool[np.ndarray, "exchanges workers"]
) -> None:
    """Plot who leads, or who is in the quorum, as a row per worker that is filled from such an exchange to the next.

    Args:
      axes: to plot on.
      steps: local steps at which workers exchange, in order; at least one.
      members: whether each worker leads, or is in the quorum, from that exchange on.
    """
    count = members.shape[1]
    filled = np.ma.masked_array(np.tile(np.arange(count)[:, None], len(steps)), ~members.T)
    edges = np.concatenate([steps, steps[-1:] + np.diff(steps[-2:], prepend=0)[-1:]])
    colors = ListedColormap([color for color, _ in looks(count)])
    axes.pcolormesh(
        edges, np.arange(count + 1) - 0.5, filled, cmap=colors, vmin=-0.5, vmax=count - 0.5, rasterized=True
    )
    axes.set(xlabel="local steps", ylabel="worker", yticks=_ticks(count))


def draw_leaders(axes: Axes, steps: np.ndarray, leaders: np.ndarray, count: int) -> None:
    """Plot the leader's index, out of `count` workers, against the step (layout of the paper's F8)."""
    axes.plot(steps, leaders, ".", markersize=3)
    axes.set(xlabel="local steps", ylabel="index of the leader", yticks=_ticks(count))


def draw_shares(axes: Axes, leaders: np.ndarray, count: int) -> None:
    """Plot how many exchanges each of `count` workers led."""
    shares = np.bincount(leaders[leaders >= 0], minlength=count)
    if count > MOST_BARS:
        axes.stairs(shares, np.arange(count + 1) - 0.5, fill=True)
    else:
        bars = axes.bar(np.arange(count), shares)
        if count <= 16:
            axes.bar_label(bars, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="worker", ylabel="exchanges led", xticks=_ticks(count))


def _ticks(count: int) -> np.ndarray:
    return np.arange(0, count, -(-count // 16))
