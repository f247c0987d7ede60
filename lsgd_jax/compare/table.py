"""The table of a comparison: all of it for files, and what fits them for terminals."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from lsgd_jax.task import Headline
from lsgd_jax.tracking.table import fitting


def rows_of(summary: dict[str, Any]) -> list[list[str]]:
    """Return the summary of a comparison as rows of text, header first."""
    headline = Headline(**summary["headline"])
    name, unit, at_target = headline.name, summary["unit"], _target(summary, headline)
    titles = {
        "method": "method",
        "hyperparameters": "hyperparameters",
        "final": f"final {name} (95 %)",
        "perplexity": "perplexity",
        "median": "median",
        "difference": f"minus {next(iter(summary['methods']))}, seed by seed (95 %, simultaneous)",
        "p": "p (Holm)",
        "best": f"best {name} (95 %)",
        "best_worker": f"final {name} of the best worker",
        "equal_bytes": f"final {name} at equal bytes",
        "steps_to_target": f"steps to {at_target}",
        "megabytes_to_target": f"MB sent to {at_target}",
        "megabytes": "MB sent per worker",
        "seen": f"{unit} per worker",
    }
    cells = [_cells(summary, method, headline) for method in summary["methods"]]
    titles = {key: title for key, title in titles.items() if key in cells[0]}
    return [list(titles.values()), *([of[key] for key in titles] for of in cells)]


def _cells(summary: dict[str, Any], method: str, headline: Headline) -> dict[str, str]:
    """What the table has on a method: texts by column."""
    of, name = summary["methods"][method], headline.name
    hyper = [f"{key} {v if isinstance(v, str) else f'{v:g}'}" for key, v in of["hyper-parameters"].items()]
    difference, p = _difference(summary, method)
    cells = {
        "method": method,
        "hyperparameters": ", ".join(hyper),
        "final": _interval(of[f"final_{name}"], headline),
        "median": _interval({"mean": of[f"final_{name}"]["median"], "half_width": None}, headline),
        "difference": difference,
        "p": p,
        "best": _interval(of[f"best_{name}"], headline),
        "best_worker": _interval(of[f"final_best_worker_{name}"], headline),
        "equal_bytes": _interval(of[f"final_{name}_at_equal_bytes"], headline),
        "megabytes": _number(of["megabytes_sent"], 1),
        "seen": str(of[f"{summary['unit']}_seen"]),
    }
    if headline.perplexity:
        cells["perplexity"] = _number(of["perplexity"], 2)
    if _target(summary, headline):
        some = f" ({of['seeds_at_target']} of {len(summary['seeds'])} seeds)"
        cells["steps_to_target"] = _number(of["steps_to_target"], 0, "not reached") + some
        cells["megabytes_to_target"] = _number(of["megabytes_to_target"], 1, "not reached")
    return cells


def markdown(rows: Iterable[list[str]]) -> str:
    """Return rows, header first, as a table in Markdown."""
    header, *others = rows
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *others])


def show(summary: dict[str, Any]) -> None:
    """Print the summary of a comparison: what fits it on a terminal, otherwise all of it in Markdown."""
    if sys.stdout.isatty():
        console = Console(highlight=False)
        console.print(for_terminal(summary, console.width), notes(summary))
    else:
        print(markdown(rows_of(summary)), notes(summary), sep="\n")


def for_terminal(summary: dict[str, Any], width: int) -> Table:
    """Return the summary of a comparison as a table with as many columns as fit a terminal of this width."""
    headline = Headline(**summary["headline"])
    name, at_target, seeds = headline.name, _target(summary, headline), len(summary["seeds"])
    titles = {
        "method": "method",
        "final": f"final {name}\n(95 %)",
        "difference": f"minus {next(iter(summary['methods']))}\n(95 %)",
        "p": "p\n(Holm)",
        "perplexity": "perplexity",
        "steps_to_target": f"steps\nto {at_target}",
        "megabytes": "MB\nsent",
        "at_target": f"seeds\nat {at_target}",
        "median": "median",
        "best": f"best {name}\n(95 %)",
        "megabytes_to_target": f"MB\nto {at_target}",
        "best_worker": "final,\nbest worker",
        "equal_bytes": "final,\nequal bytes",
        "seen": summary["unit"],
        "hyperparameters": "hyperparameters",
    }
    cells = []
    for method, of in summary["methods"].items():
        cells.append(_cells(summary, method, headline))
        if at_target:
            cells[-1]["steps_to_target"] = _number(of["steps_to_target"], 0, "never")
            cells[-1]["megabytes_to_target"] = _number(of["megabytes_to_target"], 1, "never")
            cells[-1]["at_target"] = f"{of['seeds_at_target']} of {seeds}"
    return fitting(([title, *(of[key] for of in cells)] for key, title in titles.items() if key in cells[0]), width)


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
    if seeds > 1 and _same_with_every_seed(summary):
        said.append("Where ± is missing, all seeds agree, and their spread cannot be told from them.")
    if seeds > 1 and others:
        said.append(
            f"Comparisons with {first}, paired by seed: {len(others)}; their intervals are simultaneous (Bonferroni),"
            " and their p-values corrected by Holm's method."
        )
    if seeds > 1 and (target := _target(summary, Headline(**summary["headline"]))):
        said.append(f"Steps and MB to {target} are medians over seeds; seeds that never get there count as infinite.")
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


def _same_with_every_seed(summary: dict[str, Any]) -> bool:
    """Whether any interval is missing although no seed failed."""
    name, (_, *others) = Headline(**summary["headline"]).name, summary["methods"].values()
    shown = (f"final_{name}", f"best_{name}", f"final_best_worker_{name}", f"final_{name}_at_equal_bytes")
    intervals = [of["difference_to_first"] for of in others]
    intervals += [of[interval] for of in summary["methods"].values() for interval in shown]
    return any(each["mean"] is not None and each["half_width"] is None for each in intervals)


def _number(value: float | None, digits: int, otherwise: str = "not finite") -> str:
    return otherwise if value is None else f"{value:.{digits}f}"
