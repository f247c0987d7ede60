"""The training loop."""

import inspect
import math
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, Dataset, hold_out, load
from lsgd_jax.distributed import worker_mesh
from lsgd_jax.errors import UsageError
from lsgd_jax.learning_rates import rate_factors, scale_by_worker
from lsgd_jax.ledger import bytes_sent
from lsgd_jax.methods import METHODS
from lsgd_jax.models import MODELS
from lsgd_jax.progress import RunProgress
from lsgd_jax.run_folder import RunFolder
from lsgd_jax.step import AXES, SHARED, STACKED, StepMetrics, evaluation, init_state, local_steps


def train_and_evaluate(config: Config, run_dir: Path, *, lines: bool = True) -> float:
    """Train with the configuration and write the run's folder.

    The same configuration gives the same bits on the same platform and versions. All that is random comes from the
    seed by two independent ways: the start is the parameters of a model made with the key of the seed, and the data's
    order is NumPy's, seeded with the seed and the number of the epoch.

    Args:
      config: what the run depends on.
      run_dir: a folder that is empty or does not exist.
      lines: whether to print a line an evaluation where there is no terminal.

    Returns:
      The center's last test error, in [0, 1].

    Raises:
      UsageError: if the configuration does not fit the machine or the data, or the folder has files in it.
    """
    mesh, data, batches, model, optimizer = prepare(config)
    folder = RunFolder(run_dir, config)

    state = init_state(model, optimizer, mesh)
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    train_x, train_y = jax.device_put((data.train_x, data.train_y), NamedSharding(mesh, SHARED))
    at_once = steps_at_once(config)
    workers = (config.groups, config.workers)

    def indices(step: int) -> jax.Array:
        stacked = np.stack([batches(step + i).reshape(*workers, -1) for i in range(at_once)], axis=2)
        return jax.device_put(stacked, NamedSharding(mesh, STACKED))

    with RunProgress(config.steps, lines=lines) as progress:
        progress.say("compiling")  # Before the clock starts, and only once: another signature would be an error.
        program = local_steps(model, optimizer, mesh)
        take_steps = program.lower(state, train_x, train_y, indices(0), np.int32(0)).compile()
        evaluate = evaluation(model, METHODS[config.method].center, mesh, data)

        progress.say("training")
        seconds, started = 0.0, time.perf_counter()
        losses: list[jax.Array] = []
        exchanges: deque[tuple[int, StepMetrics]] = deque()
        for step in range(at_once, config.steps + 1, at_once):
            batch = indices(step - at_once)
            if mesh.devices.flat[0].platform == "cpu":
                # Simulated devices share a pool of threads: two programs with collectives in flight can fill it with
                # threads that wait for each other.
                jax.block_until_ready(state)
            state, metrics = take_steps(state, train_x, train_y, batch, np.int32(step - at_once))
            losses.append(metrics.loss)
            if metrics.leaders is not None and step % config.period == 0:
                exchanges.append((step, metrics))
            while len(exchanges) > 2:  # Logged behind the computation, so that it need not wait.
                _log_exchange(folder, config, *exchanges.popleft())
            if step % config.eval_every == 0 or step == config.steps:
                while exchanges:
                    _log_exchange(folder, config, *exchanges.popleft())
                jax.block_until_ready(state)
                seconds += time.perf_counter() - started
                result = jax.device_get(evaluate(state))
                train_losses = np.mean(jax.device_get(losses), axis=0)
                losses.clear()
                folder.log(
                    "evaluation",
                    step=step,
                    seconds=seconds,
                    bytes_sent=bytes_sent(config, parameter_bytes, step),
                    train_losses=train_losses,
                    center_error=result.center_error,
                    center_loss=result.center_loss,
                    worker_errors=result.worker_errors,
                )
                progress.show(
                    step,
                    loss=float(np.mean(train_losses)),
                    error=float(result.center_error),
                    leader=None if metrics.leaders is None else int(metrics.leaders.positions[0, 0, -1]),
                    steps_per_second=step / seconds,
                )
                started = time.perf_counter()
    return float(result.center_error)


