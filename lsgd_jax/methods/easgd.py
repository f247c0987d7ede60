"""Elastic averaging SGD: workers and a centre variable draw each other.

Zhang, Choromanska, LeCun, "Deep learning with Elastic Averaging SGD", https://arxiv.org/abs/1412.6651.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lsgd_jax.exchange import AxisName, mean, when, worker_count


class EasgdState(NamedTuple):
    """The state of `easgd`: one worker's, without a worker axis."""

    step: Int[Array, ""]
    """Updates so far."""
    optimizer: optax.OptState
    """The worker's own."""
    center: optax.Params
    """The centre variable, the same on all workers; from the first update on, when it is the mean of the starts."""
    exchanges: Int[Array, ""]
    """How many exchanges there have been."""


def easgd(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 1,
    pull: float | None = None,
    center_pull: float | None = None,
    pull_at: Literal["after_step", "before_step"] = "after_step",
) -> optax.GradientTransformationExtraArgs:
    r"""Elastic averaging SGD; with Nesterov momentum in the optimiser it is EAMSGD.

    Every `period` updates worker i and the centre c move, from the same values,

    .. math:: x^i \leftarrow x^i - \alpha (x^i - c), \qquad c \leftarrow c + \beta (\bar x - c),

    with the mean :math:`\bar x` of the workers. The centre starts at the mean of the starts.

    A NaN in one worker's parameters reaches the centre at the next exchange and all workers at the one after that.

    Args:
      optimizer: the worker's own; its state is not exchanged.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      pull: strength alpha of the workers' pull towards the centre; None: 0.9^8 / workers, the paper's choice.
      center_pull: strength beta of the centre's pull towards the mean; None: workers * pull, which makes the forces
        between the centre and the workers symmetric.
      pull_at: "after_step" pulls at the point after the worker's step, "before_step" at the point before it.

    Returns:
      A gradient transformation with the state `EasgdState`. `update` needs the params and takes an optional `step`, as
      for `lsgd_jax.leader_pull`; it ignores a loss passed as `value`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> EasgdState:
        zero = jnp.zeros((), jnp.int32)
        return EasgdState(zero, optimizer.init(params), jax.tree.map(jnp.asarray, params), zero)

    def update(
        updates: optax.Updates,
        state: EasgdState,
        params: optax.Params | None = None,
        *,
        step: Int[Array, ""] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EasgdState]:
        if params is None:
            raise ValueError("easgd moves parameters: pass them, update(updates, state, params).")
        step = state.step if step is None else step
        alpha = 0.9**8 / worker_count(axis_name) if pull is None else pull
        beta = alpha * worker_count(axis_name) if center_pull is None else center_pull
        center = when(step == 0, lambda _: mean(params, axis_name), state.center, axis_name)
        updates, optimizer_state = optimizer.update(updates, state.optimizer, params, **extra_args)

        def exchange(before: tuple) -> tuple:
            updates, center, exchanges = before
            x = params if pull_at == "before_step" else optax.apply_updates(params, updates)
            updates = jax.tree.map(lambda u, x, c: (u - alpha * (x - c)).astype(u.dtype), updates, x, center)
            center = jax.tree.map(lambda c, x: c + beta * (x - c), center, mean(x, axis_name))
            return updates, center, optax.safe_increment(exchanges)

        due = (step + 1) % period == 0
        updates, center, exchanges = when(due, exchange, (updates, center, state.exchanges), axis_name)
        return updates, EasgdState(optax.safe_increment(state.step), optimizer_state, center, exchanges)

    return optax.GradientTransformationExtraArgs(init, update)
