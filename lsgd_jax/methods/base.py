"""What methods that exchange every few steps have in common."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lsgd_jax.checks import check_whole
from lsgd_jax.exchange import AxisName, axis_names, mean, total, when
from lsgd_jax.leader import has_failed
from lsgd_jax.trees import check_updates, exchanged_with, inexact, like, merged, moved, promoted, scalar_like


class MethodState(NamedTuple):
    """The state of a method that exchanges every few steps: one worker's, without a worker axis."""

    step: Int[Array, ""]
    """Updates so far."""
    optimizer: optax.OptState
    """The worker's own; it is not exchanged."""
    shared: Any
    """What the method keeps beside it, such as a center variable."""
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
      share: makes what is shared of the center, which is the mean of the starts, and of the worker's own start. Until
        the first update, since `init` calls no collective, the worker's start stands for the center.
      each_step: takes the worker's point and the state; returns a move for every update, before the exchange.
      pull_at: whether moves are taken at the point after the worker's step or at the point before it.

    Raises:
      ValueError: if the period is no whole number of updates, or at `update` if the params are missing.
    """
    check_whole("period", period, "updates")
    exchanged, optimizer = exchanged_with(optimizer, axis_name), optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> MethodState:
        own, params = optimizer.init(params), jax.tree.map(jnp.asarray, exchanged(params))
        shared = share(params, params) if share else None
        exchanges = scalar_like(params, 0, jnp.int32, axis_names(axis_name))
        return MethodState(jnp.zeros((), jnp.int32), own, shared, exchanges)

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
        x = exchanged(params)
        check_updates(updates, x)
        if share is not None:
            begun = when(state.step == 0, lambda _: share(mean(x, axis_name), x), state.shared, axis_name)
            state = state._replace(shared=begun)
        step = state.step if step is None else step
        grads = like(x, updates)
        all_updates, optimizer_state = optimizer.update(updates, state.optimizer, params, value=value, **extra_args)
        updates = promoted(like(x, all_updates), x)

        def point(updates: optax.Updates) -> optax.Params:
            return x if pull_at == "before_step" else optax.apply_updates(x, updates)

        if each_step is not None:
            updates = moved(updates, x, each_step(point(updates), state), step)

        def exchanged_now(before: tuple[optax.Updates, Any, Array]) -> tuple[optax.Updates, Any, Array]:
            updates, shared, exchanges = before
            move, shared = exchange(point(updates), shared, grads)
            return moved(updates, x, move, step), shared, optax.safe_increment(exchanges)

        due = (step + 1) % period == 0
        updates, shared, exchanges = when(due, exchanged_now, (updates, state.shared, state.exchanges), axis_name)
        state = MethodState(optax.safe_increment(state.step), optimizer_state, shared, exchanges)
        return merged(updates, all_updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def mean_of_workers(params: optax.Params, state: Any, axis_name: AxisName) -> optax.Params:
    """The center of methods without a center variable: the mean of the workers whose parameters are all finite.

    Workers that have failed and wait for their revival are left out. Integers, booleans and PRNG keys, which are not
    exchanged, are the worker's own.
    """
    floats, counts = inexact(params), ~has_failed(params, state)
    number = total(counts.astype(int), axis_name)
    sums = total(jax.tree.map(lambda x: jnp.where(counts, x, 0), floats), axis_name)
    return merged(jax.tree.map(lambda x: x / number.astype(x.dtype), sums), params)


def shared_center(shared: optax.Params, params: optax.Params, axis_name: AxisName) -> optax.Params:
    """The center of methods with a center variable; what is not exchanged is as `mean_of_workers` has it."""
    return merged(mean(shared, axis_name), mean_of_workers(params, None, axis_name))


def difference(x: optax.Params, y: optax.Params) -> optax.Updates:
    """Leaf by leaf, x - y."""
    return jax.tree.map(jnp.subtract, x, y)


def scaled(scale: Any, x: optax.Updates) -> optax.Updates:
    """Leaf by leaf, scale x, in the dtype of x."""
    return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, x)
