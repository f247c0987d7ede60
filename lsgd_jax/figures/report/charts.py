"""Charts of a report, as data that the page's script plots."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from lsgd_jax.figures.palette import MOST_HUES, look, looks, worker_colors
from lsgd_jax.figures.report.reading import Run
from lsgd_jax.figures.run import mean_loss

MOST_POINTS = 1000
"""Points per line and steps per band; beyond, lines are thinned out and neighboring steps merged."""
MOST_LINES = 64
"""Workers up to which each has a line and a color; beyond, there is a band, and neighbors share a color."""
_TEXT = ""
"""In place of a color: that of the page's text, light or dark."""


def shared_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What several runs have in common, a line per run and, over the seeds of a configuration, a line per mean."""
    tested = [(i, run) for i, run in enumerate(runs) if len(run.curves.steps)]
    styles = _styles([run for _, run in tested])
    measures: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}
    for i, run in tested:
        headline = run.config.task.headline
        key = f"{capital(headline.title)} of the evaluated model", f"{headline.title}{headline.unit}"
        measures.setdefault(key, []).append((i, headline.scale * run.curves.center))
        measures.setdefault(("Training loss, mean of the workers", "training loss"), []).append(
            (i, mean_loss(run.losses))
        )
        measures.setdefault(("Throughput", "steps/s per worker"), []).append((i, _throughput(run)))
        measures.setdefault(("Communication", "MB sent per worker"), []).append((i, run.bytes_sent / 1e6))
    of_run = dict(tested)
    positions = {i: position for position, (i, _) in enumerate(tested)}
    return [
        {
            "title": title,
            "label": label,
            "linear": title in ("Throughput", "Communication"),
            "lines": [
                {"run": i, "name": of_run[i].name, **styles[positions[i]], **_axes(of_run[i]), "y": _numbers(y)}
                for i, y in lines
            ],
            "means": _means([(of_run[i], styles[positions[i]], i, y) for i, y in lines]),
        }
        for (title, label), lines in measures.items()
    ]


def charts_of(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the charts of one run."""
    curves, headline = run.curves, run.config.task.headline
    axes = _axes(run)
    if len(curves.steps):
        label = f"{headline.title}{headline.unit}"
        workers, leader, center = (headline.scale * each for each in (curves.workers, curves.leader, curves.center))
        lines = _of_workers(workers)
        if np.isfinite(leader).any():
            lines.append({"name": "leader", "color": _TEXT, "dashes": [6, 3], "y": _numbers(leader)})
        lines.append({"name": "evaluated model", "color": _TEXT, "width": 2, "y": _numbers(center)})
        yield {"title": capital(headline.title), "label": label, **axes, "lines": lines}
        mean = {"name": "mean", "color": _TEXT, "width": 2, "y": _numbers(mean_loss(run.losses))}
        losses = [*_of_workers(run.losses), mean]
        yield {"title": "Training loss since the last evaluation", "label": "training loss", **axes, "lines": losses}
        if run.worker_steps.size:
            own = _of_workers(run.worker_steps)
            yield {"title": "Local steps of each worker", "label": "local steps", "linear": True, **axes, "lines": own}
    for title, (steps, leaders, _) in run.elections.items():
        if len(leaders):
            count = max(run.config.groups * run.config.workers, curves.workers.shape[1], int(leaders.max()) + 1)
            shares = np.bincount(leaders, minlength=count).tolist()
            strips = _strips(steps, leaders, run.config.workers, title)
            # Many workers are told apart by their place in the group, where each group has a row.
            colored = run.config.workers if count > MOST_HUES and len(strips["leaders"]) > 1 else count
            colors = worker_colors(min(colored, MOST_LINES))
            yield {"title": title, "shares": shares, "colors": colors, "colored": colored, **strips}
    spreads = {f"distance to the {title.lower()}": elections.distances for title, elections in run.elections.items()}
    for label, values in (spreads | {"score": run.scores}).items():
        if any(np.isfinite(each).any() for _, each in values):
            x, low, middle, high = band(values)
            line = {"name": "median", "color": _TEXT, "y": middle, "low": low, "high": high}
            title = f"{capital(label)}: median and range of the workers"
            yield {"title": title, "label": label, "steps": x, "lines": [line]}


def band(values: list[tuple[int, np.ndarray]]) -> tuple[list, list, list, list]:
    """Steps, and the lowest, median and highest of the finite values at each."""
    steps = np.concatenate([np.full(each.shape, step) for step, each in values])
    numbers = np.concatenate([each for _, each in values])
    steps, numbers = steps[np.isfinite(numbers)], numbers[np.isfinite(numbers)]
    distinct = np.unique(steps)
    rows = []
    for some in np.array_split(distinct, min(len(distinct), MOST_POINTS)):
        on_these = numbers[(steps >= some[0]) & (steps <= some[-1])]
        rows.append((some[-1], *np.quantile(on_these, (0, 0.5, 1))))
    x, low, middle, high = np.array(rows).T
    return x.astype(int).tolist(), _rounded(low), _rounded(middle), _rounded(high)


