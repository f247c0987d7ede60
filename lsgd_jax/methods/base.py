"""What methods that exchange every few steps have in common."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from lsgd_jax.checks import check_whole
from lsgd_jax.exchange import AxisName, all_finite, axis_names, mean, when


class MethodState(NamedTuple):
    """The state of a method that exchanges every few steps: one worker's, without a worker axis."""

    step: Int[Array, ""]
    """Updates so far."""
    optimizer: optax.OptState
    """The worker's own; it is not exchanged."""
    shared: Any
    """What the method keeps beside it, such as a centre variable."""
    exchanges: Int[Array, ""]
    """How many exchanges there have been."""


def exchange_every(
    period: int,
    optimizer: optax.GradientTransformation,
    exchange: Callable[[optax.Params, Any, optax.Updates], tuple[optax.Updates, Any]],
    *,
    axis_name: AxisName,
    share: Callable[[optax.Params, optax.Params], Any] | None = None,
    each_step: Callable[[optax.Params, MethodState], optax.Updates] | None = None,
    pull_at: Literal["after_step", "before_step"] = "after_step",
) -> optax.GradientTransformationExtraArgs:
    """Local steps of an optimiser, and after every `period` of them an exchange.

    Moves are added to the optimiser's updates, so that where a worker is to arrive at a given point, it does so up to
    rounding.

    Args:
      period: updates between exchanges.
      optimizer: the worker's own.
      exchange: takes the worker's point, what is shared and the raw gradients; returns the move and what is shared
        from then on.
      axis_name: the axis, or the axes, on which the workers lie.
      share: makes what is shared of the centre, which is the mean of the starts, and of the worker's own start. Until
        the first update, since `init` calls no collective, the worker's start stands for the centre.
      each_step: takes the worker's point and the state; returns a move for every update, before the exchange.
      pull_at: whether moves are taken at the point after the worker's step or at the point before it.

    Raises:
      ValueError: if the period is no whole number of updates, or at `update` if the params are missing.
    """
    check_whole("period", period, "updates")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> MethodState:
        params = jax.tree.map(jnp.asarray, params)
        exchanges = jnp.zeros_like(jax.tree.leaves(params)[0], jnp.int32, shape=())
        shared = share(params, params) if share else None
        return MethodState(jnp.zeros((), jnp.int32), optimizer.init(params), shared, exchanges)

    def update(
        updates: optax.Updates,
        state: MethodState,
        params: optax.Params | None = None,
        *,
        value: Array | None = None,
        step: Int[Array, ""] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MethodState]:
        if params is None:
            raise ValueError("this method moves parameters: pass them, update(updates, state, params).")
        if share is not None:
            begun = when(state.step == 0, lambda _: share(mean(params, axis_name), params), state.shared, axis_name)
            state = state._replace(shared=begun)
        step = state.step if step is None else step
        grads = updates
        updates, optimizer_state = optimizer.update(grads, state.optimizer, params, value=value, **extra_args)

        def point(updates: optax.Updates) -> optax.Params:
            return params if pull_at == "before_step" else optax.apply_updates(params, updates)

        if each_step is not None:
            updates = _plus(updates, each_step(point(updates), state))

        def exchanged(before: tuple[optax.Updates, Any, Array]) -> tuple[optax.Updates, Any, Array]:
            updates, shared, exchanges = before
            move, shared = exchange(point(updates), shared, grads)
            return _plus(updates, move), shared, optax.safe_increment(exchanges)

        due = (step + 1) % period == 0
        updates, shared, exchanges = when(due, exchanged, (updates, state.shared, state.exchanges), axis_name)
        return updates, MethodState(optax.safe_increment(state.step), optimizer_state, shared, exchanges)

    return optax.GradientTransformationExtraArgs(init, update)


def mean_of_workers(params: optax.Params, state: Any, axis_name: AxisName) -> optax.Params:
    """The center of methods without a centre variable: the mean of the workers whose parameters are all finite."""
    del state
    finite = all_finite(params)
    count = lax.psum(finite.astype(int), axis_names(axis_name))
    sums = lax.psum(jax.tree.map(lambda x: jnp.where(finite, x, 0), params), axis_names(axis_name))
    return jax.tree.map(lambda x: x / count.astype(x.dtype), sums)


def difference(x: optax.Params, y: optax.Params) -> optax.Updates:
    """Leaf by leaf, x - y."""
    return jax.tree.map(jnp.subtract, x, y)


def scaled(scale: Any, x: optax.Updates) -> optax.Updates:
    """Leaf by leaf, scale x, in the dtype of x."""
    return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, x)


def _plus(updates: optax.Updates, move: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda u, m: (u + m).astype(u.dtype), updates, move)
