"""A page about runs that needs no network: one HTML file with its pictures (SVG) and its style in it."""

import dataclasses
import html
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lsgd_jax import files
from lsgd_jax.checks import check_path
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import run as figures
from lsgd_jax.figures.run import logged_positions
from lsgd_jax.tracking.run_folder import MOST_BYTES, making_sense_of, read_config, read_metrics

MOST_POINTS = 2000
"""In the lines of a chart; more are drawn as pixels."""
MOST_STEPS = 300
"""In a band; of more, neighbours are taken together."""
MOST_EVENTS = 50
"""In a table."""


def write(runs: Sequence[Path | str], out: Path | str) -> None:
    """Write a page about runs.

    Args:
      runs: their folders.
      out: the file, which is replaced if it is such a page.

    Raises:
      UsageError: if a folder is not one of a run, or the file is another or can't be written.
    """
    folders, out = [check_path("runs", run) for run in runs], check_path("out", out)
    try:
        if out.exists() and not _is_report(out):
            raise UsageError(f"{out} is there already and is no report: name another out file.")
    except OSError as error:
        raise UsageError(f"the report {out} can't be written ({error.strerror}): name another out file.") from None
    files.write(out, _page([_read(run, name) for run, name in zip(folders, _names(folders), strict=True)]))


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with files.reading(path) as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def _names(runs: list[Path]) -> list[str]:
    """The runs' paths from the folder that all are in; bytes that are no text are shown as escapes."""
    paths = [Path(os.fsencode(run.resolve()).decode(errors="backslashreplace")) for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]


# What there is to tell.


class _Elections(NamedTuple):
    """Elections of one level."""

    steps: np.ndarray
    """Of each leader's election."""
    leaders: np.ndarray
    """Their ranks among all workers."""
    distances: list[tuple[int, np.ndarray]]
    """Steps, and how far the leaders' followers were from them."""


class _Run(NamedTuple):
    """A run."""

    name: str
    config: Config
    environment: dict[str, str]
    step: int
    """The last of which anything is logged."""
    errors: figures.Errors
    losses: np.ndarray
    """[evaluations, workers]"""
    bytes_sent: np.ndarray
    """By a worker until each evaluation."""
    worker_steps: np.ndarray
    """[evaluations, workers]; without workers if they take their steps together."""
    elections: dict[str, _Elections]
    """By their title: of all, and in the groups."""
    scores: list[tuple[int, np.ndarray]]
    """Steps, and the workers' scores."""
    events: list[list[str]]
    """Steps, and what has happened on them."""

    @property
    def progress(self) -> str:
        """How far it has come."""
        tested = self.errors.steps
        finished = len(tested) and tested[-1] >= self.config.steps
        return f"{self.step:,}" + ("" if finished else f" of {self.config.steps:,}, not finished")


def _read(run: Path, name: str) -> _Run:
    config = read_config(run)
    evaluations, exchanges = read_metrics(run, "evaluation"), read_metrics(run, "exchange")
    events = read_metrics(run, "failure", "revival", "resume")
    with making_sense_of(run):
        logged_positions([config.groups * config.workers - 1])
        return _Run(
            name=name,
            config=config,
            environment=_environment(run),
            step=max((int(entry["step"]) for entry in [*evaluations, *exchanges, *events]), default=0),
            errors=figures.errors_of(run),
            losses=figures.by_worker(evaluations, "train_losses"),
            bytes_sent=np.array([entry["bytes_sent"] for entry in evaluations], float),
            worker_steps=figures.by_worker(evaluations if config.asynchronous else [], "worker_steps"),
            elections={
                "The leader of all": _elections(exchanges, "", config.workers),
                "The leader of a group": _elections(exchanges, "local_", config.workers),
            },
            scores=[(entry["step"], _numbers(entry["scores"])) for entry in exchanges if "scores" in entry],
            events=[[f"{entry['step']:,}", _sentence(entry)] for entry in events],
        )


