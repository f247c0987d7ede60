"""Learning rates that differ from worker to worker or are dropped while a run goes on, for any method."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import ArrayLike, Float

from lsgd_jax.config import Config
from lsgd_jax.exchange import AxisName, own_entry


def rate_factors(kind: Literal["linear", "powers"], workers: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """By what each worker's learning rate is multiplied, as in the code of the paper's authors.

    Args:
      kind: "linear" gives 1, 2, 3, ... and "powers" 1, 2, 4, ... by the worker's position.
      workers: the sizes of the worker axes, the shape of the result.

    Example:
      >>> print(rate_factors("powers", (2, 2)))
      [[1. 2.]
       [4. 8.]]
    """
    position = np.arange(np.prod(workers), dtype=np.float32).reshape(workers)
    return position + 1 if kind == "linear" else 2**position


def scale_by_worker(factors: ArrayLike, *, axis_name: AxisName) -> optax.GradientTransformation:
    """Scale each worker's updates by its own factor: after an optimiser, its learning rate.

    Args:
      factors: with the shape of the worker axes, or a scalar. To change them during a run without recompiling,
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
    """Scale updates by the `rate_factor` passed to `update`: after an optimiser, drop its learning rate by it.

    Whoever calls decides when, by steps or by the clock, and nothing is compiled anew.

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


def learning_rate_factor(config: Config, step: int, epochs: float, seconds: float) -> np.float32:
    """What the learning rate is multiplied by: 0.1 to the power of the drops so far.

    Args:
      config: of the run.
      step: local steps taken.
      epochs: of the data gone through so far.
      seconds: of training so far.
    """
    now = {"fractions": step / config.steps, "epochs": epochs, "seconds": seconds}
    return np.float32(0.1 ** sum(now[config.learning_rate_drops_in] >= drop for drop in config.learning_rate_drops))
