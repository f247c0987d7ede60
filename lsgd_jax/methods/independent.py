"""Workers that never exchange: what everything else is measured against."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lsgd_jax.checks import check_window
from lsgd_jax.exchange import AxisName, all_finite, broadcast_from, elect, init_losses, record_loss
from lsgd_jax.exchange.trees import inexact, merged


class IndependentState(NamedTuple):
    """The state of `independent`: one worker's, without a worker axis."""

    step: Int[Array, ""]
    """Updates so far."""
    optimizer: optax.OptState
    losses: Float[Array, " window"]
    """The last losses, the newest at the end."""
    score: Float[Array, ""]
    """Their mean."""


def independent(
    optimizer: optax.GradientTransformation, *, axis_name: AxisName, window: int = 10
) -> optax.GradientTransformationExtraArgs:
    """The optimizer alone, without any exchange; the best worker is what the method reports.

    A NaN stays with its worker, who is not reported.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
      window: losses in the mean by which the best worker is found.

    Raises:
      ValueError: if the window is out of range, or at `update` for a missing value.
    """
    check_window(window)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> IndependentState:
        losses, score = init_losses(window, params)
        return IndependentState(jnp.zeros((), jnp.int32), optimizer.init(params), losses, score)

    def update(
        updates: optax.Updates,
        state: IndependentState,
        params: optax.Params | None = None,
        *,
        value: Float[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, IndependentState]:
        del step  # There is nothing to time.
        losses, score = record_loss(state.losses, value, state.step)
        updates, optimizer_state = optimizer.update(updates, state.optimizer, params, value=value, **extra_args)
        return updates, IndependentState(optax.safe_increment(state.step), optimizer_state, losses, score)

    return optax.GradientTransformationExtraArgs(init, update)


def center(
    params: optax.Params, state: IndependentState, axis_name: AxisName, model_axis_name: AxisName | None = None
) -> optax.Params:
    """The parameters of the best worker who is finite; the first worker's if nobody is.

    Args:
      params: one worker's; no worker axis.
      state: the worker's.
      axis_name: the axis, or the axes, on which the workers lie.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread, as for `leader_pull`.
    """
    best = elect(state.score, axis_name, eligible=all_finite(params, model_axis_name))
    return merged(broadcast_from(inexact(params), jnp.maximum(best, 0), axis_name, method="all_reduce"), params)
