"""Setup of a run from its configuration: data, network, optimizer, method and placement of the workers."""

import itertools
import math
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
from lsgd_jax.distributed import STACKED, Placement, place
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.models import MODELS
from lsgd_jax.optimizers import local_optimizer
from lsgd_jax.train.learning_rates import rate_factors, scale_by_rate_factor, scale_by_worker


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
      UsageError: if the configuration does not fit the machine or the data.
    """
    placement = place(config.groups, config.workers)
    feed = make_feed(config, data_dir, placement.own_workers)
    return Prepared(placement, feed, make_model(config, feed), make_optimizer(config, placement))


def make_feed(config: Config, data_dir: Path | str | None = None, rows: Sequence[int] | None = None) -> Feed:
    """The training and test data, in an order that the seed determines.

    Args:
      config: of the run.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      rows: workers whose batches are wanted; None: all.

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
    """The network, initialized from the seed.

    Raises:
      UsageError: if the network does not fit the data.
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
    """The method around every worker's optimizer, over the axes of the placement."""
    optimizer = local_optimizer(config)
    if config.learning_rates != "equal":
        factors = rate_factors(config.learning_rates, placement.axis_sizes)
        optimizer = optax.chain(optimizer, scale_by_worker(factors, axis_name=placement.axes))
    return make_method(config, placement, optax.chain(optimizer, scale_by_rate_factor()))


def make_method(
    config: Config, placement: Placement, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The configured method around a worker's optimizer, over the axes of the placement."""
    groups, workers = placement.group_axes, placement.worker_axes
    if config.groups == 1:
        groups, workers = (), placement.axes
    return METHODS[config.method].built(optimizer, config.method_options, groups=groups, workers=workers)


def steps_per_call(config: Config, first: int = 0) -> int:
    """Local steps per compiled program: a divisor of the period, so that evaluations and the end fall between programs.

    Args:
      config: of the run.
      first: the step from which it resumes.
    """
    return math.gcd(config.period, config.eval_every, config.steps, first)


def rounds(feed: Feed, placement: Placement, steps: int, steps_per_call: int, first: int = 0) -> Iterator[Any]:
    """The feed's batches from a step to the last, on the devices: [group, worker, steps per call, ...]."""
    batches = feed.batches(first, steps)
    while of_steps := list(itertools.islice(batches, steps_per_call)):
        yield placement.put(jax.tree.map(lambda *xs: np.stack(xs, 1), *of_steps), STACKED)
