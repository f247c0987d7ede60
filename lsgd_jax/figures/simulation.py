"""Figures of simulations in virtual time: timelines, staleness of exchanges, and the headline measure against time."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from lsgd_jax.checks import check_names
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import NOBODY
from lsgd_jax.figures.output import write
from lsgd_jax.figures.palette import look
from lsgd_jax.figures.run import scale
from lsgd_jax.simulate import SCHEDULES, SECOND, Cluster, EventLog, Totals, event_log, throughput, totals
from lsgd_jax.simulate.training import History, Network, train_on
from lsgd_jax.task import Headline
from lsgd_jax.tracking.progress import simulation_progress
from lsgd_jax.tracking.table import fitting
from lsgd_jax.train.compile_ahead import parameter_shapes

MOST_LOGGED = 64
"""Workers up to which a simulation has an event log, a timeline and training."""
PERIODS_SHOWN = 4
COMPUTES, WAITS, EXCHANGES, AWAY, LEADS = "#8fbbd9", "#f3e3c3", "#c0392b", "0.85", "black"


def make(
    out: Path | str,
    config: Config,
    cluster: Cluster,
    names: list[str],
    *,
    train: bool,
    target: float | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    parameters: int | None = None,
    data_dir: Path | str | None = None,
) -> dict[str, dict[str, Any]]:
    """Simulate methods and write figures, CSV and JSON to a folder; returns the results by method.

    Args:
      out: output folder.
      config: configuration of workers and training; a method ignores the options that it does not have.
      cluster: machines and links.
      names: distinct names in `SCHEDULES`.
      train: whether to train, too; otherwise it simulates costs only.
      target: value of the task's headline measure whose time of arrival is reported; None: the task's own, if any.
      options: overrides of fields of `config`, each for all methods that have it.
      parameters: number of float32 parameters sent; None: those of the network.
      data_dir: folder of prepared data sets.

    Raises:
      UsageError: if the configuration can't be simulated.
    """
    check_names("method", names, SCHEDULES)
    try:
        configs = config.for_methods({name: SCHEDULES[name].method for name in names}, options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    config = configs[names[0]]
    workers = config.groups * config.workers
    headline = config.task.headline
    target = headline.target if target is None else target
    if workers > MOST_LOGGED and train:
        raise UsageError(f"training is for at most {MOST_LOGGED} workers, got {workers}: simulate costs only.")
    if workers > MOST_LOGGED and cluster.absences:
        raise UsageError(f"absences are for at most {MOST_LOGGED} workers, got {workers}.")
    if parameters is None:  # With costs only, there may be more workers than examples.
        params = parameter_shapes(config.replace(groups=1, workers=1))
    elif parameters % config.chips_per_worker:
        raise UsageError(
            f"parameters must be a multiple of chips_per_worker, {config.chips_per_worker}, got {parameters}."
        )
    else:
        fragments, chips = max(of.options.get("fragments", 1) for of in configs.values()), config.chips_per_worker
        sizes = [(parameters // chips + i) // fragments * chips for i in range(fragments)]
        params = [jax.ShapeDtypeStruct((size,), np.float32) for size in sizes]
    logs: dict[str, EventLog] = {}
    sums: dict[str, Totals] = {}
    configs = {name: with_own_rate(configs[name], name) for name in names}
    for name, method_config in configs.items():
        schedule = SCHEDULES[name]
        if workers > MOST_LOGGED:
            try:
                sums[name] = throughput(schedule, method_config, cluster, params)
            except ValueError as error:
                raise UsageError(f"{name}: {error}") from None
            continue
        logs[name] = event_log(schedule, method_config, cluster, params)
        sums[name] = totals(logs[name])
    histories = _trained(configs, logs, data_dir) if train else {}

    summary: dict[str, Any] = {
        "cluster": _plain(cluster),
        "methods": {name: total.summary() for name, total in sums.items()},
    }
    for name, history in histories.items():
        final = float(history.center[-1])
        summary["methods"][name][f"final_{headline.name}"] = final if np.isfinite(final) else None
        if target is not None:
            summary["methods"][name][f"seconds_to_{target:g}"] = history.seconds_to(target)
    stale_rows = ([name, steps, times] for name, total in sums.items() for steps, times in total.staleness.items())
    write(out, "staleness", draw_staleness(sums), ["method", "steps", "times"], stale_rows, summary)
    if logs:
        columns = ["method", "seconds", "event", "level", "workers", "since", "until"]
        write(out, "timeline", draw_timeline(logs, histories), columns, _log_rows(logs), summary)
    if train:
        columns = ["method", "seconds", "steps", headline.center]
        picture = draw_headlines(histories, headline, target)
        write(out, headline.name, picture, columns, _headline_rows(histories), summary)
    return summary["methods"]


def _trained(
    configs: Mapping[str, Config], logs: Mapping[str, EventLog], data_dir: Path | str | None
) -> dict[str, History]:
    """Train each method along its event log, with a progress bar over the events of all."""
    histories: dict[str, History] = {}
    networks: dict[Config, Network] = {}
    with simulation_progress() as bar:
        task = bar.add_task("", total=sum(len(log.events) for log in logs.values()))
        for name, log in logs.items():
            bar.update(task, description=f"training with {name}")
            alone = configs[name].replace(method="independent")  # Methods share the compiled local steps.
            networks[alone] = networks.get(alone) or Network(alone, data_dir)
            watch = partial(bar.advance, task)
            histories[name] = train_on(log, SCHEDULES[name], configs[name], networks[alone], watch)
    return histories


def with_own_rate(config: Config, name: str) -> Config:
    """Return the configuration of a method; if it sums the workers' updates, with 1/n of the learning rate.

    Raises:
      UsageError: if the configuration does not fit the method.
    """
    try:
        method_config = config.replace(method=SCHEDULES[name].method)
        return method_config.replace(learning_rate=method_config.comparable_rate)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def show(methods: dict[str, dict[str, Any]], headline: Headline) -> None:
    """Print the results of several methods: what fits it on a terminal, otherwise all of them in Markdown."""
    if sys.stdout.isatty():
        console = Console(highlight=False)
        console.print(for_terminal(methods, headline, console.width))
    else:
        print(table(methods))


def for_terminal(methods: dict[str, dict[str, Any]], headline: Headline, width: int) -> Table:
    """Return the results of several methods as a table with as many columns as fit a terminal of this width."""
    [first, *_] = methods.values()
    final = f"final_{headline.name}"
    to_target = next((name for name in first if name.startswith("seconds_to_")), "")
    target = to_target.rpartition("_")[2]
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        final: (f"final\n{headline.name}", headline.text),
        to_target: (f"seconds\nto {f'{float(target):.1%}' if target and headline.percent else target}", _cell),
        "virtual_seconds": ("virtual\nseconds", _cell),
        "efficiency": ("efficiency", "{:.1%}".format),
        "waiting": ("waiting", "{:.1%}".format),
        "exchanging": ("exchanging", "{:.1%}".format),
        "bytes_sent_per_worker": ("MB\nsent", lambda count: _cell(count / 1e6)),
        "mean_staleness": ("staleness\n(steps)", _cell),
        "largest_staleness": ("largest\nstaleness", _cell),
        "steps_per_second": ("steps\nper second", _cell),
        "away": ("away", "{:.1%}".format),
        "steps": ("steps of\nall workers", _cell),
    }
    columns = [["method", *methods]]
    for name, (title, text) in shown.items():
        if name in first:
            missing = "never" if name == to_target else "-"
            columns.append([title, *(missing if of[name] is None else text(of[name]) for of in methods.values())])
    return fitting(columns, width)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def table(methods: dict[str, dict[str, Any]]) -> str:
    """Format the results of several methods as a Markdown table."""
    columns = list(next(iter(methods.values())))
    rows = [["method", *(column.replace("_", " ") for column in columns)], ["---"] * (len(columns) + 1)]
    rows += [[name, *(_cell(numbers[column]) for column in columns)] for name, numbers in methods.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |" for row in rows)


def draw_timeline(logs: dict[str, EventLog], histories: dict[str, History]) -> Figure:
    """Plot the first periods of each method, one row per worker; with histories, also the leaders."""
    [first, *_] = logs.values()
    shown = PERIODS_SHOWN * _typical_period(logs) / SECOND
    height = 0.9 + 0.17 * first.workers
    figure = Figure(figsize=(13, height * len(logs) + 0.8), layout="constrained")
    panels = figure.subplots(len(logs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, log) in zip(panels, logs.items(), strict=True):
        _draw_log(axes, log, histories.get(name), shown)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("worker", fontsize=9)
    panels[0].set(xlim=(0, shown), ylim=(first.workers - 0.5, -0.5), yticks=range(0, first.workers, 2))
    panels[-1].set_xlabel("seconds of virtual time")
    legend: list[Any] = [
        Patch(facecolor=color, label=label)
        for color, label in ((COMPUTES, "a step"), (WAITS, "waits"), (EXCHANGES, "exchanges"), (AWAY, "away"))
    ]
    if any(history.leaders for history in histories.values()):
        legend.append(Line2D([], [], color=LEADS, marker="*", linestyle="", label="leads"))
    figure.legend(handles=legend, ncols=len(legend), loc="outside upper right", frameon=False, fontsize=9)
    return figure


def _typical_period(logs: dict[str, EventLog]) -> float:
    """Longest median time between a worker's exchanges, over all methods."""
    gaps = []
    for log in logs.values():
        times: dict[int, list[int]] = {}
        for event in log.events:
            if event.kind == "exchange":
                for worker in event.workers:
                    times.setdefault(worker, []).append(event.time)
        between = [gap for each in times.values() for gap in np.diff(each)]
        gaps.append(np.median(between) if between else 0)
    return float(max(gaps)) or max(log.end for log in logs.values()) / PERIODS_SHOWN


