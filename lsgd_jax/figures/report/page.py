"""HTML page of a report."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax.figures.palette import look
from lsgd_jax.figures.report.charts import charts_of, shared_charts
from lsgd_jax.figures.report.reading import Run, text_of

MOST_EVENTS = 50
"""Events shown per run."""

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="lsgd report">
"""
_HERE = Path(__file__).parent


class _Markup(str):
    """Text that is already HTML; all other text is escaped."""


def _escaped(text: str) -> str:
    return text if isinstance(text, _Markup) else html.escape(text)


def render(runs: list[Run], *, refresh: int | None = None) -> str:
    """Render the page for runs.

    Args:
      runs: to show.
      refresh: seconds after which a browser loads the page again; None: never.
    """
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    own = [list(charts_of(run)) for run in runs]
    shared = shared_charts(runs) if len(runs) > 1 else []
    of_runs = [{"name": run.name, "charts": charts} for run, charts in zip(runs, own, strict=True)]
    parts = [f"<h1>{_escaped(title)}</h1>", '<div class="controls"></div>']
    parts.append("<noscript><p>The charts of this page need JavaScript; its tables do not.</p></noscript>")
    if len(runs) > 1:
        parts += [_results(runs), _figures(-1, shared)]
    for number, (run, charts) in enumerate(zip(runs, own, strict=True)):
        heading = f'<h2 id="run-{number + 1}">{_escaped(run.name)}</h2>' if len(runs) > 1 else ""
        parts.append(
            "\n".join([f'<section data-run="{number}">', heading, *_section(number, run, charts), "</section>"])
        )
    main = "<main>\n" + "\n".join(parts) + "\n</main>"
    body = f'<body class="several">\n{_sidebar(runs)}\n{main}' if len(runs) > 1 else f"<body>\n{main}"
    return _document(title, body, {"shared": shared, "runs": of_runs}, refresh)


def _document(title: str, body: str, data: Mapping[str, Any], refresh: int | None) -> str:
    """The whole page. Only the scripts that come with the package run, and nothing is loaded from elsewhere."""
    scripts = [(_HERE / name).read_text() for name in ("uplot.js", "report.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts
    )
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh is not None else ""
    style = "".join((_HERE / name).read_text() for name in ("uplot.css", "report.css"))
    as_json = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    return f"""{HEAD}\
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{again}<title>{_escaped(title)}</title>
<style>{style}</style>
</head>
{body}
<script type="application/json" id="data">{as_json}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def _ends_of(titles: Sequence[str]) -> list[str]:
    """What the numbers of `_ends` are, for runs whose headline measures have these titles."""
    [title, *others] = dict.fromkeys(titles)
    measure = "headline measure" if others else title
    return [
        f"final {measure}",
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


def _results(runs: list[Run]) -> str:
    """A table of the runs' results and differing options."""
    settings = [run.config.effective for run in runs]
    fields = dict.fromkeys(name for of in settings for name in of)
    differing = [name for name in fields if any(of.get(name) != settings[0].get(name) for of in settings)]
    rows = []
    for number, (run, of) in enumerate(zip(runs, settings, strict=True), 1):
        link = _Markup(f'<a href="#run-{number}">{_escaped(run.name)}</a>')
        rows.append([link, *_ends(run), *(text_of(of[name]) if name in of else "" for name in differing)])
    headlines = dict.fromkeys(run.config.task.headline for run in runs)
    header = ["run", *_ends_of([headline.title for headline in headlines]), *differing]
    return _table(rows, header, "Results, and options that differ.", "wide")


def _sidebar(runs: list[Run]) -> str:
    """A box per run, by which it is hidden, and a link to its section."""
    items = [
        f'<li><input type="checkbox" value="{number}" checked aria-label="show {_escaped(run.name)}">'
        f'<a href="#run-{number + 1}">{_escaped(run.name)}</a></li>'
        for number, run in enumerate(runs)
    ]
    return f"<nav><ul>{''.join(items)}</ul></nav>"


def _section(number: int, run: Run, charts: list[dict[str, Any]]) -> list[str]:
    """The section for one run."""
    config = run.config
    facts = {
        "method": look(config.method).name + (f", {config.asynchronous}" if config.asynchronous else ""),
        "task": str(config.task),
        "workers": f"{config.groups} x {config.workers}",
        **dict(zip(_ends_of([config.task.headline.title]), _ends(run), strict=True)),
    }
    cards = [f"<div><dt>{_escaped(name)}</dt><dd>{_escaped(text)}</dd></div>" for name, text in facts.items() if text]
    parts = [f"<dl>{''.join(cards)}</dl>", _figures(number, charts)]
    if run.events:
        caption = f"First {MOST_EVENTS} of {len(run.events):,}." if len(run.events) > MOST_EVENTS else ""
        table = _table(run.events[:MOST_EVENTS], ["local step", "event"], caption)
        parts += ["<h3>Failures, revivals, resumes</h3>", table]
    values = [[name, text_of(value)] for name, value in config.effective.items()]
    parts += ["<h3>Configuration</h3>", _table(values, place="columns")]
    if run.environment:
        parts += ["<h3>Environment</h3>", _table([list(entry) for entry in run.environment.items()])]
    return parts


def _figures(run: int, charts: list[dict[str, Any]]) -> str:
    """Places for the charts of a run, or of all (-1), which the script fills."""
    figures = (
        f'<figure><figcaption>{_escaped(chart["title"])}</figcaption><div data-chart="{run}/{number}"></div></figure>'
        for number, chart in enumerate(charts)
    )
    return f'<div class="charts">{"".join(figures)}</div>'


def _table(rows: list[list[str]], header: Sequence[str] = (), caption: str = "", place: str = "narrow") -> str:
    top = f"<caption>{caption}</caption>" if caption else ""
    if header:
        top += f"<tr>{''.join(f'<th>{_escaped(name)}</th>' for name in header)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="{place}"><table>{top}{body}</table></div>'
