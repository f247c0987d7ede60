"""Comparing methods: every method from the same starts, on the same data in the same order, over several seeds."""

import contextlib
import csv
import dataclasses
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
from lsgd_jax.errors import UsageError
from lsgd_jax.ledger import bytes_sent
from lsgd_jax.methods import METHODS
from lsgd_jax.methods.lsgd import default_global_period
from lsgd_jax.run_folder import MOST_BYTES, environment, making_sense_of, read_config, read_metrics
from lsgd_jax.train import prepare, train_and_evaluate

RATES = (0.3, 1.0, 3.0)
"""Learning rates that tuning tries, as multiples of the preset's, with both values of the method's own option."""
RATES_ALONE = (0.1, 0.3, 0.6, 1.0, 2.0, 3.0)
"""For methods without an option of their own: as many cells."""
VALIDATION = 0.2
"""The share of the training data held out in tuning."""
TUNING_SEEDS = 2
"""How many of the seeds tuning uses: what is good with one seed alone is often about to diverge."""


def grid(config: Config) -> list[dict[str, Any]]:
    """The hyper-parameters that tuning tries for a configuration's method.

    By default the same number for every method. A preset's own rates and periods are tried as they are.
    """
    method = METHODS[config.method]
    if config.tune_learning_rates:
        periods: list[dict[str, Any]] = [{}]
        if method.exchanges == "period":
            periods = [_periods(config, every) for every in config.tune_periods] or [{}]
        return [{"learning_rate": rate, **period} for rate in config.tune_learning_rates for period in periods]
    rate = config.comparable_rate
    if not method.grid:
        return [{"learning_rate": rate * factor} for factor in RATES_ALONE]
    [(name, values)] = method.grid.items()
    return [{"learning_rate": rate * factor, name: value} for factor in RATES for value in values]


