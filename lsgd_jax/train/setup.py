"""What a configuration asks for: data, network, optimizer, method and where the workers are."""

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
from lsgd_jax.train.learning_rates import rate_factors, scale_by_rate_factor, scale_by_worker


def step_key(seed: int) -> PRNGKeyArray:
    """The key of what is random in steps; `lsgd_jax.train.step.local_steps` tells how steps and workers part it."""
    # A model draws its start from fold_in(key, 0), fold_in(key, 1), ...
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


class Prepared(NamedTuple):
    """What a configuration asks for, before any of it is on a device."""

    placement: Placement
    feed: Feed
    model: nnx.Module
    """At the start that the seed gives."""
    optimizer: optax.GradientTransformationExtraArgs


def prepare(config: Config, data_dir: Path | str | None = None) -> Prepared:
    """What the configuration asks for.

    Raises:
      UsageError: if the configuration does not fit the machine or the data.
    """
    placement = place(config.groups, config.workers)
    feed = make_feed(config, data_dir, placement.own_workers)
    return Prepared(placement, feed, make_model(config, feed), make_optimizer(config, placement))


def make_feed(config: Config, data_dir: Path | str | None = None, rows: Sequence[int] | None = None) -> Feed:
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
    groups, workers = placement.group_axes, placement.worker_axes
    if config.groups == 1:
        groups, workers = (), placement.axes
    return METHODS[config.method].built(optimizer, config.method_options, groups=groups, workers=workers)


def local_optimizer(config: Config) -> optax.GradientTransformation:
    """What every worker steps with on its own, before learning rates differ by worker or are dropped."""
    rate = config.learning_rate
    if config.local_optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    if config.local_optimizer == "lars":
        return optax.lars(rate, config.weight_decay, momentum=config.momentum)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.sgd(rate, config.momentum, nesterov=True))


def steps_per_call(config: Config, first: int = 0) -> int:
    """Local steps in one compiled program: a period or a part of it, so that evaluations and the end fall between.

    Args:
      config: of the run.
      first: the step from which it goes on.
    """
    return math.gcd(config.period, config.eval_every, config.steps, first)


def rounds(feed: Feed, placement: Placement, steps: int, at_once: int, first: int = 0) -> Iterator[Any]:
    """The feed's batches from a step to the last, on the devices, [group, worker, steps at once, ...]."""
    batches = feed.batches(first, steps)
    while some := list(itertools.islice(batches, at_once)):
        yield placement.put(jax.tree.map(lambda *xs: np.stack(xs, 1), *some), STACKED)
