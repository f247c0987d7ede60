"""Compares methods with identical initialization, data and data order, over several seeds."""

import contextlib
import csv
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx
from scipy import stats

from lsgd_jax import files
from lsgd_jax.checks import check_names, check_path
from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.task import Headline
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tracking.run_folder import MOST_BYTES, making_sense_of, read_config, read_metrics
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.train.setup import prepare
from lsgd_jax.tuning import check_grid, grid

VALIDATION = 0.2
"""Share of the training data held out for tuning."""
TUNING_SEEDS = 2
"""Number of seeds for tuning: what is good with only one seed is often close to diverging."""

_OF_A_CELL = ("method", "seed", "checkpoint_every")
"""Fields that are not the same in all of a comparison."""


def compare(
    config: Config,
    methods: list[str],
    seeds: list[int],
    out: Path | str,
    *,
    tune: bool,
    target: float | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    data_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Train every method with every seed and summarize the results; finished runs in the folder are reused.

    Args:
      config: configuration of all runs except for the method, the seed and tuned options; a method ignores the options
        that it does not have.
      methods: distinct names in `METHODS`.
      seeds: random seeds of initialization and data order.
      out: output folder: one run folder per cell, and the summary as JSON, CSV and Markdown.
      tune: whether to choose each method's hyperparameters from its `grid`, by the mean of the final headline measure
        on held-out training data with the first seeds.
      target: value of the headline measure to report the steps and bytes to; None: the task's own, if any.
      options: overrides of fields of `config`, each for all methods that have it, such as `prox` of MGRAWA and LGRAWA.
      data_dir: folder of prepared data sets; None: the default of tensorflow-datasets.

    Returns:
      The summary.

    Raises:
      UsageError: if the folder has a comparison with another configuration, another process writes it, a run does not
        fit the machine, an option has no effect with any of the methods, or tuning chooses it.
    """
    out = check_path("out", out)
    check_names("method", methods, METHODS)
    configs = configs_of(config, methods, options)
    for method_config in configs.values() if tune else ():
        check_grid(method_config, options)
    chosen = {method: of.replace(learning_rate=of.comparable_rate) for method, of in configs.items()}
    for method_config in chosen.values():
        # Report configurations that don't fit before anything is trained or written.
        model = prepare(method_config, data_dir).model
    with _claimed(out, config, options, tune):
        return _compare(configs, seeds, out, chosen, model, tune, target, data_dir)


def _compare(
    configs: dict[str, Config],
    seeds: list[int],
    out: Path,
    chosen: dict[str, Config],
    model: nnx.Module,
    tune: bool,
    target: float | None,
    data_dir: Path | str | None,
) -> dict[str, Any]:
    """Train and summarize in the claimed folder; methods that are not tuned use the configurations in `chosen`."""
    methods = list(configs)
    headline = configs[methods[0]].task.headline
    target = headline.target if target is None else target
    tuning_seeds = seeds[:TUNING_SEEDS] if tune else []
    done, cells = 0, sum(len(seeds) + len(tuning_seeds) * len(grid(of)) for of in configs.values())

    def cell(path: Path, config: Config) -> float:
        nonlocal done
        done += 1
        unfinished, aside = (path.with_name(path.name + suffix) for suffix in (".unfinished", ".unreadable"))
        with _writing(out):
            trained = path.exists()
            if trained and (problem := _problem_of(path, config)):
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(
                    f"{path.relative_to(out)} is trained again; the old run is now {aside.name}: {problem}", flush=True
                )
                trained = False
        if not trained:
            shutil.rmtree(unfinished, ignore_errors=True)
            train_and_evaluate(config, unfinished, data_dir=data_dir, lines=False, stop_if_all_fail=False)
            with _writing(out):
                files.sync_tree(unfinished)  # The final name of a cell implies that it is complete.
                unfinished.rename(path)
                files.sync(path.parent)
        value = curves([path], headline)["center"][0, -1]
        print(f"[{done}/{cells}] {path.relative_to(out)}: {headline.text(value)}", flush=True)
        return value

    tried: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for method in methods:
        if tune:
            candidates = [configs[method].replace(**values) for values in grid(configs[method])]
            for i, (values, of) in enumerate(zip(grid(configs[method]), candidates, strict=True)):
                candidate = of.replace(validation=VALIDATION)
                measured = [
                    cell(out / method / f"tune-{i}-seed-{seed}", candidate.replace(seed=seed)) for seed in tuning_seeds
                ]
                shown = {name: of.effective[name] for name in values}
                tried[method].append({"values": shown, f"validation_{headline.name}": _finite(np.mean(measured))})
            scores = [trial[f"validation_{headline.name}"] for trial in tried[method]]
            best = int(np.nanargmin([np.inf if score is None else score for score in scores]))
            chosen[method] = candidates[best]
        for seed in seeds:
            cell(out / method / f"seed-{seed}", chosen[method].replace(seed=seed))

    # Methods that send more than the thriftiest one, beyond the scalars of elections, are also trained for as many
    # steps as send equally many bytes.
    params = nnx.state(model, nnx.Param)
    totals = {method: bytes_sent(of, params, of.steps) for method, of in chosen.items()}
    thriftiest = min((total for total in totals.values() if total), default=0.0)
    summary: dict[str, Any] = {"headline": headline._asdict(), f"target_{headline.name}": target}
    summary |= {"seeds": seeds, "methods": {}}
    for method in methods:
        runs = matched = [out / method / f"seed-{seed}" for seed in seeds]
        if totals[method] > 1.01 * thriftiest:
            steps = int(chosen[method].steps * thriftiest / totals[method])
            eval_every = min(chosen[method].eval_every, steps)
            shorter = chosen[method].replace(steps=steps, eval_every=eval_every)
            cells += len(seeds)
            matched = [out / method / f"matched-bytes-seed-{seed}" for seed in seeds]
            for seed, path in zip(seeds, matched, strict=True):
                cell(path, shorter.replace(seed=seed))
        summary["methods"][method] = _summary(runs, matched, headline, target) | {
            "hyper-parameters": hyperparameters(chosen[method]),
            "tried": tried[method],
        }
    final = f"final_{headline.name}"
    finals = {method: np.array(of[final]["values"], float) for method, of in summary["methods"].items()}
    for method, of in summary["methods"].items():  # Paired by seed, since initialization and data are the same.
        of["difference_to_first"] = _interval(finals[method] - finals[methods[0]])
    summary["environment"] = environment()
    files.write(out / "comparison.json", json.dumps(summary, indent=2) + "\n")
    rows, text = list(table(summary)), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write(out / "comparison.csv", text.getvalue())
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
    files.write(out / "comparison.md", "\n".join(lines) + "\n")
    return summary


def hyperparameters(config: Config) -> dict[str, Any]:
    """Return the learning rate and the method's options of a configuration, except for those that are off by default.

    Example:
      >>> from lsgd_jax.presets import PRESETS
      >>> hyperparameters(PRESETS["digits"].replace(method="easgd", pull=0.1))
      {'learning_rate': 0.1, 'period': 4, 'pull': 0.1, 'center_pull': 0.8}
    """
    defaults = METHODS[config.method].options
    shown = {
        name: value
        for name, value in config.options.items()
        if value != defaults[name] or (isinstance(value, int | float) and value)
    }
    return {"learning_rate": config.learning_rate} | shown


def table(summary: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the summary of a comparison as rows of text, header first."""
    headline = Headline(**summary["headline"])
    name, target = headline.name, summary[f"target_{headline.name}"]
    at_target = "" if target is None else f"{target:.1%}" if headline.percent else f"{target:g}"
    yield [
        "method",
        "hyper-parameters",
        f"final {name} (95 %)",
        "median",
        f"minus {next(iter(summary['methods']))}, seed by seed (95 %)",
        f"best {name} (95 %)",
        f"final {name} of the best worker",
        f"final {name} at equal bytes",
        *([f"steps to {at_target}", f"MB sent to {at_target}"] if at_target else []),
    ]
    for method, of in summary["methods"].items():
        hyper = [f"{name} {v if isinstance(v, str) else f'{v:g}'}" for name, v in of["hyper-parameters"].items()]
        measured = (f"final_{name}", "difference_to_first", f"best_{name}", f"final_best_worker_{name}")
        final, *others = (_text(of[key], headline) for key in (*measured, f"final_{name}_at_equal_bytes"))
        median = _text({"mean": of[f"final_{name}"]["median"], "half_width": None}, headline)
        row = [method, ", ".join(hyper), final, median, *others]
        if at_target:
            some = f" ({of['seeds_at_target']} of {len(summary['seeds'])} seeds)"
            steps, megabytes = of["steps_to_target"], of["megabytes_to_target"]
            row.append(("not reached" if steps is None else f"{steps:.0f}") + some)
            row.append("not reached" if megabytes is None else f"{megabytes:.1f}")
        yield row


def curves(runs: list[Path], headline: Headline) -> dict[str, np.ndarray]:
    """Read metrics at the evaluations of a method's runs, as arrays [seeds, evaluations]; NaN if they are not finite.

    Raises:
      UsageError: if they can't be read, or the runs differ in their evaluations or workers.
    """
    evaluations = [read_metrics(run, "evaluation") for run in runs]
    with making_sense_of(runs[0].parent):
        return _curves(evaluations, headline)


def _curves(evaluations: list[list[dict[str, Any]]], headline: Headline) -> dict[str, np.ndarray]:
    if not all(evaluations):
        raise ValueError("a run has no evaluation")

    def of(name: str) -> np.ndarray:
        return np.array([[entry[name] for entry in run] for run in evaluations], float)

    of_workers = np.array([[np.ravel(entry[headline.workers]) for entry in run] for run in evaluations]).astype(float)
    # The worker with the lowest training loss since the previous evaluation; nonfinite losses are null.
    losses = np.array([[np.ravel(entry["train_losses"]) for entry in run] for run in evaluations]).astype(float)
    best = np.nan_to_num(losses, nan=np.inf).argmin(-1)
    best_worker = np.take_along_axis(of_workers, best[..., None], -1)[..., 0]
    found = {name: of(name) for name in ("step", "seconds", "bytes_sent")}
    return found | {"center": of(headline.center), "best_worker": best_worker}


def configs_of(config: Config, methods: list[str], options: Mapping[str, Any]) -> dict[str, Config]:
    """Return the configuration of each method, before its learning rate is divided or tuned.

    Raises:
      UsageError: if a method can't be run with its configuration, or an option has no effect with any of them.
    """
    if options.get("asynchronous", config.asynchronous) is not None:
        raise UsageError("compare supports only synchronous training: asynchronous is for train.")
    try:
        configs = config.for_methods({method: method for method in methods}, options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return {method: of.replace(checkpoint_every=0) for method, of in configs.items()}  # Interrupted runs restart.


@contextlib.contextmanager
def _claimed(out: Path, config: Config, options: Mapping[str, Any], tune: bool) -> Iterator[None]:
    """Create and lock the folder for comparisons with this configuration.

    Raises:
      UsageError: if it is used for something else, another process writes it, or it can't be written.
    """
    fields = config.flat | dict(options)
    shared = {name: value for name, value in fields.items() if name not in _OF_A_CELL and value is not None}
    claim = {"config": json.loads(json.dumps(shared)), "tune": tune}
    path = out / "comparison-config.json"
    with contextlib.ExitStack() as held:
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.lock(out, "name another out folder"))
            if not path.exists():
                if not files.is_empty(out):
                    raise UsageError(f"the folder {out} is not empty and holds no comparison: name another out folder.")
                files.write(path, json.dumps(claim, indent=2) + "\n")
            if _claim_in(path) != claim:
                raise UsageError(f"{out} holds a comparison with another configuration: name another out folder.")
        yield


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"the folder {out} can't be written ({error.strerror}): name another out folder.") from None


