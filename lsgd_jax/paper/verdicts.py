"""Verdict on every claim of the paper, with a figure and a table.

lsgd figure theory
"""

from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lsgd_jax import files
from lsgd_jax.figures.output import write
from lsgd_jax.figures.palette import BLUE, looks
from lsgd_jax.paper.claims import CLAIMS, comparisons
from lsgd_jax.paper.claims.base import Curve, Findings, Row, Sizes
from lsgd_jax.paper.claims.one_step import ETA_FACTORS, PULL_FACTORS
from lsgd_jax.paper.descent import COLORS, METHODS

COLUMNS = ["claim", "in the paper", "command", "measured", "verdict"]


def make(out: Path | str, runs: Path | str, sizes: Sizes | None = None) -> str:
    """Measure all claims and write the figure and the table to a folder; returns the table.

    Args:
      out: output folder for the picture, its curves and numbers, and the table in Markdown.
      runs: folder whose subfolders are searched for comparisons by `lsgd compare`.
      sizes: sample sizes; None: those of the committed results.

    Raises:
      UsageError: if a comparison in `runs` can't be read.
    """
    networks = comparisons.read(runs)  # First, so that a faulty folder is reported before the computation.
    found = measure(sizes or Sizes())
    rows = [row for each in [*found.values(), networks] for row in each.rows]
    curves = [curve for each in found.values() for curve in each.curves]
    summary = {
        "table": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        **{name: each.numbers for name, each in found.items()},
        "networks": networks.numbers,
    }
    columns = ["panel", "series", "x", "y", "low", "high", "bound"]
    write(out, "theory", _draw(found, networks), columns, (row for curve in curves for row in _points(curve)), summary)
    files.write(Path(out) / "theory.md", table(rows))
    missing = "" if networks.rows else f"no comparison.json in a folder in {runs}: no rows on networks; see --runs\n"
    return table(rows) + missing


def measure(sizes: Sizes) -> dict[str, Findings]:
    """Measure all claims that are computed here, in double precision."""
    with jax.enable_x64(True):
        return {name: measure_claim(sizes) for name, measure_claim in CLAIMS.items()}


def table(rows: list[Row]) -> str:
    """Format the claims as a Markdown table."""
    return (
        "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]
        )
        + "\n"
    )


_GAP = "$E\\,f(x_k) - f^*$"


def _points(curve: Curve) -> list[list]:
    columns = [curve.x, curve.y, curve.low, curve.high, curve.bound]
    cells = [[""] * len(curve.x) if column is None else np.asarray(column).tolist() for column in columns]
    return [[curve.panel, curve.series, *cell] for cell in zip(*cells, strict=True)]


def _draw(found: dict[str, Findings], networks: Findings) -> Figure:
    figure = Figure(figsize=(11, 17), layout="constrained")
    (rest, steps), (rate, limit), (direction, wells), (completion, error) = figure.subplots(4, 2)
    _draw_rest(rest, *found["stationary points"].curves)
    shares = _draw_shares(steps, found["one step"].curves)
    figure.colorbar(shares, ax=steps, label="share of means shown to exceed the bound")
    _draw_bounded(rate, found["decreasing steps"].curves)
    rate.set(title="decreasing steps (dashed: bounds)", xlabel="k", ylabel=_GAP, xscale="log", yscale="log")
    _draw_bounded(limit, found["stochastic leader"].curves)
    limit.axhline(found["stochastic leader"].numbers["independent"], color=COLORS["independent"], label="independent")
    limit.set(title="leader elected on noisy losses (dashed: bounds)", yscale="log")
    limit.set(xlabel=r"noise of the losses, $\sigma_f$", ylabel=f"lim {_GAP}")
    limit.set_xscale("symlog", linthresh=0.01, linscale=0.3)
    limit.set_xlim(left=-0.002)
    limit.legend(fontsize=8)
    _draw_directions(direction, found["step directions"])
    for curve in found["wells"].curves:  # Zero, at a well's bottom, has no logarithm.
        name, where = curve.series.split(", ")
        style = "-" if where == "different wells" else ":"
        wells.semilogy(np.maximum(curve.y, 1e-12), style, color=COLORS[name], label=curve.series)
    wells.set(title="four wells: median of the best worker", xlabel="iteration", ylabel="f", xlim=(0, 150))
    wells.set_ylim(bottom=1e-12)
    wells.legend(fontsize=8)
    for curve in found["symmetry"].curves:
        name, rank = curve.series.split(", ")
        style = ":" if name == METHODS[-1] else "-"
        width = 1.2 if rank == "rank 1" else 2.4
        completion.semilogy(curve.y, style, linewidth=width, color=COLORS[name], label=curve.series)
    completion.set(title="matrix completion: best worker", xlabel="iteration", ylabel="F(X)")
    completion.legend(fontsize=8)
    _draw_errors(error, networks)
    return figure


