"""Tables and the figure of the comparison of methods, from its results.

python -m benchmarks.methods.summary
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.methods.comparison import EXPERIMENTS, RESULTS, Cell, cells
from lsgd_jax.compare.statistics import differences_to_first, over_seeds
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.figures.output import write_formats
from lsgd_jax.figures.palette import look
from lsgd_jax.methods import METHODS
from lsgd_jax.task import Headline
from lsgd_jax.train.compile_ahead import parameter_shapes

FIRST = "quorum"
"""The method that all others are compared with."""


def read(out: Path, name: str) -> dict[Cell, dict[str, Any]]:
    """The results of an experiment that are there, by cell."""
    paths = {cell: out / f"{cell.name}.json" for cell in cells([name])}
    return {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.exists()}


def of_table(found: dict[Cell, dict[str, Any]], workers: int, period: int, bad: int) -> dict[str, dict[str, Any]]:
    """Results at one period with so many workers, of which some are corrupted, by method, that of comparison first."""
    rows = {}
    for cell, result in found.items():
        if cell.workers == workers and (cell.period == period or METHODS[cell.method].exchanges != "period"):
            [row] = (each for each in result["results"] if each["corrupted"] == bad)
            rows[cell.method] = row
    return {method: rows[method] for method in sorted(rows, key=lambda method: method != FIRST)}


def table(name: str, rows: dict[str, dict[str, Any]], workers: int, period: int) -> str:
    """One table as Markdown."""
    config = EXPERIMENTS[name].config
    headline: Headline = config.task.headline
    shapes = parameter_shapes(config)
    differences = differences_to_first({method: np.array(row["finals"], float) for method, row in rows.items()})
    header = ["method", "tuned", headline.title, f"minus {look(FIRST).name}", "p (Holm)", "MB sent"]
    header += ["perplexity"] if headline.perplexity else []
    lines = [header, ["---"] * len(header)]
    for method, row in rows.items():
        final, difference = over_seeds(np.array(row["finals"], float)), differences[method]
        of = config.replace(method=method, workers=workers)
        of = of.replace(period=period) if METHODS[method].exchanges == "period" else of
        values = {key: value for key, value in row["chosen"].items() if key != "evaluated_model"}
        tuned = ", ".join(f"{key} {value:g}" for key, value in values.items())
        p = difference["p_holm"]
        lines.append(
            [
                look(method).name,
                tuned + (", tail mean" if row["chosen"]["evaluated_model"] == "tail_mean" else ""),
                _interval(final, headline),
                "" if method == FIRST else _interval(difference, headline),
                "" if method == FIRST or p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
                f"{bytes_sent(of, shapes, of.steps) / 1e6:.1f}",
                *(["" if final["mean"] is None else f"{np.exp(final['mean']):.2f}"] if headline.perplexity else []),
            ]
        )
    return _markdown(lines)


def _number(value: float, headline: Headline) -> str:
    return f"{headline.scale * value:.{2 if headline.percent else 4}f}"


def _interval(found: dict[str, Any], headline: Headline) -> str:
    if found["mean"] is None:
        return f"{found['values'].count(None)} of {len(found['values'])} seeds failed"
    half = "" if found["half_width"] is None else f" ± {_number(found['half_width'], headline)}"
    return _number(found["mean"], headline) + half


def overview(name: str, found: dict[Cell, dict[str, Any]]) -> str:
    """The means of all methods, a row for each setting, as Markdown."""
    experiment = EXPERIMENTS[name]
    headline, methods = experiment.config.task.headline, [method for method in METHODS if method in experiment.methods]
    lines = [["workers", "corrupted", "period", *(look(method).name for method in methods)]]
    lines.append(["---"] * len(lines[0]))
    for workers, numbers in experiment.corrupted.items():
        for bad in numbers:
            for period in sorted(experiment.periods[workers]):
                rows = of_table(found, workers, period, bad)
                means = {method: over_seeds(np.array(row["finals"], float))["mean"] for method, row in rows.items()}
                best = min((mean for mean in means.values() if mean is not None), default=None)
                texts = {
                    method: "failed" if mean is None else _number(mean, headline) for method, mean in means.items()
                }
                bold = {method: f"**{text}**" if means[method] == best else text for method, text in texts.items()}
                lines.append([str(workers), str(bad), str(period), *(bold.get(method, "") for method in methods)])
    return _markdown(lines)


def tables(out: Path) -> str:
    """All tables, as a page."""
    page = ["# Methods with clean and corrupted workers\n"]
    for name, experiment in EXPERIMENTS.items():
        if not (found := read(out, name)):
            continue
        headline, seeds = experiment.config.task.headline, len(next(iter(found.values()))["seeds"])
        unit, per_example = experiment.config.task.counted_in
        devices = " and ".join(sorted({result["environment"]["devices"] for result in found.values()}))
        page.append(
            f"## {experiment.config.task}, {experiment.config.steps} steps: {headline.title}{headline.unit}\n\n"
            f"Means over {seeds} seeds; a method of which a seed failed has none. The lowest of a row is bold."
            f" {experiment.config.steps * experiment.config.batch_size * per_example:,} {unit} per worker."
            f" Trained on {devices}.\n\n{overview(name, found)}\n"
            "Below, ± is half of a 95 % t-interval. Differences are paired by seed; their intervals are simultaneous"
            " (Bonferroni) and their p-values corrected by Holm's method within each table.\n"
        )
        for workers, numbers in experiment.corrupted.items():
            for period in sorted(experiment.periods[workers]):
                for bad in numbers:
                    rows = of_table(found, workers, period, bad)
                    if FIRST in rows:
                        what = f"{bad} with {_CORRUPTED[experiment.config.corruption]}" if bad else "all clean"
                        title = f"### {workers} workers, period {period}, {what}"
                        page.append(f"{title}\n\n{table(name, rows, workers, period)}")
    return "\n".join(page)


_CORRUPTED = {"labels": "random labels", "gradient-noise": "noise in its gradients"}


def _markdown(lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def draw(out: Path, name: str = "mnist1d", period: int = 16) -> Path:
    """The figure: error against the number of corrupted workers, a panel for each number of workers."""
    experiment, found = EXPERIMENTS[name], read(out, name)
    headline = experiment.config.task.headline
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, len(experiment.corrupted), sharey=True)
    for axes, (workers, numbers) in zip(panels, experiment.corrupted.items(), strict=True):
        for method in experiment.methods:
            finals = [
                np.array(rows[method]["finals"], float) * headline.scale
                for bad in numbers
                if method in (rows := of_table(found, workers, period, bad))
            ]
            if len(finals) == len(numbers):
                of = [over_seeds(values) for values in finals]
                middle, half = (np.array([each[key] for each in of], float) for key in ("mean", "half_width"))
                style = {"capsize": 2, "marker": "o", "markersize": 3, "linewidth": 1.4}
                axes.errorbar(numbers, middle, half, **style, **look(method).line)
        axes.set_title(f"{workers} workers")
        axes.set_xlabel("workers with random labels")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.2, which="both")
    panels[0].set_ylabel(f"{headline.title}{headline.unit}")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path = out / "corrupted_workers.png"
    write_formats(path, figure, dpi=120)
    return path


def main() -> None:
    """Write the page of tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    (out / "README.md").write_text(tables(out))
    print(f"see {out / 'README.md'}")
    if read(out, "mnist1d"):
        print(f"see {draw(out)}")


if __name__ == "__main__":
    main()
