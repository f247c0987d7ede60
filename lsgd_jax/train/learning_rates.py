"""Per-worker learning-rate scaling and learning-rate schedules, for any method."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jaxtyping import ArrayLike, Float

from lsgd_jax.config import Config
from lsgd_jax.exchange import AxisName, own_entry
from lsgd_jax.optimizers import scheduled_factor


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
