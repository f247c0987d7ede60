"""A run's picture: test errors against steps and wall-clock, and who led (the layout of the paper's F8)."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lsgd_jax.checks import check_path
from lsgd_jax.errors import UsageError
from lsgd_jax.figures.output import write_picture
from lsgd_jax.tracking.run_folder import making_sense_of, read_config, read_metrics

MOST_WORKERS = 2**16
"""In a picture."""
MOST_BARS = 256
"""Of more, a picture shows the outline."""
MOST_NUMBERS = 10**8
"""By worker, of all evaluations of a run."""


def draw(run: Path | str) -> Path:
    """Draw a run from its folder into the folder; returns the picture's path.

    Raises:
      UsageError: if the folder is not one of a run that has been tested, or can't be written.
    """
    run = check_path("run", run)
    config = read_config(run)
    errors = errors_of(run)
    exchange_steps, leaders = leaders_of(run)
    if not len(errors.steps):
        raise UsageError(f"the run in {run} has not been tested yet.")

    rows = 2 if len(leaders) else 1  # The second tells who led.
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    by_step, by_time = panels[0]
    draw_errors(by_step, errors.steps, errors, "local steps")
    draw_errors(by_time, errors.seconds, errors, "seconds of training")
    by_step.set_title(
        f"{config.method} on {config.dataset}, {config.groups} x {config.workers} workers, seed {config.seed}"
    )
    by_time.set_title(f"final test error of the center {errors.center[-1]:.2f} %")

    if len(leaders):
        count = max(errors.workers.shape[1], leaders.max() + 1)  # Some may have gone before they were tested.
        identity, share = panels[1]
        draw_leaders(identity, exchange_steps, leaders, count)
        draw_shares(share, leaders, count)
        identity.set_title("who led all")
        share.set_title(f"how often each led, of {len(leaders)}")
    path = run / "curves.png"
    write_picture(path, figure, dpi=120)
    return path


class Errors(NamedTuple):
    """The test errors in a run's evaluations, in percent."""

    steps: Int[np.ndarray, " evaluations"]
    seconds: Float[np.ndarray, " evaluations"]
    """Of training."""
    center: Float[np.ndarray, " evaluations"]
    workers: Float[np.ndarray, "evaluations workers"]
    """NaN for workers that were not there."""
    leader: Float[np.ndarray, " evaluations"]
    """Of the last leader of all; NaN where there was none."""


def errors_of(run: Path) -> Errors:
    """The test errors that a run has logged.

    Raises:
      UsageError: if they can't be read.
    """
    evaluations = read_metrics(run, "evaluation")
    with making_sense_of(run):
        steps = np.array([entry["step"] for entry in evaluations], int)
        seconds = np.array([entry["seconds"] for entry in evaluations], float)
        center = 100 * np.array([entry["center_error"] for entry in evaluations], float)
        workers = 100 * by_worker(evaluations, "worker_errors")
    leader, (exchange_steps, leaders) = np.full(len(steps), np.nan), leaders_of(run)
    if len(leaders):
        last = np.searchsorted(exchange_steps, steps, side="right") - 1
        led = np.where(last >= 0, leaders[np.maximum(last, 0)], -1)
        there = (led >= 0) & (led < workers.shape[1])
        leader[there] = workers[there, led[there]]
    return Errors(steps, seconds, center, workers, leader)


def by_worker(entries: list[dict], name: str) -> Float[np.ndarray, "entries workers"]:
    """What events tell of each worker; NaN for what is not finite and, as a run may go on with others, not there.

    Raises:
      ValueError: if that is too much to hold.
    """
    rows = [np.ravel(np.array(entry[name], float)) for entry in entries]
    count = max(map(len, rows), default=0)
    if len(rows) * count > MOST_NUMBERS:
        raise ValueError(f"{name} has {count:,} workers in {len(rows):,} events")
    padded = [np.pad(row, (0, count - len(row)), constant_values=np.nan) for row in rows]
    return np.array(padded).reshape(len(rows), count)


def leaders_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The steps on which a run's workers elected the leader of all, and the leaders' positions.

    Raises:
      UsageError: if they can't be read.
    """
    exchanges = [entry for entry in read_metrics(run, "exchange") if "leader" in entry]
    exchanges.sort(key=lambda entry: entry["step"])  # Workers at their own speed may log late.
    with making_sense_of(run):
        return np.array([entry["step"] for entry in exchanges], int), logged_positions(
            [entry["leader"] for entry in exchanges]
        )


def logged_positions(values: Any) -> Int[np.ndarray, "..."]:
    """What was logged as workers' positions.

    Raises:
      ValueError: if one of them is of no worker that a picture can show.
    """
    found = np.array(values, int)
    if found.size and found.max() >= MOST_WORKERS:
        raise ValueError(f"a worker's position is {found.max():,}, but the most is {MOST_WORKERS - 1:,}")
    return found


def draw_errors(axes: Axes, x: np.ndarray, errors: Errors, label: str) -> None:
    """Draw the test errors of the workers, the leader and the center against x."""
    draw_workers(axes, x, errors.workers)
    marker = marker_of(x)
    if np.isfinite(errors.leader).any():
        axes.plot(x, errors.leader, color="tab:blue", linewidth=1, marker=marker, label="leader")
    axes.plot(x, errors.center, color="tab:red", linewidth=1.5, marker=marker, label="center")
    axes.set(xlabel=label, ylabel="test error (%)")
    scale(axes, errors.center, errors.workers)
    axes.legend()


def draw_workers(axes: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """Draw a thin line for each worker; `values` [points, workers]."""
    labels = ["workers"] + [None] * (values.shape[1] - 1)
    axes.plot(x, values, color="0.5", alpha=0.4, linewidth=0.8, marker=marker_of(x), label=labels)


def marker_of(x: np.ndarray) -> str | None:
    """How the points of a line are marked: a line of one point can't be seen."""
    return "." if len(x) == 1 else None


def scale(axes: Axes, *values: np.ndarray) -> None:
    """Let the vertical axis be logarithmic, with plain numbers, if the values differ enough for it."""
    positive = np.concatenate([of[of > 0] for of in values])
    ratio = positive.max() / positive.min() if len(positive) else 1.0
    if ratio > 3:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if ratio > 6 else range(2, 10)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")


def draw_leaders(axes: Axes, steps: np.ndarray, leaders: np.ndarray, count: int) -> None:
    """Draw who of so many workers led against the step (the layout of the paper's F8)."""
    axes.plot(steps, leaders, ".", markersize=3)
    axes.set(xlabel="local steps", ylabel="the leader's position", yticks=_positions(count))


def draw_shares(axes: Axes, leaders: np.ndarray, count: int) -> None:
    """Draw how often each of so many workers led."""
    shares = np.bincount(leaders[leaders >= 0], minlength=count)
    if count > MOST_BARS:
        axes.stairs(shares, np.arange(count + 1) - 0.5, fill=True)
    else:
        bars = axes.bar(np.arange(count), shares)
        if count <= 16:
            axes.bar_label(bars, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="position", ylabel="exchanges", xticks=_positions(count))


def _positions(count: int) -> np.ndarray:
    """To be labelled."""
    return np.arange(0, count, -(-count // 16))