def compare(
    config: Config,
    methods: list[str],
    seeds: list[int],
    out: Path | str,
    *,
    tune: bool,
    target_error: float,
    options: Mapping[str, Any] = MappingProxyType({}),
    data_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Train every method with every seed and sum up; what has been trained into the folder before is not again.

    Args:
      config: of all runs, but for the method, the seed and what is tuned. Its options that a method does not have are
        left out for that method.
      methods: different names in `METHODS`.
      seeds: of the starts and the data's orders.
      out: the folder: one run folder a cell, and the summary as JSON, CSV and markdown.
      tune: whether to choose each method's hyper-parameters from its `grid`, by the mean of the last errors on held-out
        training data with the first seeds.
      target_error: the test error, in [0, 1], of which it is told when it was reached.
      options: fields of the configuration in place of the config's, each for all methods that have it, such as the
        `prox` of MGRAWA and LGRAWA.
      data_dir: where data sets have been prepared; None: tensorflow-datasets' own default.

    Returns:
      The summary.

    Raises:
      UsageError: if the folder holds a comparison with another configuration, another process writes it, a run does
        not fit the machine, an option has no effect with any of the methods, or tuning chooses it.
    """
    out = check_path("out", out)
    check_names("method", methods, METHODS)
    configs = configs_of(config, methods, options)
    for method_config in configs.values() if tune else ():
        _check_not_chosen(method_config, options)
    chosen = {method: of.replace(learning_rate=of.comparable_rate) for method, of in configs.items()}
    for method_config in chosen.values():
        # Whatever does not fit is said before anything is trained or written.
        model = prepare(method_config, data_dir).model
    with _claimed(out, config, options, tune):
        return _compare(configs, seeds, out, chosen, model, tune, target_error, data_dir)


def _compare(
    configs: dict[str, Config],
    seeds: list[int],
    out: Path,
    chosen: dict[str, Config],
    model: nnx.Module,
    tune: bool,
    target_error: float,
    data_dir: Path | str | None,
) -> dict[str, Any]:
    """Do what `compare` does, in its folder; methods that are not tuned have the configurations in `chosen`."""
    methods = list(configs)
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
                print(f"{path.relative_to(out)} is trained again and is {aside.name} now: {problem}", flush=True)
                trained = False
        if not trained:
            shutil.rmtree(unfinished, ignore_errors=True)
            train_and_evaluate(config, unfinished, data_dir=data_dir, lines=False, stop_if_all_fail=False)
            with _writing(out):
                files.sync_tree(unfinished)  # What a cell is called says that all of it is there.
                unfinished.rename(path)
                files.sync(path.parent)
        error = curves([path])["center_error"][0, -1]
        print(f"[{done}/{cells}] {path.relative_to(out)}: {error:.2%}", flush=True)
        return error

    tried: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for method in methods:
        if tune:
            for i, values in enumerate(grid(configs[method])):
                candidate = configs[method].replace(**values, validation=VALIDATION)
                errors = [
                    cell(out / method / f"tune-{i}-seed-{seed}", candidate.replace(seed=seed)) for seed in tuning_seeds
                ]
                tried[method].append({"values": values, "validation_error": float(np.mean(errors))})
            best = min(tried[method], key=lambda trial: trial["validation_error"])
            chosen[method] = configs[method].replace(**best["values"])
        for seed in seeds:
            cell(out / method / f"seed-{seed}", chosen[method].replace(seed=seed))

    # What sends more than the thriftiest, by more than elections' scalars, is trained once more, for as many steps as
    # send the same.
    params = nnx.state(model, nnx.Param)
    totals = {method: bytes_sent(of, params, of.steps) for method, of in chosen.items()}
    thriftiest = min((total for total in totals.values() if total), default=0.0)
    summary: dict[str, Any] = {"target_error": target_error, "seeds": seeds, "methods": {}}
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
        summary["methods"][method] = _summary(runs, matched, target_error) | {
            "hyper-parameters": hyperparameters(chosen[method]),
            "tried": tried[method],
        }
    finals = {method: np.array(of["final_error"]["values"]) for method, of in summary["methods"].items()}
    for method, of in summary["methods"].items():  # Seed by seed, since starts and data are the same.
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
    """The learning rate and the method's options with which it trains, but for those that are off by default.

    Example:
      >>> from lsgd_jax.presets import PRESETS
      >>> hyperparameters(PRESETS["digits"].replace(method="easgd", pull=0.1))
      {'learning_rate': 0.1, 'period': 4, 'pull': 0.1, 'center_pull': 0.8}
    """
    method = METHODS[config.method]
    options = method.options | config.method_options
    options |= method.derived(options, config.groups, config.workers)
    shown = {
        name: value
        for name, value in options.items()
        if value != method.options[name] or (isinstance(value, int | float) and value)
    }
    return {"learning_rate": config.learning_rate} | shown


def table(summary: dict[str, Any]) -> Iterator[list[str]]:
    """A comparison's summary as rows of text, the header first."""
    target = f"{summary['target_error']:.1%}"
    yield [
        "method",
        "hyper-parameters",
        "final error (95 %)",
        "median",
        f"minus {next(iter(summary['methods']))}, seed by seed (95 %)",
        "best error (95 %)",
        "final error of the best worker",
        "final error at equal bytes",
        f"steps to {target}",
        f"MB sent to {target}",
    ]
    for method, of in summary["methods"].items():
        hyper = [f"{name} {v if isinstance(v, str) else f'{v:g}'}" for name, v in of["hyper-parameters"].items()]
        some = f" ({of['seeds_at_target']} of {len(summary['seeds'])} seeds)"
        steps, megabytes = of["steps_to_target"], of["megabytes_to_target"]
        yield [
            method,
            ", ".join(hyper),
            _percent(of["final_error"]),
            f"{100 * of['final_error']['median']:.2f} %",
            _percent(of["difference_to_first"]),
            _percent(of["best_error"]),
            _percent(of["final_best_worker_error"]),
            _percent(of["final_error_at_equal_bytes"]),
            ("not reached" if steps is None else f"{steps:.0f}") + some,
            "not reached" if megabytes is None else f"{megabytes:.1f}",
        ]


def curves(runs: list[Path]) -> dict[str, np.ndarray]:
    """What the evaluations of a method's runs tell, [seeds, evaluations].

    Raises:
      UsageError: if it can't be read, or is not the same evaluations of the same workers.
    """
    evaluations = [read_metrics(run, "evaluation") for run in runs]
    with making_sense_of(runs[0].parent):
        return _curves(evaluations)


def _curves(evaluations: list[list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    if not all(evaluations):
        raise ValueError("a run has no evaluation")

    def of(name: str) -> np.ndarray:
        return np.array([[entry[name] for entry in run] for run in evaluations], float)

    worker_errors = np.array([[np.ravel(entry["worker_errors"]) for entry in run] for run in evaluations])
    # The worker with the lowest training loss since the evaluation before; null where a loss is not finite.
    losses = np.array([[np.ravel(entry["train_losses"]) for entry in run] for run in evaluations]).astype(float)
    best = np.nan_to_num(losses, nan=np.inf).argmin(-1)
    best_worker_error = np.take_along_axis(worker_errors, best[..., None], -1)[..., 0]
    names = ("step", "seconds", "bytes_sent", "center_error")
    return {name: of(name) for name in names} | {"best_worker_error": best_worker_error}


def _periods(config: Config, every: int) -> dict[str, int]:
    """The periods with which a method exchanges among all workers every so many steps."""
    if config.method == "lsgd" and config.groups > 1:
        local = max(every // default_global_period(1), 1)
        return {"period": local, "global_period": every}
    return {"period": every}


def configs_of(config: Config, methods: list[str], options: Mapping[str, Any]) -> dict[str, Config]:
    """The configuration of each method, before its learning rate is divided or tuned.

    Raises:
      UsageError: if a method can't be run with its configuration, or an option has no effect with any of them.
    """
    if options.get("asynchronous", config.asynchronous) is not None:
        raise UsageError("compare trains workers in step: asynchronous is for train.")
    try:
        configs = config.for_methods({method: method for method in methods}, options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return {method: of.replace(checkpoint_every=0) for method, of in configs.items()}  # What was stopped starts anew.


def _check_not_chosen(config: Config, options: Mapping[str, Any]) -> None:
    """Raise UsageError if tuning sets an option that is given; multiples of a learning rate depend on it."""
    for name in grid(config)[0]:
        is_tried = name == "learning_rate" and not config.tune_learning_rates
        is_own = name in METHODS[config.method].grid and getattr(config, name) is not None
        if is_own or (name in options and not is_tried):
            raise UsageError(f"tuning chooses the {name} of {config.method} itself: leave it out, or do not tune.")


@contextlib.contextmanager
def _claimed(out: Path, config: Config, options: Mapping[str, Any], tune: bool) -> Iterator[None]:
    """Make the folder for comparisons of this configuration, and be the only process that writes it.

    Raises:
      UsageError: if it is not one for them, another process writes it, or it can't be written.
    """
    fields = dataclasses.asdict(config) | {"checkpoint_every": 0} | dict(options) | {"method": "lsgd", "seed": 0}
    claim = {"config": json.loads(json.dumps(fields)), "tune": tune}
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
        raise UsageError(f"{path} is not what a comparison has written: name another out folder.") from None


def _problem_of(run: Path, config: Config) -> str:
    """What is wrong with a cell that has been trained, if anything is, as when not all of it had come to the disk.

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
        last = int(curves([run])["step"][0, -1])
    except UsageError as error:
        return str(error)
    return "" if last == config.steps else f"its last evaluation is of step {last} of {config.steps}."


def _summary(runs: list[Path], matched: list[Path], target_error: float) -> dict[str, Any]:
    of = curves(runs)
    error = of["center_error"]
    reached: np.ndarray = error <= target_error
    first, ever = reached.argmax(1), np.atleast_1d(reached.any(1))

    def at_target(name: str) -> float | None:
        """The median over seeds, of which some may never get there."""
        middle = float(np.median([of[name][i, first[i]] if ever[i] else np.inf for i in range(len(runs))]))
        return middle if math.isfinite(middle) else None

    megabytes = at_target("bytes_sent")
    return {
        "final_error": _interval(error[:, -1]),
        "best_error": _interval(error.min(1)),
        "final_best_worker_error": _interval(of["best_worker_error"][:, -1]),
        "final_error_at_equal_bytes": _interval(curves(matched)["center_error"][:, -1]),
        "seeds_at_target": int(ever.sum()),
        "steps_to_target": at_target("step"),
        "megabytes_to_target": None if megabytes is None else megabytes / 1e6,
    }


def _interval(values: np.ndarray) -> dict[str, Any]:
    """The mean over seeds with its 95 % t-interval; no interval for a single seed."""
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    numbers = {"mean": float(values.mean()), "median": float(np.median(values)), "half_width": half}
    return numbers | {"values": values.tolist()}


def _percent(interval: dict[str, Any]) -> str:
    half = interval["half_width"]
    return f"{100 * interval['mean']:.2f} %" + ("" if half is None else f" ± {100 * half:.2f}")
