"""The paper's Figures 4 to 8, from run folders: the evaluated model's test error against time, and leaders."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from lsgd_jax.checks import check_path
from lsgd_jax.compare import curves
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.figures.output import write
from lsgd_jax.figures.palette import look
from lsgd_jax.figures.run import draw_leaders, draw_shares, leaders_of
from lsgd_jax.tasks import Classification
from lsgd_jax.tracking.run_folder import read_config, read_metrics


class Layout(NamedTuple):
    """The runs that a figure shows."""

    model: str
    dataset: str
    workers: tuple[int, ...]
    """Numbers of workers, one row of panels per number."""
    methods: tuple[str, ...] = ("data_parallel", "downpour", "easgd", "lsgd")
    """Methods, one curve per method."""


FIGURES = {
    "F4": Layout("cnn7", "cifar10", (4, 16)),
    "F5": Layout("resnet20", "cifar10", (4, 16)),
    "F6": Layout("vgg16", "cifar10", (4,)),
    "F7": Layout("resnet50", "imagenet2012", (4,), ("downpour", "easgd", "lsgd")),
    "F8": Layout("resnet20", "cifar10", (4,), ("lsgd",)),
}
LABELS = {"data_parallel": "SGD (data parallel)", "downpour": "DOWNPOUR", "easgd": "EASGD", "lsgd": "LSGD"}


def make(name: str, runs: Path | str, out: Path | str, *, model: str | None = None, dataset: str | None = None) -> str:
    """Draw a figure from all finished runs in a folder and its subfolders.

    A cell of a figure is a method with a number of workers. It shows a set of runs that differ only in the seed; among
    several such sets, the one with the longest runs, then the one with the most seeds.

    Args:
      name: figure name, F4 to F8.
      runs: folder to search.
      out: output folder.
      model: network; None: the paper's.
      dataset: data set; None: the paper's.

    Returns:
      A text summary, one line per cell, including the missing cells.

    Raises:
      UsageError: if there is no run for the figure.
    """
    layout, runs = FIGURES[name], check_path("runs", runs)
    layout = layout._replace(model=model or layout.model, dataset=dataset or layout.dataset)
    wanted = [(workers, method) for workers in layout.workers for method in layout.methods]
    cells = {cell: found for cell in wanted if (found := _runs_of(layout, *cell, runs))}
    missing = [f"{workers} workers, {LABELS[method]}" for workers, method in wanted if (workers, method) not in cells]
    if not cells:
        raise UsageError(
            f"{runs} holds no finished run of {layout.model} on {layout.dataset} with"
            f" {' or '.join(map(str, layout.workers))} workers by {' or '.join(layout.methods)}:"
            " make some with lsgd compare, or name another runs folder."
        )
    figure, columns, rows, lines = (_leaders if name == "F8" else _errors)(layout, cells)
    summary = {
        "model": layout.model,
        "dataset": layout.dataset,
        "missing": missing,
        "cells": [
            {"workers": workers, "method": method, "config": read_config(found[0]).effective}
            for (workers, method), found in cells.items()
        ],
    }
    write(out, name, figure, columns, rows, summary)
    return "\n".join(lines + [f"missing: {cell}" for cell in missing])


def _runs_of(layout: Layout, workers: int, method: str, root: Path) -> list[Path]:
    """Find the run folders of a cell."""
    found: dict[Config, list[Path]] = {}
    for path in sorted(root.rglob("config.json")):
        try:
            config = read_config(path.parent)
        except UsageError:  # Not a run of ours.
            continue
        of, wanted = config.effective, {"model": layout.model, "dataset": layout.dataset, "method": method}
        is_cell = isinstance(config.task, Classification) and wanted.items() <= of.items()
        if is_cell and config.groups * config.workers == workers and not config.validation and _finished(path.parent):
            found.setdefault(dataclasses.replace(config, seed=0), []).append(path.parent)
    return max(found.items(), key=lambda runs: (runs[0].steps, len(runs[1])), default=(None, []))[1]


def _finished(run: Path) -> bool:
    try:
        return read_metrics(run, "evaluation")[-1]["step"] == read_config(run).steps
    except (UsageError, LookupError):
        return False


Drawn: TypeAlias = tuple[Figure, list[str], list[list], list[str]]
"""A figure, its CSV columns and rows, and the lines of its summary."""


def _errors(layout: Layout, cells: dict[tuple[int, str], list[Path]]) -> Drawn:
    """Full curves on the left and their final part on the right, one row per number of workers."""
    figure = Figure(figsize=(12, 4.2 * len(layout.workers)), layout="constrained")
    panels = figure.subplots(len(layout.workers), 2, squeeze=False)
    lines, rows = [], []
    for workers, (whole, zoomed) in zip(layout.workers, panels, strict=True):
        ends = []
        for method in layout.methods:
            if (workers, method) not in cells:
                continue
            found = cells[workers, method]
            metrics = curves(found, Classification.headline)
            error, seconds = 100 * metrics["center"], np.median(metrics["seconds"], axis=0)
            for axes in (whole, zoomed):
                line = look(method).line | {"label": LABELS[method], "linewidth": 1.3}
                axes.plot(seconds, np.median(error, axis=0), **line)
                axes.fill_between(
                    seconds, error.min(0), error.max(0), color=look(method).color, alpha=0.15, linewidth=0
                )
            ends.append((error[:, -1].max(), error.min()))
            for run, *values in zip(found, metrics["step"], metrics["seconds"], metrics["center"], strict=True):
                seed = read_config(run).seed
                rows += [[workers, method, seed, *map(float, each)] for each in zip(*values, strict=True)]
            lines.append(
                f"{workers} workers, {LABELS[method]}: {np.median(error[:, -1]):.2f} % (median of {len(found)} seeds,"
                f" {error[:, -1].min():.2f} to {error[:, -1].max():.2f})"
            )
        whole.set(title=f"{layout.model} on {layout.dataset}, {workers} workers", ylabel="test error (%)")
        zoomed.set_title("the same, zoomed")
        if ends:
            worst, best = (np.array(ends)[:, i] for i in (0, 1))
            zoomed.set_ylim(best.min() - 0.2, min(worst.max(), 3 * best.min()) + 0.5)
            whole.legend()
        for axes in (whole, zoomed):
            axes.set_xlabel("seconds of training")
            axes.grid(alpha=0.2)
    return figure, ["workers", "method", "seed", "step", "seconds", "center_error"], rows, lines


def _leaders(layout: Layout, cells: dict[tuple[int, str], list[Path]]) -> Drawn:
    """The leader's index against the step on the left, and exchanges led per worker on the right."""
    [((workers, _), found)] = cells.items()
    steps, leaders = leaders_of(found[0])
    figure = Figure(figsize=(12, 4), layout="constrained")
    identity, share = figure.subplots(1, 2)
    draw_leaders(identity, steps, leaders, workers)
    draw_shares(share, leaders, workers)
    identity.set_title("global leader")
    share.set_title(f"exchanges led by each worker ({len(leaders)} total)")
    figure.suptitle(f"{layout.model} on {layout.dataset}, {workers} workers, seed {read_config(found[0]).seed}")
    led = Counter(leaders.tolist())
    counts = ", ".join(f"{led[worker]}" for worker in range(workers))
    rows = [list(row) for row in zip(steps.tolist(), leaders.tolist(), strict=True)]
    return figure, ["step", "leader"], rows, [f"workers 0 to {workers - 1} led {counts} of {len(leaders)} times"]