def _environment(run: Path) -> dict[str, str]:
    try:
        found = json.loads(files.read_text(run / "environment.json", MOST_BYTES))
        return {name: _text(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _elections(exchanges: list[dict], level: str, workers: int) -> _Elections:
    """The elections on exchanges.

    Args:
      exchanges: the events.
      level: "" for elections among all, "local_" for those in groups.
      workers: in a group, where an exchange is one worker's.
    """
    leaders: list[tuple[int, int]] = []
    apart: list[tuple[int, np.ndarray]] = []
    for entry in exchanges:
        if f"{level}distances" in entry:
            # In each group, or among all.
            elected = np.ravel(logged_positions(entry["local_leaders" if level else "leader"]))
            distances = _numbers(entry[f"{level}distances"]).reshape(len(elected), -1)
            size = distances.shape[1]
            led = elected >= 0
            apart.append((entry["step"], distances[led[:, None] & (np.arange(size) != elected[:, None])]))
            ranks = np.arange(len(elected)) * size + elected
            leaders += [(entry["step"], int(rank)) for rank in ranks[led]]
        elif f"{level}distance" in entry and entry[f"{level}leader"] >= 0:
            worker, position = logged_positions([entry["worker"], entry[f"{level}leader"]]).tolist()
            rank = position + (worker - worker % workers if level else 0)
            leaders.append((entry["step"], rank))
            if rank != worker:
                apart.append((entry["step"], _numbers(entry[f"{level}distance"])))
    leaders.sort(key=lambda leader: leader[0])  # Workers at their own speed may log late.
    steps, ranks = np.array(leaders, int).reshape(-1, 2).T
    return _Elections(steps, ranks, apart)


def _numbers(values: Any) -> np.ndarray:
    """What was logged, as a line of numbers; null is NaN."""
    return np.ravel(np.array(values, float))


def _sentence(entry: dict) -> str:
    """What has happened."""
    if entry["event"] == "resume":
        groups, workers = np.shape(entry["workers_from"])
        return (
            f"The run went on with {groups} x {workers} workers on {entry['devices']} devices of"
            f" {entry['processes']} processes."
        )
    who = f"worker{'s' * (len(entry['workers']) > 1)} {', '.join(map(str, entry['workers']))}"
    if entry["event"] == "revival":
        return f"From the leader, {who} started anew."
    return f"NaN or infinite parameters: {who}."


# Charts.

_FOREGROUND = "#012345"
"""Of a chart's text and frame; the page puts its own colour there."""
_CHART: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": False,  # Lines may become pixels, but not the numbers at the axes.
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


def _picture(draw: Callable[[Axes], None], caption: str, name: str) -> str:
    """A chart with its caption.

    Args:
      draw: draws it.
      caption: below it.
      name: of the run. With the caption it tells the charts of a page apart.
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
    svg = re.sub(
        r' xmlns(:\w+)?="[^"]*"| id="[\w.]+_\d+"', "", svg[svg.index("<svg") :]
    )  # In a page they aren't needed.
    svg = svg.replace(_FOREGROUND, "currentColor").replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _draw_band(axes: Axes, values: list[tuple[int, np.ndarray]], label: str) -> None:
    """Draw the median of the values on each step, and from the lowest to the highest."""
    steps = np.concatenate([np.full(of.shape, step) for step, of in values])
    numbers = np.concatenate([of for _, of in values])
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


def _draw_losses(axes: Axes, run: _Run) -> None:
    x, there = run.errors.steps, np.isfinite(run.losses)
    means = np.where(there, run.losses, 0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)
    figures.draw_workers(axes, x, run.losses)
    axes.plot(x, means, color="tab:red", linewidth=1.5, marker=figures.marker_of(x), label="mean")
    axes.set(xlabel="local steps", ylabel="training loss")
    figures.scale(axes, run.losses)
    axes.legend()


def _draw_bytes(axes: Axes, run: _Run) -> None:
    x = run.errors.steps
    axes.plot(x, run.bytes_sent / 1e6, marker=figures.marker_of(x))
    axes.set(xlabel="local steps", ylabel="MB sent by a worker", ylim=(0, None))


def _draw_own_steps(axes: Axes, run: _Run) -> None:
    figures.draw_workers(axes, run.errors.seconds, run.worker_steps)
    axes.set(xlabel="seconds of training", ylabel="a worker's local steps", ylim=(0, None))


class _Chart(NamedTuple):
    """A chart to be."""

    title: str
    """Of the charts that stand together."""
    caption: str
    draw: Callable[[Axes], None]


def _charts_of(run: _Run) -> Iterator[_Chart]:
    """The charts about a run."""
    errors = run.errors
    if len(errors.steps):
        title = "Test error and training loss"
        by_step = partial(figures.draw_errors, x=errors.steps, errors=errors, label="local steps")
        by_time = partial(figures.draw_errors, x=errors.seconds, errors=errors, label="seconds of training")
        yield _Chart(title, "Test error by step.", by_step)
        yield _Chart(title, "Test error by wall-clock, without the time that evaluations took.", by_time)
        yield _Chart(title, "Training loss, the mean since the evaluation before.", partial(_draw_losses, run=run))
        yield _Chart(title, "What each worker has sent.", partial(_draw_bytes, run=run))
        if run.worker_steps.size:
            yield _Chart(title, "How far each worker has come.", partial(_draw_own_steps, run=run))
    for title, (steps, leaders, _) in run.elections.items():
        if len(leaders):
            count = max(run.config.groups * run.config.workers, errors.workers.shape[1], leaders.max() + 1)
            by_step = partial(figures.draw_leaders, steps=steps, leaders=leaders, count=count)
            yield _Chart(title, f"{title}, by step.", by_step)
            share = partial(figures.draw_shares, leaders=leaders, count=count)
            yield _Chart(title, f"{title}: how often each worker was it, of {len(leaders):,} times.", share)
    spreads = {f"distance to {title.lower()}": of.distances for title, of in run.elections.items()}
    for label, values in (spreads | {"score": run.scores}).items():
        if any(np.isfinite(of).any() for _, of in values):
            caption = f"The workers' {label} at exchanges: the median, and from the lowest to the highest."
            yield _Chart("How far workers are apart", caption, partial(_draw_band, values=values, label=label))


# The page.

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="lsgd report">
"""
_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #5b6470; --line: #d6dae0; --page: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --faint: #9aa4b0; --line: #363c45; --page: #14171b; --card: #1d2127; }
}
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
h3 { margin: 2rem 0 .75rem; font-size: 1.1rem; }
a { color: inherit; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: .75rem; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
dt, figcaption, caption { color: var(--faint); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
.swatch { width: 24px; margin-right: .5rem; }
.wide { overflow-x: auto; margin-bottom: 1.5rem; }
.wide td { white-space: nowrap; }
.wide th { overflow-wrap: normal; vertical-align: bottom; min-width: 5rem; }
.columns { columns: 22rem; column-gap: 2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.columns table { width: 100%; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid var(--line);
  min-width: 4rem; }
"""


class _Markup(str):
    """Text that is HTML already; all other is escaped."""


def _escaped(text: str) -> str:
    return text if isinstance(text, _Markup) else html.escape(text)


def _text(value: Any) -> str:
    """A value of the configuration or the environment."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "not given" if value is None else str(value)


def _page(runs: list[_Run]) -> str:
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    parts = [f"<h1>{_escaped(title)}</h1>"]
    if len(runs) > 1:
        parts += _together(runs)
    for number, run in enumerate(runs, 1):
        if len(runs) > 1:
            parts.append(f'<h2 id="run-{number}">{_escaped(run.name)}</h2>')
        parts += _section(run)
    body = "\n".join(parts)
    return f"""{_HEAD}\
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


_ENDS = ("final test error of the center", "its lowest", "steps taken", "MB sent by a worker", "seconds of training")


def _ends(run: _Run) -> list[str]:
    """How a run has ended so far."""
    errors = run.errors
    if not len(errors.steps):
        return ["not tested yet", "", run.progress, "", ""]
    sent, seconds = run.bytes_sent[-1] / 1e6, errors.seconds[-1]
    final, lowest = f"{errors.center[-1]:.2f} %", f"{errors.center.min():.2f} %"
    return [final, lowest, run.progress, f"{sent:,.2f}", f"{seconds:,.1f}"]


def _together(runs: list[_Run]) -> list[str]:
    """Several runs in the same charts, and a table that tells what they differ in."""
    looks = [(f"C{i % 10}", ("-", "--", ":", "-.")[i // 10 % 4]) for i in range(len(runs))]
    against: dict[str, Callable[[_Run], np.ndarray]] = {
        "local steps": lambda run: run.errors.steps,
        "seconds of training": lambda run: run.errors.seconds,
        "MB sent by a worker": lambda run: run.bytes_sent / 1e6,
    }

    def draw(axes: Axes, label: str) -> None:
        for run, (color, style) in zip(runs, looks, strict=True):
            x = against[label](run)
            axes.plot(x, run.errors.center, style, color=color, linewidth=1.3, marker=figures.marker_of(x))
        axes.set(xlabel=label, ylabel="test error (%)")
        figures.scale(axes, *(run.errors.center for run in runs))

    charts = [_picture(partial(draw, label=label), f"The center's test error by {label}.", "") for label in against]
    fields = [field.name for field in dataclasses.fields(Config)]
    settings = [run.config.effective for run in runs]
    differing = [name for name in fields if any(of.get(name) != settings[0].get(name) for of in settings)]
    rows = []
    for number, (run, look, of) in enumerate(zip(runs, looks, settings, strict=True), 1):
        link = _Markup(f'{_swatch(*look)}<a href="#run-{number}">{_escaped(run.name)}</a>')
        rows.append([link, *_ends(run), *(_text(of[name]) if name in of else "" for name in differing)])
    header = ["run", *_ENDS, *differing]
    return [_table(rows, header, "How the runs ended, and what they differ in.", "wide"), _side_by_side(charts)]


def _swatch(color: str, style: str) -> str:
    dashes = {"-": "none", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[style]
    return (
        '<svg class="swatch" viewBox="0 0 24 10" aria-hidden="true"><path d="M0 5H24" stroke-width="2.5"'
        f' stroke="{to_hex(color)}" stroke-dasharray="{dashes}"/></svg>'
    )


def _section(run: _Run) -> list[str]:
    """All about one run."""
    config = run.config
    facts = {
        "method": config.method + (f", {config.asynchronous}" if config.asynchronous else ""),
        "data and network": f"{config.dataset}, {config.model}",
        "workers": f"{config.groups} x {config.workers}",
        **dict(zip(_ENDS, _ends(run), strict=True)),
    }
    cards = [f"<div><dt>{name}</dt><dd>{_escaped(text)}</dd></div>" for name, text in facts.items() if text]
    parts = [f"<dl>{''.join(cards)}</dl>"]
    for title, charts in groupby(_charts_of(run), lambda chart: chart.title):
        pictures = [_picture(chart.draw, chart.caption, run.name) for chart in charts]
        parts += [f"<h3>{title}</h3>", _side_by_side(pictures)]
    if run.events:
        caption = f"The first {MOST_EVENTS} of {len(run.events):,}." if len(run.events) > MOST_EVENTS else ""
        table = _table(run.events[:MOST_EVENTS], ["local step", "what happened"], caption)
        parts += ["<h3>Failures, revivals, resumes</h3>", table]
    values = [[name, _text(value)] for name, value in config.effective.items()]
    parts += ["<h3>Configuration</h3>", _table(values, place="columns")]
    if run.environment:
        parts += ["<h3>Environment</h3>", _table([list(told) for told in run.environment.items()])]
    return parts


def _side_by_side(pictures: list[str]) -> str:
    return f'<div class="charts">{"".join(pictures)}</div>'


def _table(rows: list[list[str]], header: Sequence[str] = (), caption: str = "", place: str = "narrow") -> str:
    top = f"<caption>{caption}</caption>" if caption else ""
    if header:
        top += f"<tr>{''.join(f'<th>{_escaped(name)}</th>' for name in header)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="{place}"><table>{top}{body}</table></div>'