def _draw_rest(axes: Axes, well: Curve, pair: Curve) -> None:
    axes.plot(well.x, well.y, color="black", linewidth=1)
    axes.plot(pair.x, pair.y, "o", color=COLORS["EAGD"], label="EASGD's workers at rest: f' is not 0")
    axes.plot(pair.x.mean(), 0, "x", color=COLORS["EAGD"], label="their center")
    axes.set(title="EASGD's counter-example, f(x) = (x² - 1)²", xlabel="x", ylabel="f(x)", ylim=(-0.05, 1.4))
    axes.legend(fontsize=8)


def _draw_shares(axes: Axes, curves: list[Curve]) -> AxesImage:
    shares = np.stack([curve.y for curve in curves])
    image = axes.imshow(shares, origin="lower", cmap="Reds", vmin=0, vmax=max(shares.max(), 1e-9), aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        color = "white" if share > 0.6 * shares.max() else "black"
        axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(np.arange(len(PULL_FACTORS)), [f"{factor:g}" for factor in PULL_FACTORS])
    axes.set_yticks(np.arange(len(ETA_FACTORS)), [f"{factor:g}" for factor in ETA_FACTORS])
    right = PULL_FACTORS.index(1.0) + 0.5
    top = ETA_FACTORS.index(1.0) + 0.5
    axes.plot([-0.5, right, right], [top, top, -0.5], color=BLUE, linewidth=2.5)
    axes.set(title="one step (promised: below left of the line)", xlabel="ηλ · 2κ", ylabel="η · 2M")
    return image


def _draw_bounded(axes: Axes, curves: list[Curve]) -> None:
    for curve, (color, _) in zip(curves, looks(len(curves)), strict=True):
        label = curve.series.replace("lambda_k = Theta(1/k)", r"$\lambda_k = \Theta(1/k)$")
        [line] = axes.plot(curve.x, curve.y, linewidth=1.2, color=color, label=label)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
        if curve.bound is not None:
            axes.plot(curve.x, curve.bound, "--", color=line.get_color(), linewidth=1)
    axes.legend(fontsize=8)


def _draw_directions(axes: Axes, found: Findings) -> None:
    for curve, point in zip(found.curves, found.numbers["points"], strict=True):
        color = matplotlib.colormaps["viridis"](point["angle"] / 90)
        axes.semilogx(curve.x, curve.y, ":", color=color, linewidth=1)
        applicable = curve.x <= (np.inf if point["lambda"] is None else point["lambda"])
        axes.semilogx(curve.x[applicable], curve.y[applicable], "-", color=color, linewidth=1.5)
    axes.axhline(0.5, color="black", linewidth=1)
    axes.set(title="step direction (solid: promised; dark: small angle)", xlabel="λ / m")
    axes.set_ylabel("share of candidate leaders that improve it")
    axes.set_ylim(0, 1.02)


def _draw_errors(axes: Axes, networks: Findings) -> None:
    axes.set_title("test error minus LSGD's (%), paired by seed")
    axes.axvline(0, color="black", linewidth=1)
    labels: list[str] = []
    for name, by_rival in networks.numbers.get("test error minus LSGD's (%), paired by seed", {}).items():
        for rival, differences in by_rival.items():
            axes.plot(differences, [len(labels)] * len(differences), "o", alpha=0.6, color=BLUE, clip_on=False)
            labels.append(f"{comparisons.RIVALS[rival]}\n{name}")
    axes.set_yticks(np.arange(len(labels)), labels, fontsize=7)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter("{x:g}")
