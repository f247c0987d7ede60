"""The evaluated model of a run: the method's own, or another that can be made of its workers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from lsgd_jax.config import Config
from lsgd_jax.exchange import AxisName, all_finite, broadcast_from, elect, total, when
from lsgd_jax.exchange.trees import inexact, merged, scalar_like, select, wide
from lsgd_jax.link import parts
from lsgd_jax.methods import METHODS, mean_of_workers
from lsgd_jax.variants import apply_updates, links


class Around(NamedTuple):
    """The state of a transformation around a method."""

    method: optax.OptState
    own: Any


class Tail(NamedTuple):
    """The mean over the last exchanges of a worker's share of the evaluated model."""

    mean: optax.Params
    """In at least float32: in 16 bits, the increments of a long mean would be rounded away."""
    exchanges: Int[Array, ""]
    """How many these have been."""


def method_state(state: optax.OptState) -> optax.OptState:
    """The state of the method, without what is around it."""
    return method_state(state.method) if isinstance(state, Around) else state


def evaluated_model(config: Config) -> Callable[[optax.Params, Any, AxisName], optax.Params]:
    """From a worker's params, the optimizer's state and the worker axes to the evaluated model, the same on all."""
    method, kind = METHODS[config.method], config.evaluated_model

    def model(params: optax.Params, state: Any, axis_name: AxisName) -> optax.Params:
        of_method = method_state(state)
        if kind == "mean":
            return mean_of_workers(params, of_method, axis_name)
        if kind == "leader" and method.elects:
            best = elect(links(of_method)[0].score, axis_name, eligible=all_finite(params))
            return merged(broadcast_from(inexact(params), jnp.maximum(best, 0), axis_name, method="all_reduce"), params)
        last = method.center(params, of_method, axis_name)
        if kind != "tail_mean":
            return last
        [(mean, exchanges)] = parts(Tail, state)
        exchanges = total(exchanges, axis_name)  # Known to be the same on all.
        return select(exchanges > 0, mean_of_workers(merged(mean, params), of_method, axis_name), last)

    return model


def with_tail(config: Config, optimizer: optax.GradientTransformationExtraArgs, axis_name: AxisName) -> Any:
    """A method that keeps the mean of each worker's share of the evaluated model over the last exchanges.

    Nothing is sent for it: the mean over workers is taken when the model is evaluated.

    Args:
      config: of the run, of which the last part of the steps, `tail_share`, counts.
      optimizer: the method around a worker's optimizer; `update` is told the `step`.
      axis_name: all axes on which workers lie.
    """
    method, levels = METHODS[config.method], config.levels
    period, first = levels[-1].period, config.steps - int(np.ceil(config.tail_share * config.steps))

    def init(params: optax.Params) -> Around:
        return Around(optimizer.init(params), Tail(_wide(params), scalar_like(params, 0, jnp.int32)))

    def update(
        updates: optax.Updates, state: Around, params: optax.Params | None = None, *, step: Any, **extra_args: Any
    ) -> tuple[optax.Updates, Around]:
        updates, inner = optimizer.update(updates, state.method, params, step=step, **extra_args)

        def averaged(tail: Tail) -> Tail:
            share = _wide(method.share(apply_updates(params, updates, inner), inner))
            count = optax.safe_increment(tail.exchanges)
            mean = jax.tree.map(lambda m, x: m + (x - m) / count.astype(x.dtype), tail.mean, share)
            return Tail(select(tail.exchanges > 0, mean, share), count)

        due = ((step + 1) % period == 0) & (step >= first)
        return updates, Around(inner, when(due, averaged, state.own, axis_name))

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(params: optax.Params) -> optax.Params:
    """What is exchanged, in at least float32."""
    return jax.tree.map(wide, inexact(params))
