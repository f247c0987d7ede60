"""A run's picture: test errors against steps and wall-clock, and who led (the layout of the paper's F8)."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsgd_jax.config import Config
from lsgd_jax.run_folder import read_metrics


def draw(run: Path) -> Path:
    """Draw a run from its folder into the folder; returns the picture's path."""
    config = Config.load(run)
    evaluations = read_metrics(run, "evaluation")
    steps = np.array([entry["step"] for entry in evaluations])
    seconds = np.array([entry["seconds"] for entry in evaluations])
    center = 100 * np.array([entry["center_error"] for entry in evaluations])
    errors = [np.ravel(entry["worker_errors"]) for entry in evaluations]
    count = max(map(len, errors))  # A run may have gone on with other workers.
    workers = 100 * np.array([np.pad(error, (0, count - len(error)), constant_values=np.nan) for error in errors])
    exchange_steps, leaders = leaders_of(run)

    rows = 2 if len(leaders) else 1  # The second tells who led.
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    by_step, by_time = panels[0]
    for axes, x, label in ((by_step, steps, "local steps"), (by_time, seconds, "seconds of training")):
        axes.plot(x, workers, color="0.8", linewidth=0.8, label=["workers"] + [None] * (workers.shape[1] - 1))
        if len(leaders):
            last = np.searchsorted(exchange_steps, steps, side="right") - 1
            led = np.where(last >= 0, leaders[np.maximum(last, 0)], -1)
            led_error = np.where(led >= 0, workers[np.arange(len(led)), led], np.nan)
            axes.plot(x, led_error, color="tab:blue", linewidth=1, label="leader")
        axes.plot(x, center, color="tab:red", linewidth=1.5, label="center")
        axes.set(xlabel=label, ylabel="test error (%)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend()
    by_step.set_title(
        f"{config.method} on {config.dataset}, {config.groups} x {config.workers} workers, seed {config.seed}"
    )
    by_time.set_title(f"final test error of the center {center[-1]:.2f} %")

    if len(leaders):
        draw_leaders(panels[1, 0], panels[1, 1], exchange_steps, leaders, count)
    path = run / "curves.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def leaders_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The steps on which a run's workers elected the leader of all, and the leaders' ranks."""
    exchanges = [entry for entry in read_metrics(run, "exchange") if "leader" in entry]
    exchanges.sort(key=lambda entry: entry["step"])  # Workers at their own speed may log late.
    return np.array([entry["step"] for entry in exchanges], int), np.array(
        [entry["leader"] for entry in exchanges], int
    )


def draw_leaders(identity: Axes, share: Axes, steps: np.ndarray, leaders: np.ndarray, count: int) -> None:
    """Draw who led against the step, and how often each did (the layout of the paper's F8)."""
    identity.plot(steps, leaders, ".", markersize=3)
    identity.set(title="who led all", xlabel="local steps", ylabel="the leader's rank", yticks=np.arange(count))
    bars = share.bar(np.arange(count), np.bincount(leaders[leaders >= 0], minlength=count))
    share.bar_label(bars, fontsize=8)
    share.set(
        title=f"how often each led, of {len(leaders)}", xlabel="rank", ylabel="exchanges", xticks=np.arange(count)
    )
