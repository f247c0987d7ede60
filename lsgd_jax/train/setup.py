"""Setup of a run from its configuration: data, network, optimizer, method and placement of the workers."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.stages import Wrapped
from jaxtyping import PRNGKeyArray

from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, Data, Feed, count, feed_of, hold_out
from lsgd_jax.distributed import Placement, place
from lsgd_jax.distributed.chips import shard_specs
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.optimizers import local_optimizer
from lsgd_jax.train.corruption import corruption_of, skewed, with_stale_gradients
from lsgd_jax.train.evaluated_model import with_tail
from lsgd_jax.train.learning_rates import rate_factors, scale_by_rate_factor, scale_by_worker, with_ladder
from lsgd_jax.train.step import CommonBatch, local_steps
from lsgd_jax.train.task_checks import check_data, check_functions, check_network, raised_by


def step_key(seed: int) -> PRNGKeyArray:
    """Random key of the steps; `lsgd_jax.train.step.local_steps` says how workers and steps derive theirs from it."""
    # A model is initialized from fold_in(key, 0), fold_in(key, 1), ...
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


class Prepared(NamedTuple):
    """Everything that a run needs, before any of it is on a device."""

    placement: Placement
    feed: Feed
    model: nnx.Module
    """Initialized from the seed."""
    optimizer: optax.GradientTransformationExtraArgs


def prepare(config: Config, data_dir: Path | str | None = None) -> Prepared:
    """Set up a run.

    Raises:
      UsageError: if the configuration does not fit the machine, the data or the network, or the task is not one.
    """
    placement = place_workers(config)
    feed, model = make_feed(config, data_dir, placement.own_workers), make_model(config)
    check_functions(config.task, model, feed, config.worker_batch_size)
    optimizer = make_optimizer(config, placement)
    if config.method_options.get("fragments"):
        jax.eval_shape(optimizer.init, nnx.state(model, nnx.Param))  # Refuse more fragments than there are arrays.
    return Prepared(placement, feed, model, optimizer)


def place_workers(config: Config, devices: Sequence[jax.Device] | None = None) -> Placement:
    """The workers, each with its chips, on the devices.

    Args:
      config: of the run.
      devices: None: all devices.

    Raises:
      UsageError: if there are too few devices, or they don't fit the workers.
    """
    chips = config.chips_per_worker
    return place(config.groups, config.workers, devices, chips=chips, shard_specs=shard_specs(config))


def make_feed(config: Config, data_dir: Path | str | None = None, rows: Sequence[int] | None = None) -> Feed:
    """The training and test data, in an order that the seed determines.

    Args:
      config: of the run.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      rows: workers whose batches are wanted; None: all.

    Raises:
      UsageError: if the data set is not prepared or too small for the workers and their batches.
    """
    with raised_by(config.task, "data"):
        data = config.task.data(data_dir)
    return feed_from(config, data, rows)


def feed_from(config: Config, data: Data, rows: Sequence[int] | None = None) -> Feed:
    """The feed of a run from the data of its task; see `make_feed`."""
    check_data(config.task, data)
    in_order = config.sampling == "partitions"
    if config.validation:
        data = hold_out(data, config.validation, in_order=in_order)
    if held := held_for_elections(config):
        examples = count(data.train)
        if not held < examples:
            raise UsageError(f"election_examples must be less than the {examples} of the training data, got {held}.")
        kept, others = hold_out(data, held / examples, in_order=in_order)
        data = Data(jax.tree.map(lambda *xs: np.concatenate(xs), kept, others), data.test)
    workers = config.groups * config.workers
    indices = BatchIndices(
        examples=count(data.train) - held,
        workers=workers,
        batch_size=config.worker_batch_size,
        sampling=config.sampling,
        seed=config.seed,
    )
    indices = skewed(indices, data, config, count(data.train) - held)
    return feed_of(data, indices, range(workers) if rows is None else rows, config.data_processes)


def held_for_elections(config: Config) -> int:
    """Number of training examples that are held out to compare workers, the last ones in the feed's arrays."""
    return config.election_examples if config.elect_by == "held_out_batch" else 0


def program_of(
    config: Config, model: nnx.Module, optimizer: optax.GradientTransformation, placement: Placement, feed: Feed
) -> Wrapped:
    """The compiled steps of a run: `lsgd_jax.train.step.local_steps` with what its configuration asks for.

    Raises:
      UsageError: if there are too few examples for the batch that all workers see.
    """
    common = None
    if config.elect_by != "training_losses":
        examples, size = len(jax.tree.leaves(feed.shared)[0]), config.election_examples
        if size > examples:
            raise UsageError(f"election_examples must be at most the {examples} of the training data, got {size}.")
        common = CommonBatch(examples - size if held_for_elections(config) else 0, examples, size)
    return local_steps(config.task, model, optimizer, placement, feed, common=common, corruption=corruption_of(config))


def make_model(config: Config) -> nnx.Module:
    """The network of the task, initialized from the seed.

    Raises:
      UsageError: if the network does not fit the data, or is none.
    """
    with raised_by(config.task, "network"):
        model = config.task.network(nnx.Rngs(config.seed))
    check_network(config.task, model)
    check_shards(config, nnx.state(model, nnx.Param))
    return model


def check_shards(config: Config, params: Any) -> None:
    """Raise UsageError unless a worker's parameters, whose shapes suffice, can lie over its chips."""
    specs, chips = shard_specs(config)(params), config.chips_per_worker
    if chips > 1 and not any(len(spec) for spec in jax.tree.leaves(specs)):
        raise UsageError(f"chips_per_worker must divide an axis of some parameter of the network, got {chips}.")


def make_optimizer(config: Config, placement: Placement) -> optax.GradientTransformationExtraArgs:
    """The method around every worker's optimizer, over the axes of the placement."""
    optimizer = local_optimizer(config)
    if config.learning_rates in ("linear", "powers"):
        factors = rate_factors(config.learning_rates, placement.axis_sizes)
        optimizer = optax.chain(optimizer, scale_by_worker(factors, axis_name=placement.axes))
    method = make_method(config, placement, optax.chain(optimizer, scale_by_rate_factor()))
    if config.evaluated_model == "tail_mean":
        method = with_tail(config, method, placement.axes)
    if config.corrupt_workers and config.corruption == "stale":
        method = with_stale_gradients(config.corrupt_workers, method, placement.axes)
    if config.learning_rates == "ladder":
        method = with_ladder(config, method, placement.axes)
    return method


def make_method(
    config: Config, placement: Placement, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The configured method around a worker's optimizer, over the axes of the placement."""
    groups, workers = placement.group_axes, placement.worker_axes
    if config.groups == 1:
        groups, workers = (), placement.axes
    return METHODS[config.method].built(
        optimizer,
        config.method_options,
        groups=groups,
        workers=workers,
        shard_specs=placement.shard_specs if placement.chips > 1 else None,
    )


def steps_per_call(config: Config, first: int = 0) -> int:
    """Local steps per compiled program: a divisor of the period, so that evaluations and the end fall between programs.

    Args:
      config: of the run.
      first: the step from which it resumes.
    """
    return math.gcd(config.period, config.eval_every, config.steps, first)


def rounds(feed: Feed, placement: Placement, steps: int, steps_per_call: int, first: int = 0) -> Iterator[Any]:
    """The feed's batches from a step to the last, on the devices: [group, worker, steps per call, example, ...]."""
    batches = feed.batches(first, steps)
    while of_steps := list(itertools.islice(batches, steps_per_call)):
        yield placement.put(jax.tree.map(lambda *xs: np.stack(xs, 1), *of_steps), placement.batches(of_steps=True))
