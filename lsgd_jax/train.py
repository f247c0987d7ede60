"""The training loop."""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, load
from lsgd_jax.distributed import worker_mesh
from lsgd_jax.leader import lsgd
from lsgd_jax.models import MODELS
from lsgd_jax.progress import RunProgress
from lsgd_jax.run_folder import RunFolder
from lsgd_jax.step import SHARED, STACKED, StepMetrics, evaluation, init_state, local_steps


def train_and_evaluate(config: Config, run_dir: Path) -> float:
    """Train with the configuration and write the run's folder.

    The same configuration gives the same bits on the same platform and versions. All that is random comes from the
    seed by two independent ways: the start is the parameters of a model made with the key of the seed, and the data's
    order is NumPy's, seeded with the seed and the number of the epoch.

    Args:
      config: what the run depends on.
      run_dir: a folder that is empty or does not exist.

    Returns:
      The center's last test error, in [0, 1].

    Raises:
      UsageError: if the configuration does not fit the machine or the data, or the folder has files in it.
    """
    mesh = worker_mesh(config.groups, config.workers)
    data = load(config.dataset)
    batches = BatchIndices(
        examples=len(data.train_y),
        workers=mesh.size,
        batch_size=config.batch_size,
        sampling=config.sampling,
        seed=config.seed,
    )
    model = MODELS[config.model](data.train_x.shape[1:], data.classes, rngs=nnx.Rngs(config.seed))
    optimizer = make_optimizer(config)
    folder = RunFolder(run_dir, config)

    state = init_state(model, optimizer, mesh)
    train_x, train_y = jax.device_put((data.train_x, data.train_y), NamedSharding(mesh, SHARED))
    at_once = steps_at_once(config)
    workers = (config.groups, config.workers)

    def indices(step: int) -> jax.Array:
        stacked = np.stack([batches(step + i).reshape(*workers, -1) for i in range(at_once)], axis=2)
        return jax.device_put(stacked, NamedSharding(mesh, STACKED))

    # Compiled before the clock starts, and only once: another signature would be an error.
    program = local_steps(model, optimizer, mesh)
    take_steps = program.lower(state, train_x, train_y, indices(0), np.int32(0)).compile()
    evaluate = evaluation(model, mesh, data)

    seconds, started = 0.0, time.perf_counter()
    pending: deque[tuple[int, StepMetrics]] = deque()
    with RunProgress(config.steps) as progress:
        for step in range(at_once, config.steps + 1, at_once):
            batch = indices(step - at_once)
            if mesh.devices.flat[0].platform == "cpu":
                # Simulated devices share a pool of threads: two programs with collectives in flight can fill it with
                # threads that wait for each other.
                jax.block_until_ready(state)
            state, metrics = take_steps(state, train_x, train_y, batch, np.int32(step - at_once))
            if step % config.period == 0:
                pending.append((step, metrics))
            while len(pending) > 2:  # Logged behind the computation, so that it need not wait.
                _log_exchange(folder, config, *pending.popleft())
            if step % config.eval_every == 0 or step == config.steps:
                while pending:
                    _log_exchange(folder, config, *pending.popleft())
                jax.block_until_ready(state)
                seconds += time.perf_counter() - started
                result = jax.device_get(evaluate(state))
                folder.log(
                    "evaluation",
                    step=step,
                    seconds=seconds,
                    center_error=result.center_error,
                    center_loss=result.center_loss,
                    worker_errors=result.worker_errors,
                )
                progress.show(
                    step,
                    loss=float(np.mean(metrics.score)),
                    error=float(result.center_error),
                    leader=int(metrics.leaders[0, 0, -1]),
                    steps_per_second=step / seconds,
                )
                started = time.perf_counter()
    return float(result.center_error)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Every worker's optimiser and its exchanges, over the axes ("group", "worker")."""
    drops = {int(drop * config.steps): 0.1 for drop in config.learning_rate_drops}
    groups: dict[str, Any] = {}
    if config.groups > 1:
        groups = {"group_axis_name": "group", "global_pull": config.global_pull, "global_period": config.global_period}
    return lsgd(
        optax.piecewise_constant_schedule(config.learning_rate, drops),
        axis_name="worker" if config.groups > 1 else ("group", "worker"),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        pull=config.pull,
        period=config.period,
        window=config.window,
        **groups,
    )


def steps_at_once(config: Config) -> int:
    """Local steps in one compiled program: one on the CPU, where loops are slow, elsewhere as many as fit a period.

    Evaluations and the end of the run fall between programs.
    """
    if jax.default_backend() == "cpu":
        return 1
    return math.gcd(config.period, config.eval_every, config.steps)


def _log_exchange(folder: RunFolder, config: Config, step: int, metrics: StepMetrics) -> None:
    """Log a step on which an exchange was due."""
    scores, leaders, distances = jax.device_get(metrics)
    levels: dict[str, Any] = {}
    if config.groups > 1:
        levels = {"local_leaders": leaders[:, 0, 0], "local_distances": distances[:, :, 0]}
    if config.groups == 1 or step % config.global_period == 0:
        levels |= {"leader": leaders[0, 0, -1], "distances": distances[:, :, -1]}
    folder.log("exchange", step=step, scores=scores, **levels)
