"""Loads trained networks from a run folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from lsgd_jax.checks import check_path
from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED, STACKED, Placement, place
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.methods.base import mean_of_workers
from lsgd_jax.tracking.run_folder import read_config
from lsgd_jax.train.asynchronous_workers import worker_optimizer
from lsgd_jax.train.checkpoint import Checkpoints
from lsgd_jax.train.evaluated_model import evaluated_model
from lsgd_jax.train.saved_worker import SavedWorker, restore
from lsgd_jax.train.setup import make_model, make_optimizer
from lsgd_jax.train.step import TrainState, in_mode, state_shapes


class Trained(NamedTuple):
    """Networks of a run, in evaluation mode."""

    step: int
    """Local steps per worker at the checkpoint."""
    center: nnx.Module
    """Evaluated model of the method. Its batch statistics, if any, are the mean over the workers."""
    workers: list[nnx.Module]
    """Models of the workers, by index."""
    best: int
    """Index of the worker with the lowest training loss, the criterion by which leaders are elected."""


def load_trained(run_dir: Path | str, step: int | None = None) -> Trained:
    """Load the networks from a checkpoint of a run as Flax NNX modules, on any number of devices, without the data set.

    They take what the task's `measures` gives them: MNIST-1D and digits unchanged, images preprocessed by
    `lsgd_jax.data.load(...).preprocessing.testing`. With several processes, each gets all networks. The workers of a
    posted run are as each was saved last; the step is the mean of theirs.

    Args:
      run_dir: run folder.
      step: step of the checkpoint; None: the latest.

    Raises:
      UsageError: if the folder is not a run folder, or has no such readable checkpoint.
    """
    run_dir = check_path("run_dir", run_dir)
    config = read_config(run_dir)
    if config.asynchronous == "posted":
        return _posted(run_dir, config, step)
    placement = place(config.groups, config.workers, jax.local_devices())
    checkpoints = Checkpoints(run_dir / "checkpoints", placement, config.keep_checkpoints)
    steps = checkpoints.steps()
    if not steps:
        raise UsageError(f"there is no checkpoint in {run_dir}.")
    step = steps[0] if step is None else step
    if step not in steps:
        raise UsageError(f"there is no checkpoint of step {step} in {run_dir}; there are {sorted(steps)}.")
    try:
        progress = checkpoints.progress(step)
        groups, workers = progress.shape
        if (groups, workers) != placement.shape:  # The run has since been resumed with other workers.
            config = config.replace(groups=groups, workers=workers)
            placement = place(groups, workers, jax.local_devices())
            checkpoints = Checkpoints(run_dir / "checkpoints", placement, config.keep_checkpoints)
        model, optimizer = make_model(config), make_optimizer(config, placement)
        state = checkpoints.restore(step, state_shapes(model, optimizer, placement))
    except ValueError as problem:  # Also if the configuration does not fit these workers.
        why = str(problem).removesuffix(".")
        raise UsageError(f"the checkpoint of step {step} in {run_dir} can't be read: {why}.") from None
    return _trained(step, model, placement, state, evaluated_model(config), np.ravel(progress.scores))


def _posted(run_dir: Path, config: Config, step: int | None) -> Trained:
    """The networks of a posted run, each as it was saved last."""
    if step is not None:
        raise UsageError("posted workers keep only what they have saved last: load it without a step.")
    one = place(1, 1, jax.local_devices()[:1])
    model, optimizer = make_model(config), worker_optimizer(config, one)
    like = state_shapes(model, optimizer, one)
    saved: list[SavedWorker] = []
    for position in range(config.groups * config.workers):
        worker = restore(run_dir / "workers" / str(position) / "state.npz", like)
        if worker is None:
            raise UsageError(f"worker {position} of the run in {run_dir} has not been saved yet.")
        saved.append(worker)
    placement = place(config.groups, config.workers, jax.local_devices())
    rows = jax.tree.map(lambda *xs: np.concatenate(xs)[:, 0], *(worker.state for worker in saved))
    state: TrainState = placement.put(rows, STACKED)
    center: Callable = METHODS[config.method].center
    if METHODS[config.method].meeting is not None:
        found = restore(run_dir / "workers" / "center.npz", like.params)
        if found is None:
            raise UsageError(f"the center of the run in {run_dir} has not been saved yet.")
        center = partial(_given, jax.tree.map(lambda x: x[0, 0], found.state))
    scores = np.array([worker.score for worker in saved])
    return _trained(sum(worker.step for worker in saved) // len(saved), model, placement, state, center, scores)


def _given(center: optax.Params, *_: Any) -> optax.Params:
    """A center that was saved, of whatever workers."""
    return center


def _trained(
    step: int, model: nnx.Module, placement: Placement, state: TrainState, center: Callable, scores: np.ndarray
) -> Trained:
    """The networks of a state of all workers, with the method's center and the workers' scores."""

    def center_of(state: TrainState) -> tuple[optax.Params, nnx.State]:
        statistics = state.statistics
        if jax.tree.leaves(statistics):
            statistics = mean_of_workers(statistics, None, placement.axes)
        return center(state.params, state.optimizer, placement.axes), statistics

    of_center = jax.jit(placement.over_workers(center_of, (STACKED,), (SHARED, SHARED)))(state)
    rows = placement.take((state.params, state.statistics))
    graphdef = nnx.graphdef(in_mode(model, training=False))
    networks = [nnx.merge(graphdef, *jax.tree.map(lambda x: x[i], rows)) for i in range(len(scores))]
    best = int(np.nan_to_num(scores, nan=np.inf).argmin())
    return Trained(step, nnx.merge(graphdef, *jax.device_get(of_center)), networks, best)