def _draw_log(axes: Axes, log: EventLog, history: History | None, shown: float) -> None:
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}

    def bar(worker: int, color: str, start: int, end: int) -> None:
        if start < end and start / SECOND < shown:
            bars.setdefault((worker, color), []).append((start / SECOND, (end - start) / SECOND))

    left: dict[int, int] = {}
    for event in log.events:
        for worker, begun in zip(event.workers, event.begun, strict=True):
            if event.kind == "step":
                bar(worker, COMPUTES, begun, event.time)
            elif event.kind == "exchange":
                bar(worker, WAITS, begun, event.time)
                # Short exchanges stay visible.
                bar(worker, EXCHANGES, event.time, max(event.end, event.time + round(0.003 * shown * SECOND)))
            elif event.kind == "leave":
                left[worker] = begun
            else:
                bar(worker, AWAY, left.pop(worker), event.time)
                bar(worker, EXCHANGES, event.time, event.end)
    for worker, since in left.items():
        bar(worker, AWAY, since, log.end)
    for (worker, color), spans in bars.items():
        edge = {"edgecolor": "white", "linewidth": 0.6} if color == COMPUTES else {"zorder": 3}
        axes.broken_barh(spans, (worker - 0.4, 0.8), facecolor=color, **edge)
    led = [(event.time / SECOND, leader) for event, leader in (history.leaders if history else []) if leader != NOBODY]
    led = [(time, leader) for time, leader in led if time < shown]
    axes.plot(*zip(*led, strict=True) if led else ([], []), "*", color=LEADS, markersize=7, zorder=4)
    axes.spines[["top", "right"]].set_visible(False)


