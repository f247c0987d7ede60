"""Figure of a comparison: headline of each method's center against steps, bytes and seconds (as in F4 to F7)."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lsgd_jax.checks import check_path
from lsgd_jax.compare import curves
from lsgd_jax.figures.output import write_formats
from lsgd_jax.figures.palette import look
from lsgd_jax.figures.run import scale
from lsgd_jax.tracking.run_folder import read_config


def draw(out: Path | str, methods: list[str], seeds: list[int]) -> Path:
    """Draw the figure of a comparison and write it to its folder; returns its path.

    Raises:
      UsageError: if it can't be written.
    """
    out = check_path("out", out)
    headline = read_config(out / methods[0] / f"seed-{seeds[0]}").task.headline
    figure = Figure(figsize=(16, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown: list[np.ndarray] = []
    for method in methods:
        metrics = curves([out / method / f"seed-{seed}" for seed in seeds], headline)
        shown.append(headline.scale * metrics["center"])
        low, middle, high = np.quantile(shown[-1], (0.25, 0.5, 0.75), axis=0)
        line = look(method).line
        against = (metrics["step"][0], metrics["bytes_sent"][0] / 1e6, np.median(metrics["seconds"], axis=0))
        for axes, x in zip(panels, against, strict=True):
            if x.any():  # A method that sends nothing has no curve by bytes.
                axes.plot(x, middle, linewidth=1.4, **line)
                axes.fill_between(x, low, high, color=line["color"], alpha=0.12, linewidth=0)
    for axes, label in zip(panels, ("local steps", "MB sent per worker", "seconds of training"), strict=True):
        axes.set_xlabel(label)
        scale(axes, *shown)
        axes.grid(alpha=0.2, which="both")
    panels[1].set_xscale("log")
    panels[0].set_ylabel(f"{headline.title}{headline.unit}: median and quartiles of {len(seeds)} seeds")
    panels[2].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path = out / "comparison.png"
    write_formats(path, figure, dpi=120)
    return path
