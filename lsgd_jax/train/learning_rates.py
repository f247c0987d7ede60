"""Per-worker learning-rate scaling and learning-rate schedules, for any method."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from lsgd_jax.config import Config
from lsgd_jax.exchange import NOBODY, AxisName, own_entry, worker_index
from lsgd_jax.exchange.trees import scalar_like, select
from lsgd_jax.optimizers import scheduled_factor
from lsgd_jax.train.evaluated_model import Around
from lsgd_jax.variants import links

SPAN = 4.0
"""Highest learning rate on a ladder, as a multiple of the leader's."""
LADDER_SHARE = 0.3
"""First part of the steps, in which learning rates on a ladder differ."""


def rate_factors(kind: Literal["linear", "powers"], workers: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The factor of each worker's learning rate, as in the code of the paper's authors.

    Args:
      kind: "linear" gives 1, 2, 3, ... and "powers" 1, 2, 4, ... in the order of the workers.
      workers: the sizes of the worker axes, the shape of the result.

    Example:
      >>> print(rate_factors("powers", (2, 2)))
      [[1. 2.]
       [4. 8.]]
    """
    position = np.arange(np.prod(workers), dtype=np.float32).reshape(workers)
    return position + 1 if kind == "linear" else 2**position


def scale_by_worker(factors: ArrayLike, *, axis_name: AxisName) -> optax.GradientTransformation:
    """Scale each worker's updates by its own factor: chained after an optimizer, this scales its learning rate.

    Args:
      factors: with the shape of the worker axes, or a scalar. To change them during a run without recompiling, use
        `optax.inject_hyperparams(scale_by_worker)`.
      axis_name: the axis, or the axes, on which the workers lie.

    Raises:
      ValueError: at `update`, if the factors have another shape.
    """

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        factor = own_entry(jnp.asarray(factors), axis_name)
        return jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def scale_by_rate_factor() -> optax.GradientTransformationExtraArgs:
    """Scale updates by the `rate_factor` passed to `update`: chained after an optimizer, this scales its learning rate.

    The caller decides when the factor changes, by steps or by the clock; nothing is recompiled.

    Example:
      >>> tx = optax.chain(optax.sgd(0.5), scale_by_rate_factor())
      >>> x = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(x, tx.init(x), x, rate_factor=0.1)
      >>> print(updates)
      [-0.05 -0.1 ]
    """

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        rate_factor: ArrayLike,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        return jax.tree.map(lambda u: jnp.asarray(rate_factor, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def learning_rate_factor(
    config: Config, step: npt.ArrayLike, epochs: float, seconds: float
) -> Float[np.ndarray, "..."]:
    """The learning-rate factor: of the schedule, times 0.1 for each drop so far.

    Args:
      config: of the run.
      step: local steps taken, or several numbers of them.
      epochs: over the data so far.
      seconds: of training so far.

    Returns:
      The factor at each of the steps.
    """
    now: dict[str, npt.ArrayLike] = {"fractions": np.asarray(step) / config.steps, "epochs": epochs, "seconds": seconds}
    reached = np.broadcast_to(now[config.learning_rate_drops_in], np.shape(step))
    dropped = np.greater_equal.outer(reached, config.learning_rate_drops).sum(-1)
    return np.asarray(0.1**dropped * scheduled_factor(config, config.steps, step), np.float32)


class Ladder(NamedTuple):
    """The state of a ladder, around that of the method; the same on all workers."""

    factor: Float[Array, ""]
    """The leader's learning rate, relative to that of the run."""
    leader: Int[Array, ""]
    """Position of that leader; before there is one, that of the first worker, and after a resume with other workers an
    arbitrary one until the next exchange."""


def rungs(workers: int) -> Float[np.ndarray, " workers"]:
    """The learning rates on a ladder, as multiples of the leader's: evenly spaced on a log scale, `SPAN` at most.

    Args:
      workers: how many there are.

    Returns:
      That of the leader, 1, those of the workers after it, which are above, and those of the workers before it.

    Example:
      >>> print(rungs(4), rungs(5))
      [1.  2.  4.  0.5] [1.   2.   4.   0.25 0.5 ]
    """
    highest, exponents = workers // 2, np.arange(workers, dtype=np.float32)
    exponents[highest + 1 :] -= workers
    return SPAN ** (exponents / max(highest, 1))


def with_ladder(
    config: Config, optimizer: optax.GradientTransformationExtraArgs, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """A method whose workers try multiples of its leader's learning rate, to start with.

    In the first part of the steps, `LADDER_SHARE`, the workers stand on the `rungs` of a ladder. An exchange of all
    workers that elects a leader centers it anew: the leader keeps the learning rate that it has, and the others have
    multiples of that. After that part, all have the last leader's. Nothing is sent for it, since all know who leads.

    Args:
      config: of the run.
      optimizer: a method that elects leaders, around a worker's optimizer with `scale_by_rate_factor`; `update` is told
        the `step`.
      axis_name: all axes on which workers lie.
    """
    until, period, workers = int(LADDER_SHARE * config.steps), config.levels[-1].period, config.groups * config.workers
    multiples = rungs(workers)

    def init(params: optax.Params) -> Around:
        first = Ladder(scalar_like(params, 1, jnp.float32), scalar_like(params, 0, jnp.int32))
        return Around(optimizer.init(params), first)

    def update(
        updates: optax.Updates,
        state: Around,
        params: optax.Params | None = None,
        *,
        step: Any,
        rate_factor: ArrayLike,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Around]:
        ladder: Ladder = state.own
        differ = step < until

        def factor_of(worker: Array) -> Array:
            return ladder.factor * jnp.asarray(multiples)[(worker - ladder.leader) % workers]

        own = jnp.where(differ, factor_of(worker_index(axis_name)), ladder.factor)
        updates, inner = optimizer.update(
            updates, state.method, params, step=step, rate_factor=rate_factor * own, **extra_args
        )
        leader = links(inner)[-1].leader.position
        recenters = differ & ((step + 1) % period == 0) & (leader != NOBODY)
        return updates, Around(inner, select(recenters, Ladder(factor_of(leader), leader), ladder))

    return optax.GradientTransformationExtraArgs(init, update)
