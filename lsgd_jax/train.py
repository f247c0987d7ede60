"""The training loop."""

import inspect
import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray

from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, Feed, InMemory, Streamed, hold_out, load
from lsgd_jax.distributed import SHARED, STACKED, Placement, failing_together, of_first_process, place
from lsgd_jax.errors import UsageError
from lsgd_jax.evaluate import evaluation
from lsgd_jax.learning_rates import rate_factors, scale_by_rate_factor, scale_by_worker
from lsgd_jax.ledger import bytes_sent
from lsgd_jax.methods import METHODS
from lsgd_jax.models import MODELS
from lsgd_jax.progress import RunProgress
from lsgd_jax.run_folder import RunFolder
from lsgd_jax.step import Leaders, init_state, local_steps


def train_and_evaluate(config: Config, run_dir: Path, *, data_dir: Path | None = None, lines: bool = True) -> float:
    """Train with the configuration and write the run's folder; of several processes, the first writes it.

    The same configuration gives the same bits on the same platform and versions, unless the learning rate drops by
    the clock or workers are asynchronous. All that is random comes from the seed by three independent ways: the start
    is the parameters of a model made with the seed's key; what is random in steps comes from `step_key`; and the data's
    order is NumPy's, seeded with the seed and the number of the epoch.

    Args:
      config: what the run depends on.
      run_dir: a folder that is empty or does not exist.
      data_dir: where data sets have been prepared; None: tensorflow-datasets' own default.
      lines: whether to print a line an evaluation where there is no terminal.

    Returns:
      The center's last test error, in [0, 1].

    Raises:
      UsageError: if the configuration does not fit the machine or the data, or the folder has files in it.
    """
    if config.asynchronous is not None:
        from lsgd_jax import train_asynchronously  # It builds on what is below.

        return train_asynchronously.train_and_evaluate(config, run_dir, data_dir=data_dir, lines=lines)
    with failing_together():
        placement, feed, model, optimizer = prepare(config, data_dir)
        folder = RunFolder(run_dir, config)

    state = init_state(model, optimizer, placement)
    params = nnx.state(model, nnx.Param)
    shared = placement.put(feed.shared, SHARED)
    key = step_key(config.seed)
    at_once = steps_at_once(config)
    batches = rounds(feed, placement, config.steps, at_once)

    with RunProgress(config.steps, lines=lines) as progress:
        progress.say("compiling")  # Before the clock starts, and only once: another signature would be an error.
        program, batch = local_steps(model, optimizer, placement, feed), next(batches)
        take_steps = program.lower(state, shared, batch, np.int32(0), np.float32(1), key).compile()
        evaluate = evaluation(
            model,
            METHODS[config.method].center,
            placement,
            feed,
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(key, config.steps),  # No step's.
        )

        progress.say("training")
        seconds, started = 0.0, time.perf_counter()
        losses: list[jax.Array] = []
        exchanges: deque[tuple[int, Leaders]] = deque()
        for step in range(at_once, config.steps + 1, at_once):
            placement.wait_for(state)
            clock = seconds + time.perf_counter() - started
            if config.learning_rate_drops_in == "seconds":  # The rates of all processes drop together.
                clock = of_first_process(clock)
            rate_factor = learning_rate_factor(config, step - at_once, feed.steps_per_epoch, clock)
            state, metrics = take_steps(state, shared, batch, np.int32(step - at_once), rate_factor, key)
            batch = next(batches, None)  # While the devices compute.
            losses.append(metrics.loss)
            if metrics.leaders is not None and step % config.period == 0:
                exchanges.append((step, metrics.leaders))
            while len(exchanges) > 2:  # Logged behind the computation, so that it need not wait.
                log_exchange(folder, config, *exchanges.popleft())
            if step % config.eval_every == 0 or step == config.steps:
                while exchanges:
                    log_exchange(folder, config, *exchanges.popleft())
                jax.block_until_ready(state)
                seconds += time.perf_counter() - started
                result = evaluate(state, shared)
                train_losses = np.mean(jax.device_get(losses), axis=0)
                losses.clear()
                folder.log(
                    "evaluation",
                    step=step,
                    seconds=seconds,
                    bytes_sent=bytes_sent(config, params, step),
                    learning_rate_factor=rate_factor,
                    train_losses=train_losses,
                    center_error=result.center_error,
                    center_loss=result.center_loss,
                    worker_errors=result.worker_errors,
                )
                progress.show(
                    step,
                    loss=float(np.mean(train_losses)),
                    error=result.center_error,
                    leader=None if metrics.leaders is None else int(metrics.leaders.positions[0, 0, -1]),
                    steps_per_second=step / seconds,
                )
                started = time.perf_counter()
    return result.center_error


def step_key(seed: int) -> PRNGKeyArray:
    """The key of what is random in steps; `lsgd_jax.step.local_steps` tells how steps and workers part it."""
    # A model draws its start from fold_in(key, 0), fold_in(key, 1), ...
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


class Prepared(NamedTuple):
    """What a configuration asks for, before any of it is on a device."""

    placement: Placement
    feed: Feed
    model: nnx.Module
    """At the start that the seed gives."""
    optimizer: optax.GradientTransformationExtraArgs


def prepare(config: Config, data_dir: Path | None = None) -> Prepared:
    """What the configuration asks for.

    Raises:
      UsageError: if the configuration does not fit the machine or the data.
    """
    placement = place(config.groups, config.workers)
    feed = make_feed(config, data_dir, placement.own_workers)
    return Prepared(placement, feed, make_model(config, feed), make_optimizer(config, placement))


