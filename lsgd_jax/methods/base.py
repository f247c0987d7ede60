"""What methods have in common: their attractors' parts, and the models that they report."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lsgd_jax.exchange import AxisName, Members, mean, rounded_mean, total, when
from lsgd_jax.exchange.trees import inexact, merged, scalar_like, select
from lsgd_jax.link import Attractor, Target, parts
from lsgd_jax.variants import has_failed


class Center(NamedTuple):
    """A center variable, as one worker keeps it."""

    x: optax.Params
    """The same on all workers; before the first exchange the worker's own start, since `init` calls no collective."""
    is_common: Bool[Array, ""]
    """Whether there has been an exchange."""


def center_of_start(params: optax.Params) -> Center:
    """The center before the first exchange."""
    return Center(params, scalar_like(params, False, bool))


def common(center: Center, axis_name: AxisName) -> optax.Params:
    """The center, the same on all workers: at the first exchange the mean of the starts."""
    return when(~center.is_common, lambda x: mean(x, axis_name), center.x, axis_name)


def moved_to(x: optax.Params, center: Center) -> Center:
    """The center at a new point, the same on all workers."""
    return Center(x, jnp.ones_like(center.is_common))


def mean_of(axis_name: AxisName) -> Attractor:
    """The attractor that is the workers' mean."""

    def locate(x: optax.Params, state: tuple) -> tuple[Target, tuple]:
        return Target(mean(x, axis_name)), state

    return Attractor(lambda params: (), locate)


def rounded_mean_of(axis_name: AxisName) -> Attractor:
    """The attractor that is the workers' mean, sent in bfloat16 as differences to the last one."""

    def locate(x: optax.Params, last: Center) -> tuple[Target, Center]:
        new = rounded_mean(x, common(last, axis_name), axis_name)
        return Target(new), moved_to(new, last)

    return Attractor(center_of_start, locate)


class OuterStep(NamedTuple):
    """The state of `outer_step`."""

    center: Center
    optimizer: optax.OptState
    """Of the outer optimizer."""
    average: Any
    """What the average keeps."""


def outer_step(average: Attractor, optimizer: optax.GradientTransformation, axis_name: AxisName) -> Attractor:
    """The attractor that is a center, which moves by an outer optimizer's steps with the gradient center - average.

    The center starts at the mean of the starts, and stays where it is as long as there is no average.

    Args:
      average: the attractor at an average of the workers.
      optimizer: the outer one, such as SGD with Nesterov momentum.
      axis_name: the axis, or the axes, on which the workers lie.
    """

    def init(params: optax.Params) -> OuterStep:
        return OuterStep(center_of_start(params), optimizer.init(params), average.init(params))

    def choose(x: optax.Params, state: OuterStep, **signals: Any) -> OuterStep:
        return state._replace(average=average.choose(x, state.average, **signals))

    def locate(x: optax.Params, state: OuterStep) -> tuple[Target, OuterStep]:
        last = common(state.center, axis_name)
        target, kept = average.locate(x, state.average)
        updates, own = optimizer.update(difference(last, target.point), state.optimizer, last)
        center = optax.apply_updates(last, updates)
        if target.exists is not True:
            center, own = select(target.exists, (center, own), (last, state.optimizer))
        target = Target(center, target.exists, target.exists)
        return target, OuterStep(moved_to(center, state.center), own, kept)

    return Attractor(init, locate, choose)


def mean_of_workers(
    params: optax.Params, state: Any, axis_name: AxisName, model_axis_name: AxisName | None = None
) -> optax.Params:
    """The model that methods without a center variable report: the mean of the workers that are all finite.

    Workers that have failed and wait for their revival are left out. Integers, booleans and PRNG keys, which are not
    exchanged, are the worker's own.

    Args:
      params: one worker's; no worker axis.
      state: the optimizer's, or None.
      axis_name: the axis, or the axes, on which the workers lie.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread, as for `leader_pull`.
    """
    floats, counts = inexact(params), ~has_failed(params, state, model_axis_name)
    members = Members(counts, total(counts.astype(int), axis_name))
    return merged(mean(floats, axis_name, members), params)


def own_center(params: optax.Params, state: Any) -> optax.Params:
    """A worker's copy of the center variable; what is not exchanged is the worker's own."""
    center = functools.reduce(merged, (each.x for each in parts(Center, state[-1])))  # One for each fragment.
    return merged(center, params)


def shared_center(params: optax.Params, state: Any, axis_name: AxisName) -> optax.Params:
    """The model that methods with a center variable report; what is not exchanged is as `mean_of_workers` has it."""
    center = functools.reduce(merged, (each.x for each in parts(Center, state[-1])))
    return merged(mean(center, axis_name), mean_of_workers(params, None, axis_name))


def difference(x: optax.Params, y: optax.Params) -> optax.Updates:
    """Leaf by leaf, x - y."""
    return jax.tree.map(jnp.subtract, x, y)


def scaled(scale: Any, x: optax.Updates) -> optax.Updates:
    """Leaf by leaf, scale x, in the dtype of x."""
    return jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, x)