class Prepared(NamedTuple):
    """What a configuration asks for, before any of it is on a device."""

    mesh: Mesh
    data: Dataset
    batches: BatchIndices
    model: nnx.Module
    """At the start that the seed gives."""
    optimizer: optax.GradientTransformationExtraArgs


def prepare(config: Config) -> Prepared:
    """What the configuration asks for.

    Raises:
      UsageError: if the configuration does not fit the machine or the data.
    """
    mesh = worker_mesh(config.groups, config.workers)
    data = load(config.dataset)
    if config.validation:
        data = hold_out(data, config.validation)
    batches = BatchIndices(
        examples=len(data.train_y),
        workers=mesh.size,
        batch_size=config.worker_batch_size,
        sampling=config.sampling,
        seed=config.seed,
    )
    return Prepared(mesh, data, batches, make_model(config, data), make_optimizer(config))


def make_model(config: Config, data: Dataset) -> nnx.Module:
    """The network at the start that the seed gives.

    Raises:
      UsageError: if the network is not one for such data.
    """
    build, dimensions = MODELS[config.model]
    shape = data.train_x.shape[1:]
    if dimensions is not None and len(shape) != dimensions:
        fit = [name for name, (_, needed) in MODELS.items() if needed in (None, len(shape))]
        raise UsageError(
            f"the model {config.model} is not for the data set {config.dataset}, whose examples have the shape"
            f" {shape}: use {' or '.join(fit)}."
        )
    return build(shape, data.classes, rngs=nnx.Rngs(config.seed))


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Every worker's optimiser within the method, over the axes ("group", "worker")."""
    method = METHODS[config.method]
    options = inspect.signature(method.build).parameters.values()
    own: dict[str, Any] = {"axis_name": AXES}
    for option in options:
        value = getattr(config, option.name, None)
        of_groups = option.name.startswith("global_") and config.groups == 1
        if option.kind is option.KEYWORD_ONLY and value is not None and not of_groups:
            own[option.name] = value
    if config.groups > 1 and "group_axis_name" in inspect.signature(method.build).parameters:
        own |= {"axis_name": "worker", "group_axis_name": "group"}
    return method.build(_local_optimizer(config), **own)


def _local_optimizer(config: Config) -> optax.GradientTransformation:
    drops = Counter(round(drop * config.steps) for drop in config.learning_rate_drops)
    rate = optax.piecewise_constant_schedule(config.learning_rate, {step: 0.1**n for step, n in drops.items()})
    if config.local_optimizer == "adamw":
        optimizer = optax.adamw(rate, weight_decay=config.weight_decay)
    elif config.local_optimizer == "lars":
        optimizer = optax.lars(rate, config.weight_decay, momentum=config.momentum)
    else:
        decay = optax.add_decayed_weights(config.weight_decay)
        optimizer = optax.chain(decay, optax.sgd(rate, config.momentum, nesterov=True))
    if config.learning_rates != "equal":
        factors = rate_factors(config.learning_rates, (config.groups, config.workers))
        optimizer = optax.chain(optimizer, scale_by_worker(factors, axis_name=AXES))
    return optimizer


def steps_at_once(config: Config) -> int:
    """Local steps in one compiled program: one on the CPU, where loops are slow, elsewhere as many as fit a period.

    Evaluations and the end of the run fall between programs.
    """
    if jax.default_backend() == "cpu":
        return 1
    return math.gcd(config.period, config.eval_every, config.steps)


def _log_exchange(folder: RunFolder, config: Config, step: int, metrics: StepMetrics) -> None:
    """Log a step on which an exchange was due."""
    scores, positions, distances = jax.device_get(metrics.leaders)
    levels: dict[str, Any] = {}
    if config.groups > 1:
        levels = {"local_leaders": positions[:, 0, 0], "local_distances": distances[:, :, 0]}
    _, widest_period = config.levels[-1]
    if step % widest_period == 0:
        levels |= {"leader": positions[0, 0, -1], "distances": distances[:, :, -1]}
    folder.log("exchange", step=step, scores=scores, **levels)
