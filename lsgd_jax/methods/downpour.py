r"""DOWNPOUR: workers add what they have done to a center and go on from it.

Every `period` updates, with worker i having come from a to x,

.. math:: c \leftarrow c + \sum_i (x^i - a^i), \qquad x^i \leftarrow c.

It is the sum that is added: the mean would be local SGD.

Dean et al., "Large scale distributed deep networks", NeurIPS 2012; with all workers in step or, by `meet_center`,
each on its own clock.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lsgd_jax.exchange import AxisName, mean, worker_count
from lsgd_jax.link import Attractor, Target, chained
from lsgd_jax.methods.base import Center, center_of_start, common, difference, moved_to, scaled, shared_center
from lsgd_jax.methods.method import Meeting
from lsgd_jax.streaming import Streaming, streamed


def downpour(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    fragments: int | None = None,
    overlap: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DOWNPOUR with all workers in step.

    The center starts at the mean of the starts. A NaN in one worker's parameters reaches all at the next exchange; a
    NaN loss has no effect.

    Args:
      optimizer: the worker's own. n workers together go n times as far as one: the learning rate wants to be smaller.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.

    Raises:
      ValueError: if an option is out of range.
    """

    def init(params: optax.Params) -> tuple[Center, optax.Params]:
        return center_of_start(params), params

    def locate(x: optax.Params, state: tuple[Center, optax.Params]) -> tuple[Target, tuple[Center, optax.Params]]:
        center, last_center = state
        sums = scaled(worker_count(axis_name), mean(difference(x, last_center), axis_name))
        new_center = jax.tree.map(lambda c, d: c + d, common(center, axis_name), sums)
        return Target(new_center), (moved_to(new_center, center), new_center)

    streaming = Streaming(fragments, overlap)
    moving = streamed(Attractor(init, locate), 1.0, streaming, axis_name=axis_name, period=period)
    return chained(optimizer, moving, axis_name=axis_name)


def meet_center(x: optax.Params, center: optax.Params, last_center: optax.Params) -> optax.Params:
    r"""One worker's exchange with the center on its own clock, as the paper's asynchronous algorithm has it.

    The worker adds to the center what it has done since it came from a, and goes on from there:

    .. math:: c \leftarrow c + (x - a), \qquad x \leftarrow c.

    Args:
      x: the worker's point.
      center: the center, c.
      last_center: the center from which the worker went on last, a.

    Returns:
      The new center, which is the worker's new point.
    """
    return optax.apply_updates(center, difference(x, last_center))


def meeting(options: Mapping[str, Any], workers: int) -> Meeting:
    """`meet_center`, after which the worker is where the center is."""

    def meet(x: optax.Params, center: optax.Params, last_center: optax.Params) -> tuple[optax.Params, optax.Params]:
        center = meet_center(x, center, last_center)
        return center, center

    return meet


def center(params: optax.Params, state: Any, axis_name: AxisName) -> Any:
    """The center."""
    return shared_center(params, state, axis_name)