def capital(text: str) -> str:
    """Return a text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def key_of(run: Run) -> str:
    """What runs that differ only in their seeds have in common."""
    return json.dumps(run.config.effective | {"seed": None}, sort_keys=True, default=str)


def _styles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Colors and dashes: of the method, if that tells configurations apart, and else of the configuration."""
    configurations = dict.fromkeys(key_of(run) for run in runs)
    methods = {key_of(run): run.config.method for run in runs}
    if len(set(methods.values())) == len(configurations):
        styles = {key: (look(method).color, look(method).dashes) for key, method in methods.items()}
    else:
        styles = dict(zip(configurations, looks(len(configurations)), strict=True))
    return [{"color": styles[key_of(run)][0], "dashes": styles[key_of(run)][1]} for run in runs]


def _means(lines: list[tuple[Run, dict[str, Any], int, np.ndarray]]) -> list[dict[str, Any]]:
    """Per configuration, the mean over its seeds and a 95 % t-interval, where all its runs have been evaluated."""
    found = []
    for key in dict.fromkeys(key_of(run) for run, *_ in lines):
        same = [(run, style, i, y) for run, style, i, y in lines if key_of(run) == key]
        run, style, _, _ = min(same, key=lambda one: len(one[3]))
        length = len(run.curves.steps)
        ys = np.stack([y[:length] for *_, y in same])
        mean, half = ys.mean(0), np.zeros(length)
        if len(same) > 1:
            half = stats.t.ppf(0.975, len(same) - 1) * ys.std(0, ddof=1) / np.sqrt(len(same))
        name = look(run.config.method).name if len(same) > 1 else run.name
        line = {"runs": [i for _, _, i, _ in same], "name": f"{name}, {len(same)} seeds" if len(same) > 1 else name}
        found.append(line | style | _axes(run) | {"y": _numbers(mean)})
        if len(same) > 1:
            found[-1] |= {"low": _numbers(mean - half), "high": _numbers(mean + half)}
    return found


def _axes(run: Run) -> dict[str, Any]:
    """The steps, seconds and megabytes at a run's evaluations."""
    return {
        "steps": _numbers(run.curves.steps),
        "seconds": _numbers(run.curves.seconds),
        "megabytes": _numbers(run.bytes_sent / 1e6),
    }


def _of_workers(values: np.ndarray) -> list[dict[str, Any]]:
    """A thin line per worker or, of many, their median and range; `values` [evaluations, workers]."""
    count = values.shape[1]
    if count > MOST_LINES:
        with np.errstate(invalid="ignore"):
            low, middle, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan), (0, 0.5, 1), axis=1)
        return [
            {
                "name": f"{count:,} workers, median",
                "color": "#7F7F7F",
                "y": _numbers(middle),
                "low": _numbers(low),
                "high": _numbers(high),
            }
        ]
    return [
        {"name": f"worker {i}", "color": color, "width": 1, "faint": True, "y": _numbers(values[:, i])}
        for i, color in enumerate(worker_colors(count))
    ]


def _strips(steps: np.ndarray, leaders: np.ndarray, workers: int, title: str) -> dict[str, Any]:
    """The leaders at each step, a row for each group or one for all; -1 where nobody is elected."""
    distinct = np.unique(steps)
    distinct = distinct[_kept(len(distinct))]
    group = leaders // workers if title.startswith("Group") else np.zeros_like(leaders)
    rows = np.full((int(group.max()) + 1, len(distinct)), -1)
    there = np.isin(steps, distinct)
    rows[group[there], np.searchsorted(distinct, steps[there])] = leaders[there]
    return {"steps": distinct.tolist(), "leaders": rows.tolist()}


def _throughput(run: Run) -> np.ndarray:
    """Local steps per second of each worker between evaluations."""
    steps, seconds = (np.diff(each, prepend=0) for each in (run.curves.steps, run.curves.seconds))
    return np.divide(steps, seconds, out=np.full(len(steps), np.nan), where=seconds > 0)


def _kept(length: int) -> np.ndarray:
    """Indices of the points of a line that are shown, first and last included."""
    return np.unique(np.linspace(0, length - 1, min(length, MOST_POINTS)).round().astype(int))


def _numbers(values: np.ndarray) -> list[float | None]:
    """The values that are shown, None for those that are not finite."""
    return _rounded(values[_kept(len(values))]) if len(values) else []


def _rounded(values: np.ndarray) -> list[float | None]:
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
