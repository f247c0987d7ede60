"""What the runs of a comparison say: curves, and the summary of a method."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax.compare.statistics import finite, over_seeds
from lsgd_jax.config import Config
from lsgd_jax.methods import METHODS
from lsgd_jax.task import Headline
from lsgd_jax.tracking.run_folder import making_sense_of, read_metrics


def curves(runs: list[Path], headline: Headline) -> dict[str, np.ndarray]:
    """Read metrics at the evaluations of a method's runs, as arrays [seeds, evaluations]; NaN if they are not finite.

    "has_failed" is whether some measure of the evaluated model is not finite; its error may be 1 then.

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
    has_failed = np.array([[_has_failed(entry) for entry in run] for run in evaluations])
    return found | {"center": of(headline.center), "best_worker": best_worker, "has_failed": has_failed}


def _has_failed(evaluation: dict[str, Any]) -> bool:
    return any(value is None for name, value in evaluation.items() if name.startswith("center_"))


def summary_of(config: Config, runs: list[Path], matched: list[Path], target: float | None) -> dict[str, Any]:
    """Summarize a method. Seeds whose evaluated model is not finite in the end have failed: their finals are None.

    Args:
      config: of its runs, except for the seed.
      runs: one for each seed.
      matched: runs that send as many bytes as the thriftiest method's, one for each seed.
      target: value of the headline measure to report the steps and bytes to; None: none.
    """
    headline = config.task.headline
    of, name = curves(runs, headline), headline.name
    center = np.where(of["has_failed"], np.nan, of["center"])
    best_worker = np.where(of["has_failed"][:, -1], np.nan, of["best_worker"][:, -1])
    at_equal_bytes = curves(matched, headline)
    final_at_equal_bytes = np.where(at_equal_bytes["has_failed"], np.nan, at_equal_bytes["center"])[:, -1]
    unit, per_example = config.task.counted_in
    found = {
        f"final_{name}": over_seeds(center[:, -1]),
        f"best_{name}": over_seeds(np.nan_to_num(center, nan=np.inf).min(1)),
        f"final_best_worker_{name}": over_seeds(best_worker),
        f"final_{name}_at_equal_bytes": over_seeds(final_at_equal_bytes),
        "megabytes_sent": of["bytes_sent"][0, -1] / 1e6,
        f"{unit}_seen": config.steps * config.worker_batch_size * per_example,
        "hyper-parameters": hyperparameters(config),
    }
    if headline.perplexity:
        mean = found[f"final_{name}"]["mean"]
        found["perplexity"] = None if mean is None else finite(np.exp(mean))
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


def hyperparameters(config: Config) -> dict[str, Any]:
    """Return the hyperparameters of a configuration in a comparison.

    These are the learning rate, the method's options except for those that are off by default, and the evaluated model
    if it is not left to the method.

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
    effective = config.effective
    model = {name: effective[name] for name in ("evaluated_model", "tail_share") if name in effective}
    return {"learning_rate": config.learning_rate} | shown | model