def make_feed(config: Config, data_dir: Path | None = None, rows: Sequence[int] | None = None) -> Feed:
    """The data, in the order that the seed gives.

    Args:
      config: of the run.
      data_dir: where data sets have been prepared; None: tensorflow-datasets' own default.
      rows: the workers whose batches are wanted; by default all.

    Raises:
      UsageError: if the data set is not prepared or too small for the workers and their batches.
    """
    workers = config.groups * config.workers
    if config.dataset == "imagenet2012":
        return Streamed(
            data_dir,
            workers=workers,
            batch_size=config.worker_batch_size,
            sampling=config.sampling,
            seed=config.seed,
            held_out=config.validation,
            rows=rows,
            image_size=config.image_size,
            processes=config.data_processes,
        )
    data = load(config.dataset, data_dir)
    if config.validation:
        data = hold_out(data, config.validation)
    batches = BatchIndices(
        examples=len(data.train_y),
        workers=workers,
        batch_size=config.worker_batch_size,
        sampling=config.sampling,
        seed=config.seed,
    )
    return InMemory(data, batches, rows)


def make_model(config: Config, feed: Feed) -> nnx.Module:
    """The network at the start that the seed gives.

    Raises:
      UsageError: if the network is not one for such data.
    """
    build, dimensions = MODELS[config.model]
    if dimensions is not None and len(feed.shape) != dimensions:
        fit = [name for name, (_, needed) in MODELS.items() if needed in (None, len(feed.shape))]
        raise UsageError(
            f"the model {config.model} is not for the data set {config.dataset}, whose examples have the shape"
            f" {feed.shape}: use {' or '.join(fit)}."
        )
    try:
        return build(
            feed.shape, feed.classes, width=config.width, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(config.seed)
        )
    except ValueError as error:
        raise UsageError(f"the model {config.model} is not for the data set {config.dataset}: {error}") from None


def make_optimizer(config: Config, placement: Placement) -> optax.GradientTransformationExtraArgs:
    """Every worker's optimiser within the method, over the axes of the placement."""
    optimizer = local_optimizer(config)
    if config.learning_rates != "equal":
        factors = rate_factors(config.learning_rates, placement.axis_sizes)
        optimizer = optax.chain(optimizer, scale_by_worker(factors, axis_name=placement.axes))
    return make_method(config, placement, optax.chain(optimizer, scale_by_rate_factor()))


def make_method(
    config: Config, placement: Placement, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The method around a worker's optimiser, over the axes of the placement."""
    method = METHODS[config.method]
    options = inspect.signature(method.build).parameters
    own: dict[str, Any] = {"axis_name": placement.axes}
    for name, option in options.items():
        value = getattr(config, name, None)
        of_groups = name.startswith("global_") and config.groups == 1
        if option.kind is option.KEYWORD_ONLY and value is not None and not of_groups:
            own[name] = value
    if config.groups > 1 and "group_axis_name" in options:
        own |= {"axis_name": placement.worker_axes, "group_axis_name": placement.group_axes}
    return method.build(optimizer, **own)


def local_optimizer(config: Config) -> optax.GradientTransformation:
    """What every worker steps with on its own, before learning rates differ by worker or are dropped."""
    rate = config.learning_rate
    if config.local_optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    if config.local_optimizer == "lars":
        return optax.lars(rate, config.weight_decay, momentum=config.momentum)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.sgd(rate, config.momentum, nesterov=True))


def learning_rate_factor(config: Config, step: int, steps_per_epoch: int, seconds: float) -> np.float32:
    """What the learning rate is multiplied by: 0.1 to the power of the drops so far.

    Args:
      config: of the run.
      step: local steps taken.
      steps_per_epoch: local steps in an epoch.
      seconds: of training so far.
    """
    now = {"fractions": step / config.steps, "epochs": step / steps_per_epoch, "seconds": seconds}
    return np.float32(0.1 ** sum(now[config.learning_rate_drops_in] >= drop for drop in config.learning_rate_drops))


def steps_at_once(config: Config) -> int:
    """Local steps in one compiled program: a period or a part of it, so that evaluations and the end fall between."""
    return math.gcd(config.period, config.eval_every, config.steps)


def rounds(feed: Feed, placement: Placement, steps: int, at_once: int) -> Iterator[Any]:
    """The feed's batches for so many steps, on the devices, [group, worker, steps at once, ...]."""
    batches = feed.batches(0, steps)
    while some := list(itertools.islice(batches, at_once)):
        yield placement.put(jax.tree.map(lambda *xs: np.stack(xs, 1), *some), STACKED)


def log_exchange(folder: RunFolder, config: Config, step: int, leaders: Leaders, **more: Any) -> None:
    """Log a step on which an exchange was due, with what else there is to tell."""
    scores, positions, distances = jax.device_get(leaders)
    levels: dict[str, Any] = {}
    if config.groups > 1:
        levels = {"local_leaders": positions[:, 0, 0], "local_distances": distances[:, :, 0]}
    _, widest_period = config.levels[-1]
    if step % widest_period == 0:
        levels |= {"leader": positions[0, 0, -1], "distances": distances[:, :, -1]}
    folder.log("exchange", step=step, scores=scores, **levels, **more)