def draw_staleness(sums: dict[str, Totals]) -> Figure:
    """Plot the staleness of exchanges, one panel per method."""
    figure = Figure(figsize=(2.4 * max(len(sums), 2), 3), layout="constrained")
    most = max([steps for total in sums.values() for steps in total.staleness], default=1)
    bins = np.arange(most + 2) - 0.5 if most < 60 else np.linspace(0, most + 1, 60)
    for axes, (name, total) in zip(
        figure.subplots(1, len(sums), sharex=True, sharey=True, squeeze=False)[0], sums.items(), strict=True
    ):
        weights = np.array(list(total.staleness.values()), float)
        axes.hist(
            list(total.staleness), bins, weights=weights / max(weights.sum(), 1), color=COMPUTES, edgecolor="white"
        )
        if total.staleness:
            axes.axvline(total.mean_staleness, color=EXCHANGES, linewidth=1)
        axes.set_title(f"{name}\nmean {total.mean_staleness:.1f}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(yscale="log", ylabel="share of exchanges")
    figure.supxlabel("staleness: steps taken by the others, on average, since the worker's last exchange", fontsize=9)
    return figure


def draw_headlines(histories: dict[str, History], headline: Headline, target: float | None) -> Figure:
    """Plot the headline measure of each method's center against virtual time and steps."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, history in histories.items():
        for axes, x in zip(panels, (history.seconds, history.steps), strict=True):
            axes.plot(x, headline.scale * history.center, linewidth=1.4, **look(name).line)
    for axes, label in zip(panels, ("seconds of virtual time", "local steps of the average worker"), strict=True):
        if target is not None:
            axes.axhline(headline.scale * target, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
        scale(axes, *(headline.scale * history.center for history in histories.values()))
        axes.grid(alpha=0.2, which="both")
    panels[0].set_ylabel(f"{headline.title} of the center{headline.unit}")
    panels[1].legend(fontsize=9)
    return figure


def _log_rows(logs: dict[str, EventLog]) -> Any:
    for name, log in logs.items():
        for event in log.events:
            who, since = " ".join(map(str, event.workers)), " ".join(f"{b / SECOND:.9f}" for b in event.begun)
            yield [name, f"{event.time / SECOND:.9f}", event.kind, event.level, who, since, f"{event.end / SECOND:.9f}"]


def _headline_rows(histories: dict[str, History]) -> Any:
    for name, history in histories.items():
        for seconds, steps, value in zip(history.seconds, history.steps, history.center, strict=True):
            yield [name, f"{seconds:.9f}", f"{steps:g}", f"{value:.6f}"]


def _plain(cluster: Cluster) -> dict[str, Any]:
    """Fields of a cluster for JSON, which has no infinities or paths."""
    fields = dataclasses.asdict(cluster) | {"trace": None if cluster.trace is None else str(cluster.trace)}
    fields["absences"] = [[w, start, end if np.isfinite(end) else None] for w, start, end in cluster.absences]
    return {name: None if value == float("inf") else value for name, value in fields.items()}
