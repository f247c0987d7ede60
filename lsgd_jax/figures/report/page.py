"""HTML page of a report."""

import html
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from lsgd_jax.figures import run as figures
from lsgd_jax.figures.report.charts import capital, charts_of, picture
from lsgd_jax.figures.report.reading import Run, text_of
from lsgd_jax.task import Headline

MOST_EVENTS = 50
"""Events shown per run."""


HEAD = """<!doctype html>
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
    """Text that is already HTML; all other text is escaped."""


def _escaped(text: str) -> str:
    return text if isinstance(text, _Markup) else html.escape(text)


def render(runs: list[Run]) -> str:
    """Render the page for runs."""
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    parts = [f"<h1>{_escaped(title)}</h1>"]
    if len(runs) > 1:
        parts += _together(runs)
    for number, run in enumerate(runs, 1):
        if len(runs) > 1:
            parts.append(f'<h2 id="run-{number}">{_escaped(run.name)}</h2>')
        parts += _section(run)
    body = "\n".join(parts)
    return f"""{HEAD}\
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


def _ends_of(titles: Sequence[str]) -> list[str]:
    """What the numbers of `_ends` are, for runs whose headline measures have these titles."""
    [title, *others] = dict.fromkeys(titles)
    measure = "headline measure" if others else title
    return [
        f"final {measure} of the center",
        f"lowest {measure}",
        "steps taken",
        "MB sent per worker",
        "seconds of training",
    ]


def _ends(run: Run) -> list[str]:
    """Final (or latest) numbers of a run."""
    curves, headline = run.curves, run.config.task.headline
    if not len(curves.steps):
        return ["not evaluated yet", "", run.progress, "", ""]
    sent, seconds = run.bytes_sent[-1] / 1e6, curves.seconds[-1]
    lowest = np.nan_to_num(curves.center, nan=np.inf).min()
    shown = [headline.text(value, space=" ") for value in (curves.center[-1], lowest)]
    return [*shown, run.progress, f"{sent:,.2f}", f"{seconds:,.1f}"]


def _together(runs: list[Run]) -> list[str]:
    """Several runs in shared charts, and a table of their results and differing options."""
    looks = [(f"C{i % 10}", ("-", "--", ":", "-.")[i // 10 % 4]) for i in range(len(runs))]
    against: dict[str, Callable[[Run], np.ndarray]] = {
        "local steps": lambda run: run.curves.steps,
        "seconds of training": lambda run: run.curves.seconds,
        "MB sent per worker": lambda run: run.bytes_sent / 1e6,
    }

    def draw(axes: Axes, label: str, headline: Headline) -> None:
        of_measure = [i for i, run in enumerate(runs) if run.config.task.headline == headline]
        for run, (color, style) in ((runs[i], looks[i]) for i in of_measure):
            x, y = against[label](run), headline.scale * run.curves.center
            axes.plot(x, y, style, color=color, linewidth=1.3, marker=figures.marker_of(x))
        axes.set(xlabel=label, ylabel=f"{headline.title}{headline.unit}")
        figures.scale(axes, *(headline.scale * runs[i].curves.center for i in of_measure))

    headlines = dict.fromkeys(run.config.task.headline for run in runs)
    charts = [
        picture(partial(draw, label=label, headline=each), f"{capital(each.title)} of the center by {label}.", "")
        for each in headlines
        for label in against
    ]
    settings = [run.config.effective for run in runs]
    fields = dict.fromkeys(name for of in settings for name in of)
    differing = [name for name in fields if any(of.get(name) != settings[0].get(name) for of in settings)]
    rows = []
    for number, (run, look, of) in enumerate(zip(runs, looks, settings, strict=True), 1):
        link = _Markup(f'{_swatch(*look)}<a href="#run-{number}">{_escaped(run.name)}</a>')
        rows.append([link, *_ends(run), *(text_of(of[name]) if name in of else "" for name in differing)])
    header = ["run", *_ends_of([headline.title for headline in headlines]), *differing]
    return [
        _table(rows, header, "Results, and options that differ.", "wide"),
        _side_by_side(charts),
    ]


def _swatch(color: str, style: str) -> str:
    dashes = {"-": "none", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[style]
    return (
        '<svg class="swatch" viewBox="0 0 24 10" aria-hidden="true"><path d="M0 5H24" stroke-width="2.5"'
        f' stroke="{to_hex(color)}" stroke-dasharray="{dashes}"/></svg>'
    )


def _section(run: Run) -> list[str]:
    """The section for one run."""
    config = run.config
    facts = {
        "method": config.method + (f", {config.asynchronous}" if config.asynchronous else ""),
        "task": str(config.task),
        "workers": f"{config.groups} x {config.workers}",
        **dict(zip(_ends_of([config.task.headline.title]), _ends(run), strict=True)),
    }
    cards = [f"<div><dt>{_escaped(name)}</dt><dd>{_escaped(text)}</dd></div>" for name, text in facts.items() if text]
    parts = [f"<dl>{''.join(cards)}</dl>"]
    for title, charts in groupby(charts_of(run), lambda chart: chart.title):
        pictures = [picture(chart.draw, chart.caption, run.name) for chart in charts]
        parts += [f"<h3>{_escaped(title)}</h3>", _side_by_side(pictures)]
    if run.events:
        caption = f"First {MOST_EVENTS} of {len(run.events):,}." if len(run.events) > MOST_EVENTS else ""
        table = _table(run.events[:MOST_EVENTS], ["local step", "event"], caption)
        parts += ["<h3>Failures, revivals, resumes</h3>", table]
    values = [[name, text_of(value)] for name, value in config.effective.items()]
    parts += ["<h3>Configuration</h3>", _table(values, place="columns")]
    if run.environment:
        parts += ["<h3>Environment</h3>", _table([list(entry) for entry in run.environment.items()])]
    return parts


def _side_by_side(pictures: list[str]) -> str:
    return f'<div class="charts">{"".join(pictures)}</div>'


def _table(rows: list[list[str]], header: Sequence[str] = (), caption: str = "", place: str = "narrow") -> str:
    top = f"<caption>{caption}</caption>" if caption else ""
    if header:
        top += f"<tr>{''.join(f'<th>{_escaped(name)}</th>' for name in header)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="{place}"><table>{top}{body}</table></div>'
