"""The table of a comparison: a wide one for files, and a narrow one for terminals."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lsgd_jax.task import Headline


def rows_of(summary: dict[str, Any]) -> list[list[str]]:
    """Return the summary of a comparison as rows of text, header first."""
    headline = Headline(**summary["headline"])
    name, unit, at_target = headline.name, summary["unit"], _target(summary, headline)
    header = [
        "method",
        "hyperparameters",
        f"final {name} (95 %)",
        *(["perplexity"] if headline.perplexity else []),
        "median",
        f"minus {next(iter(summary['methods']))}, seed by seed (95 %, simultaneous)",
        "p (Holm)",
        f"best {name} (95 %)",
        f"final {name} of the best worker",
        f"final {name} at equal bytes",
        *([f"steps to {at_target}", f"MB sent to {at_target}"] if at_target else []),
        "MB sent per worker",
        f"{unit} per worker",
    ]
    rows = [header]
    for method, of in summary["methods"].items():
        hyper = [f"{name} {v if isinstance(v, str) else f'{v:g}'}" for name, v in of["hyper-parameters"].items()]
        measured = [f"final_{name}", f"best_{name}", f"final_best_worker_{name}", f"final_{name}_at_equal_bytes"]
        final, *others = (_interval(of[key], headline) for key in measured)
        median = _interval({"mean": of[f"final_{name}"]["median"], "half_width": None}, headline)
        row = [method, ", ".join(hyper), final]
        if headline.perplexity:
            row.append(_number(of["perplexity"], 2))
        row += [median, *_difference(summary, method), *others]
        if at_target:
            some = f" ({of['seeds_at_target']} of {len(summary['seeds'])} seeds)"
            row.append(_number(of["steps_to_target"], 0, "not reached") + some)
            row.append(_number(of["megabytes_to_target"], 1, "not reached"))
        row += [_number(of["megabytes_sent"], 1), str(of[f"{unit}_seen"])]
        rows.append(row)
    return rows


def markdown(rows: Iterable[list[str]]) -> str:
    """Return rows, header first, as a table in Markdown."""
    header, *others = rows
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *others])


def show(summary: dict[str, Any]) -> None:
    """Print the summary of a comparison: in 80 columns on a terminal, otherwise all of it in Markdown."""
    if sys.stdout.isatty():
        Console(highlight=False).print(for_terminal(summary), notes(summary))
    else:
        print(markdown(rows_of(summary)), notes(summary), sep="\n")


def for_terminal(summary: dict[str, Any]) -> Table:
    """Return the summary of a comparison as a table that fits 80 columns."""
    headline = Headline(**summary["headline"])
    name, at_target = headline.name, _target(summary, headline)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for header in (
        f"final {name}\n(95 %)",
        f"minus {next(iter(summary['methods']))}\n(95 %)",
        "p\n(Holm)",
        *(["perplexity"] if headline.perplexity else []),
        *([f"steps\nto {at_target}"] if at_target else []),
        "MB\nsent",
    ):
        table.add_column(header, justify="right")
    for method, of in summary["methods"].items():
        row = [method, _interval(of[f"final_{name}"], headline), *_difference(summary, method)]
        if headline.perplexity:
            row.append(_number(of["perplexity"], 2))
        if at_target:
            row.append(_number(of["steps_to_target"], 0, "never"))
        table.add_row(*row, _number(of["megabytes_sent"], 1))
    return table


def _target(summary: dict[str, Any], headline: Headline) -> str:
    """The target as text; empty if there is none."""
    target = summary[f"target_{headline.name}"]
    return "" if target is None else f"{target:.1%}" if headline.percent else f"{target:g}"


def _interval(interval: dict[str, Any], headline: Headline) -> str:
    mean, half = interval["mean"], interval["half_width"]
    if mean is None and "values" in interval:
        return f"{interval['values'].count(None)} of {len(interval['values'])} seeds failed"
    if mean is None:
        return "not finite"
    plus_minus = "" if half is None else f" ± {headline.text(half).removesuffix('%')}"
    return headline.text(mean, space=" ") + plus_minus


def _difference(summary: dict[str, Any], method: str) -> list[str]:
    """A method's difference to the first, and the p-value; both empty for the first."""
    if method == next(iter(summary["methods"])):
        return ["", ""]
    of = summary["methods"][method]["difference_to_first"]
    if None in of["values"]:
        return ["", ""]
    p = of["p_holm"]
    return [_interval(of, Headline(**summary["headline"])), "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"]


def notes(summary: dict[str, Any]) -> str:
    """Return what the numbers of the table are, in a few sentences."""
    first, *others = summary["methods"]
    seeds, tuning = len(summary["seeds"]), len(summary["tuning_seeds"])
    said = [f"{seeds} seeds; ± is half of a 95 % t-interval." if seeds > 1 else "One seed."]
    if seeds > 1 and others:
        said.append(
            f"Comparisons with {first}, paired by seed: {len(others)}; their intervals are simultaneous (Bonferroni),"
            " and their p-values corrected by Holm's method."
        )
    if tuning:
        tried = max(len(of["tried"]) for of in summary["methods"].values())
        said.append(
            f"Tuning tried at most {tried} cells per method with {tuning} other seeds on held-out training data."
        )
        models = {each["values"].get("evaluated_model") for of in summary["methods"].values() for each in of["tried"]}
        if len(models) > 1:
            of_tails = [m for m, of in summary["methods"].items() if "evaluated_model" in of["hyper-parameters"]]
            said.append(f"It chose the tail mean as the evaluated model of {', '.join(of_tails) or 'no method'}.")
    return " ".join(said)


def _number(value: float | None, digits: int, otherwise: str = "not finite") -> str:
    return otherwise if value is None else f"{value:.{digits}f}"
