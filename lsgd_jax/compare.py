"""Comparing methods: every method from the same starts, on the same data in the same order, over several seeds."""

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.run_folder import environment, read_metrics
from lsgd_jax.train import train_and_evaluate

RATES = (0.3, 1.0, 3.0)
"""Learning rates that tuning tries, as multiples of the preset's, with both values of the method's own option."""
RATES_ALONE = (0.1, 0.3, 0.6, 1.0, 2.0, 3.0)
"""For methods without an option of their own: as many cells."""
VALIDATION = 0.2
"""The share of the training data held out in tuning."""
TUNING_SEEDS = 2
"""How many of the seeds tuning uses: what is good with one seed alone is often about to diverge."""


def grid(config: Config) -> list[dict[str, Any]]:
    """The hyper-parameters that tuning tries for a configuration's method; the same number for every method."""
    method = METHODS[config.method]
    rate = config.learning_rate / (config.groups * config.workers if method.adds_up else 1)
    if not method.grid:
        return [{"learning_rate": rate * factor} for factor in RATES_ALONE]
    [(name, values)] = method.grid.items()
    return [{"learning_rate": rate * factor, name: value} for factor in RATES for value in values]


def compare(
    config: Config, methods: list[str], seeds: list[int], out: Path, *, tune: bool, target_error: float
) -> dict[str, Any]:
    """Train every method with every seed and sum up; what has been trained into the folder before is not again.

    Args:
      config: of all runs, but for the method, the seed and what is tuned.
      methods: names in `METHODS`.
      seeds: of the starts and the data's orders.
      out: the folder: one run folder a cell, and the summary as JSON, CSV and markdown.
      tune: whether to choose each method's hyper-parameters from its `grid`, by the mean of the last errors on held-out
        training data with the first seeds.
      target_error: the test error, in [0, 1], of which it is told when it was reached.

    Returns:
      The summary.

    Raises:
      UsageError: if the folder holds a comparison with another configuration, or a run does not fit the machine.
    """
    _claim(out, config)
    tuning_seeds = seeds[:TUNING_SEEDS] if tune else []
    cells = len(methods) * (len(seeds) + len(grid(config)) * len(tuning_seeds))
    done = 0

    def cell(path: Path, config: Config) -> float:
        nonlocal done
        done += 1
        if not path.exists():
            unfinished = path.with_name(path.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            train_and_evaluate(config, unfinished, lines=False)
            unfinished.rename(path)
        elif Config.load(path) != config:
            raise UsageError(f"{path} holds a run with another configuration: name another folder with --out.")
        error = read_metrics(path, "evaluation")[-1]["center_error"]
        print(f"[{done}/{cells}] {path.relative_to(out)}: {error:.2%}", flush=True)
        return error

    summary: dict[str, Any] = {"target_error": target_error, "seeds": seeds, "methods": {}}
    for method in methods:
        chosen, tried = dataclasses.replace(config, method=method), []
        if tune:
            for i, values in enumerate(grid(chosen)):
                candidate = dataclasses.replace(chosen, **values, validation=VALIDATION)
                errors = [
                    cell(out / method / f"tune-{i}-seed-{seed}", dataclasses.replace(candidate, seed=seed))
                    for seed in tuning_seeds
                ]
                tried.append(values | {"validation_error": float(np.mean(errors))})
            best = min(tried, key=lambda values: values["validation_error"])
            chosen = dataclasses.replace(chosen, **{k: v for k, v in best.items() if k != "validation_error"})
        for seed in seeds:
            cell(out / method / f"seed-{seed}", dataclasses.replace(chosen, seed=seed))
        runs = [out / method / f"seed-{seed}" for seed in seeds]
        summary["methods"][method] = _summary(runs, target_error) | {
            "hyper-parameters": {k: getattr(chosen, k) for k in grid(chosen)[0]} | _timing(chosen),
            "tried": tried,
        }
    _match_bytes(summary, out)
    summary["environment"] = environment()
    (out / "comparison.json").write_text(json.dumps(summary, indent=2) + "\n")
    rows = list(table(summary))
    with (out / "comparison.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
    (out / "comparison.md").write_text("\n".join(lines) + "\n")
    return summary


def table(summary: dict[str, Any]) -> Iterator[list[str]]:
    """A comparison's summary as rows of text, the header first."""
    target = f"{summary['target_error']:.1%}"
    yield [
        "method",
        "hyper-parameters",
        "final error (95 %)",
        "best error (95 %)",
        "final error of the best worker",
        f"error at {summary['matched_megabytes']:.1f} MB sent",
        f"steps to {target}",
        f"MB sent to {target}",
    ]
    for method, of in summary["methods"].items():
        hyper = ", ".join(f"{k} {v if v is None else f'{v:g}'}" for k, v in of["hyper-parameters"].items())
        steps, megabytes = of["steps_to_target"], of["megabytes_to_target"]
        yield [
            method,
            hyper.replace("None", "default"),
            _percent(of["final_error"]),
            _percent(of["best_error"]),
            _percent(of["final_best_worker_error"]),
            _percent(of["matched_error"]),
            "not reached" if steps is None else f"{steps:.0f}",
            "not reached" if megabytes is None else f"{megabytes:.1f}",
        ]


def curves(runs: list[Path]) -> dict[str, np.ndarray]:
    """What the evaluations of a method's runs tell, [seeds, evaluations]."""
    evaluations = [read_metrics(run, "evaluation") for run in runs]

    def of(name: str) -> np.ndarray:
        return np.array([[entry[name] for entry in run] for run in evaluations], float)

    worker_errors = np.array([[np.ravel(entry["worker_errors"]) for entry in run] for run in evaluations])
    # The worker with the lowest training loss, as a leader has it; null where a loss is not finite.
    losses = np.array([[np.ravel(entry["train_losses"]) for entry in run] for run in evaluations]).astype(float)
    best = np.nan_to_num(losses, nan=np.inf).argmin(-1)
    best_worker_error = np.take_along_axis(worker_errors, best[..., None], -1)[..., 0]
    names = ("step", "seconds", "bytes_sent", "center_error")
    return {name: of(name) for name in names} | {"best_worker_error": best_worker_error}


def _claim(out: Path, config: Config) -> None:
    """Make the folder for comparisons of this configuration."""
    common = json.loads(dataclasses.replace(config, method="lsgd", seed=0).to_json())
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "config.json"
        if not path.exists():
            if any(out.iterdir()):
                raise UsageError(f"the folder {out} is not empty and holds no comparison: name another with --out.")
            path.write_text(json.dumps(common, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"the folder {out} can't be written ({error.strerror}): name another with --out.") from None
    if json.loads(path.read_text()) != common:
        raise UsageError(f"{out} holds a comparison with another configuration: name another folder with --out.")


def _summary(runs: list[Path], target_error: float) -> dict[str, Any]:
    of = curves(runs)
    error = of["center_error"]
    reached = error <= target_error
    first = reached.argmax(1)
    often = reached.any(1).mean() >= 0.5
    at = [i for i in range(len(runs)) if reached[i].any()]
    return {
        "final_error": _interval(error[:, -1]),
        "best_error": _interval(error.min(1)),
        "final_best_worker_error": _interval(of["best_worker_error"][:, -1]),
        "seeds_at_target": len(at),
        "steps_to_target": float(np.median([of["step"][i, first[i]] for i in at])) if often else None,
        "megabytes_to_target": float(np.median([of["bytes_sent"][i, first[i]] for i in at])) / 1e6 if often else None,
    }


def _match_bytes(summary: dict[str, Any], out: Path) -> None:
    """Add every method's error when a worker had sent as much as the thriftiest method that exchanges in all."""
    all_curves = {m: curves([out / m / f"seed-{seed}" for seed in summary["seeds"]]) for m in summary["methods"]}
    totals = [of["bytes_sent"][0, -1] for of in all_curves.values()]
    budget = min((total for total in totals if total > 0), default=0.0)
    summary["matched_megabytes"] = budget / 1e6
    for method, of in all_curves.items():
        within = np.flatnonzero(of["bytes_sent"][0] <= budget)
        matched = _interval(of["center_error"][:, within[-1]]) if len(within) else None
        summary["methods"][method]["matched_error"] = matched


def _interval(values: np.ndarray) -> dict[str, Any]:
    """The mean over seeds with its 95 % t-interval; no interval for a single seed."""
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return {"mean": float(values.mean()), "half_width": half, "values": values.tolist()}


def _percent(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "not evaluated by then"
    half = interval["half_width"]
    return f"{100 * interval['mean']:.2f} %" + ("" if half is None else f" ± {100 * half:.2f}")


def _timing(config: Config) -> dict[str, int]:
    return {"period": config.period} if METHODS[config.method].exchanges == "period" else {}
