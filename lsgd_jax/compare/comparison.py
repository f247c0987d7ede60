"""Compares methods: tunes them, trains them with several seeds, and writes the summary."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from lsgd_jax import files
from lsgd_jax.checks import check_names, check_path
from lsgd_jax.compare.cells import claimed, compiling_once, train_cell
from lsgd_jax.compare.results import summary_of
from lsgd_jax.compare.statistics import differences_to_first, finite
from lsgd_jax.compare.table import markdown, notes, rows_of
from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.progress import ComparisonProgress
from lsgd_jax.tracking.run_folder import environment
from lsgd_jax.train.setup import prepare
from lsgd_jax.tuning import check_grid, grid, other_models

VALIDATION = 0.2
"""Share of the training data held out for tuning."""
TUNING_SEEDS = (1_000_000, 1_000_001)
"""Seeds for tuning, others than those that are compared: what is good with only one is often close to diverging."""


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
      tune: whether to choose each method's hyperparameters from its `grid`, and then whether to evaluate its tail mean,
        unless the evaluated model is given. What counts is the mean of the final headline measure on held-out training
        data with seeds of its own, `TUNING_SEEDS`; a single seed is tuned with a single one.
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
    tuning_seeds = list(TUNING_SEEDS[: len(seeds)] if tune else ())
    if both := sorted({*seeds} & {*tuning_seeds}):
        raise UsageError(f"seeds must be others than those of tuning, got {', '.join(map(str, both))}.")
    for method_config in configs.values() if tune else ():
        check_grid(method_config, options)
    untuned = {method: of.replace(learning_rate=of.comparable_rate) for method, of in configs.items()}
    for method_config in untuned.values():
        # Report configurations that don't fit before anything is trained or written.
        model = prepare(method_config, data_dir).model
    plan = _Plan(
        {method: _candidates(of) if tune else [untuned[method]] for method, of in configs.items()},
        seeds,
        tuning_seeds,
        nnx.state(model, nnx.Param),
    )
    with claimed(out, config, options, tune), compiling_once(), ComparisonProgress() as display:
        return _compare(plan, out, config.task.headline.target if target is None else target, data_dir, display)


class _Plan(NamedTuple):
    """The cells of a comparison."""

    candidates: dict[str, list[Config]]
    """Configurations of each method among which tuning chooses, or the only one."""
    seeds: list[int]
    tuning_seeds: list[int]
    """Empty if nothing is tuned."""
    params: nnx.State
    """Parameters of one worker."""

    def matched(self, configs: Iterable[Config]) -> dict[str, Config]:
        """Return the configurations of the methods that send more than the thriftiest, by method, shortened.

        Their steps are as many as send equally many bytes, beyond the scalars of elections.
        """
        totals = {of: bytes_sent(of, self.params, of.steps) for of in configs}
        thriftiest = min((total for total in totals.values() if total), default=0.0)
        shortened = {}
        for of, total in totals.items():
            if total > 1.01 * thriftiest:
                steps = max(1, int(of.steps * thriftiest / total))
                shortened[of.method] = of.replace(steps=steps, eval_every=min(of.eval_every, steps))
        return shortened

    def size(self, matched: Iterable[Config]) -> tuple[int, int]:
        """Return the numbers of cells and of steps in all of them."""
        cells = (of for each in self.candidates.values() for of in [*each, *_with_other_models(each[0])])
        tried = [of.steps for of in cells] * len(self.tuning_seeds)
        final = [of.steps for of, *_ in self.candidates.values()] + [of.steps for of in matched]
        return len(tried) + len(final) * len(self.seeds), sum(tried) + sum(final) * len(self.seeds)


def _compare(
    plan: _Plan, out: Path, target: float | None, data_dir: Path | str | None, display: ComparisonProgress
) -> dict[str, Any]:
    """Train and summarize in the claimed folder."""
    # Tuned periods decide who sends more: until they are known, these are the most cells that there may be.
    display.expect(*plan.size(plan.matched(of for each in plan.candidates.values() for of in each).values()))
    chosen: dict[str, Config] = {}
    tried: dict[str, list[dict[str, Any]]] = {}

    def train(name: str, config: Config) -> float:
        return train_cell(out, out / config.method / name, config, data_dir, display)

    def score(name: str, config: Config) -> float | None:
        of = config.replace(validation=VALIDATION)
        measured = [train(f"{name}-seed-{s}", of.replace(seed=s)) for s in plan.tuning_seeds]
        return finite(np.mean(measured))

    for method, candidates in plan.candidates.items():
        chosen[method], tried[method] = _tuned(candidates, score) if plan.tuning_seeds else (candidates[0], [])
        for seed in plan.seeds:
            train(f"seed-{seed}", chosen[method].replace(seed=seed))
    matched = plan.matched(chosen.values())
    display.expect(*plan.size(matched.values()))
    for shorter in matched.values():
        for seed in plan.seeds:
            train(f"matched-bytes-seed-{seed}", shorter.replace(seed=seed))

    task = next(iter(chosen.values())).task
    headline, (unit, _) = task.headline, task.counted_in
    summary: dict[str, Any] = {"headline": headline._asdict(), "unit": unit, f"target_{headline.name}": target}
    summary |= {"seeds": plan.seeds, "tuning_seeds": plan.tuning_seeds, "methods": {}}
    for method, of in chosen.items():
        runs, at_equal_bytes = (
            [out / method / f"{prefix}seed-{seed}" for seed in plan.seeds]
            for prefix in ("", "matched-bytes-" if method in matched else "")
        )
        summary["methods"][method] = summary_of(of, runs, at_equal_bytes, target) | {"tried": tried[method]}
    final = f"final_{headline.name}"
    finals = {method: np.array(of[final]["values"], float) for method, of in summary["methods"].items()}
    for method, difference in differences_to_first(finals).items():
        summary["methods"][method]["difference_to_first"] = difference
    summary["environment"] = environment()
    _write(out, summary)
    return summary


def _candidates(config: Config) -> list[Config]:
    """Configurations of the tuning grid."""
    return [config.replace(**values) for values in grid(config)]


def _with_other_models(config: Config) -> list[Config]:
    """The configuration with each other evaluated model that tuning tries."""
    return [config.replace(**model) for model in other_models(config)]


def _tuned(
    candidates: list[Config], score: Callable[[str, Config], float | None]
) -> tuple[Config, list[dict[str, Any]]]:
    """Choose among the tuning grid, and then the evaluated model; returns the best, and all that was tried.

    Args:
      candidates: configurations of the tuning grid.
      score: from a name and a configuration, what is measured on held-out data; None if it is not finite.
    """
    scores = [score(f"tune-{i}", of) for i, of in enumerate(candidates)]
    best = _lowest(scores)
    others = _with_other_models(candidates[best])
    scores += [score(f"tune-{best}-{of.evaluated_model}", of) for of in others]
    tried = [*candidates, *others]
    return tried[_lowest(scores)], _tried(tried, scores)


def _lowest(scores: list[float | None]) -> int:
    """The position of the lowest score, the first one in a tie."""
    return int(np.argmin([np.inf if score is None else score for score in scores]))


def _tried(configs: list[Config], scores: list[float | None]) -> list[dict[str, Any]]:
    """What tuning has found: the values of each configuration, and its score."""
    name = f"validation_{configs[0].task.headline.name}"
    tuned, found = [*grid(configs[0])[0], "evaluated_model"], []
    for of, score in zip(configs, scores, strict=True):
        effective = of.effective
        values = {each: effective[each] for each in tuned if each in effective}
        found.append({"values": values, name: score})
    return found


def _write(out: Path, summary: dict[str, Any]) -> None:
    rows, text = rows_of(summary), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write(out / "comparison.json", json.dumps(summary, indent=2) + "\n")
    files.write(out / "comparison.csv", text.getvalue())
    files.write(out / "comparison.md", f"{markdown(rows)}\n{notes(summary)}\n")


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
