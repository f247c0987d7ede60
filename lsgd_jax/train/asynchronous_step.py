"""What is compiled for asynchronous training: one worker's local step, and the exchange of joined workers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.stages import Wrapped
from jaxtyping import Array, PRNGKeyArray

from lsgd_jax.asynchronous import Model, StepReport
from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, STACKED, Placement
from lsgd_jax.exchange import all_finite
from lsgd_jax.task import Task
from lsgd_jax.train.step import TrainState, leaders_in, worker_step


def local_step(task: Task, model: nnx.Module, optimizer: optax.GradientTransformationExtraArgs, feed: Feed) -> Wrapped:
    """The function that takes one worker, alone on its device, through one local step.

    Args:
      task: of the workers.
      model: of the workers.
      optimizer: `lsgd_jax.methods.independent.independent` around the worker's own.
      feed: of the training data.

    Returns:
      A jitted function from the worker's `Model` and optimizer state (donated), both with the axes [group, worker] of
      size 1, and, as for `lsgd_jax.train.step.worker_step`, the feed's arrays on the device, the worker's batch, the
      number of the step, the learning-rate factor and the worker's key, to the new model and optimizer state and the
      `StepReport`.
    """
    take = worker_step(task, model, optimizer, feed)

    def step(
        model: Model,
        optimizer: optax.OptState,
        shared: Any,
        batch: Any,
        number: Array,
        rate_factor: Array,
        key: PRNGKeyArray,
    ) -> tuple[Model, optax.OptState, StepReport]:
        own = jax.tree.map(lambda x: x[0, 0], TrainState(*model, optimizer))
        own, loss = take(shared, rate_factor, key, own, (number, batch))
        report = StepReport(loss, own.optimizer.score, all_finite(own.params))
        params, statistics, optimizer = jax.tree.map(lambda x: x[None, None], own)
        return Model(params, statistics), optimizer, report

    return jax.jit(step, donate_argnums=1)


def exchange_of_all(pulls: optax.GradientTransformationExtraArgs, placement: Placement) -> Wrapped:
    """The function in which all workers exchange together.

    Args:
      pulls: `leader_pull` with a period and a window of 1.
      placement: of the workers.

    Returns:
      A jitted function from the params, the state of the pulls, the workers' scores and their steps, all stacked, to
      the new params and state and, replicated on all devices, the `Leaders` and the steps.
    """

    def exchange(params: optax.Params, state: Any, score: Array, step: Array) -> tuple:
        still = jax.tree.map(jnp.zeros_like, params)
        updates, state = pulls.update(still, state, params, value=score)
        return optax.apply_updates(params, updates), state, (leaders_in(state), step)

    mapped = placement.over_workers(exchange, (STACKED,) * 4, (STACKED,) * 3)
    stacked, shared = placement.sharding(STACKED), placement.sharding(SHARED)
    return jax.jit(mapped, out_shardings=(stacked, stacked, shared))