def _claim_in(path: Path) -> Any:
    try:
        return files.parse_json(files.read_text(path, MOST_BYTES))
    except ValueError:
        raise UsageError(f"{path} was not written by a comparison: name another out folder.") from None


def _problem_of(run: Path, config: Config) -> str:
    """Describe the problem of a trained cell, such as files that never reached the disk; empty if there is none.

    Raises:
      UsageError: if it is a run with another configuration.
    """
    try:
        found = read_config(run)
    except UsageError as error:
        return str(error)
    if found != config:
        raise UsageError(f"{run} holds a run with another configuration: remove it, or name another out folder.")
    try:
        last = int(curves([run], config.task.headline)["step"][0, -1])
    except UsageError as error:
        return str(error)
    return "" if last == config.steps else f"its last evaluation is of step {last} of {config.steps}."


def _summary(runs: list[Path], matched: list[Path], headline: Headline, target: float | None) -> dict[str, Any]:
    of, name = curves(runs, headline), headline.name
    center = of["center"]
    found = {
        f"final_{name}": _interval(center[:, -1]),
        f"best_{name}": _interval(np.nan_to_num(center, nan=np.inf).min(1)),
        f"final_best_worker_{name}": _interval(of["best_worker"][:, -1]),
        f"final_{name}_at_equal_bytes": _interval(curves(matched, headline)["center"][:, -1]),
    }
    if target is None:
        return found
    reached: np.ndarray = center <= target
    first, ever = reached.argmax(1), np.atleast_1d(reached.any(1))

    def at_target(name: str) -> float | None:
        """Median over seeds; None if half of them never reach the target."""
        middle = float(np.median([of[name][i, first[i]] if ever[i] else np.inf for i in range(len(runs))]))
        return middle if math.isfinite(middle) else None

    megabytes = at_target("bytes_sent")
    return found | {
        "seeds_at_target": int(ever.sum()),
        "steps_to_target": at_target("step"),
        "megabytes_to_target": None if megabytes is None else megabytes / 1e6,
    }


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Mean over seeds with a 95 % t-interval; no interval for a single seed, and None for what is not finite."""
    half = None
    if len(values) > 1:
        half = _finite(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    median = np.median(np.nan_to_num(values, nan=np.inf))  # The median of most seeds stays finite if a few have failed.
    numbers = {"mean": _finite(values.mean()), "median": _finite(median), "half_width": half}
    return numbers | {"values": [_finite(value) for value in values]}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _text(interval: dict[str, Any], headline: Headline) -> str:
    mean, half = interval["mean"], interval["half_width"]
    if mean is None:
        return "not finite"
    plus_minus = "" if half is None else f" ± {headline.text(half).removesuffix('%')}"
    return headline.text(mean, space=" ") + plus_minus
