r"""DiLoCo: an outer optimizer takes the workers' mean progress for its gradient.

Every `period` updates, with the center c,

.. math:: c \leftarrow \text{outer step from } c \text{ with the gradient } c - \bar x, \qquad x^i \leftarrow c.

The outer optimizer is SGD with Nesterov momentum; the inner one, any optimizer, keeps its state.

Douillard et al., "DiLoCo: Distributed low-communication training of language models", https://arxiv.org/abs/2311.08105.
With `fragments`, `overlap` and `mixing` it is Streaming DiLoCo, https://arxiv.org/abs/2501.18512.
"""

from typing import Any

import optax

from lsgd_jax.checks import check_positive, check_strengths
from lsgd_jax.exchange import AxisName
from lsgd_jax.link import chained
from lsgd_jax.methods.base import mean_of, outer_step, shared_center
from lsgd_jax.streaming import Streaming, streamed


def diloco(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 16,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    fragments: int | None = None,
    overlap: int | None = None,
    mixing: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo.

    The center starts at the mean of the starts. A NaN in one worker's parameters reaches all at the next exchange; a
    NaN loss has no effect.

    Args:
      optimizer: the worker's own; AdamW in the paper.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges; hundreds in the paper.
      outer_learning_rate: learning rate of the outer step.
      outer_momentum: Nesterov momentum of the outer step, in [0, 1].
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      mixing: weight of what is received beside the worker's own parameters as it is applied, in [0, 1]; None: 1.

    Raises:
      ValueError: if an option is out of range.
    """
    check_positive(outer_learning_rate=outer_learning_rate)
    mixing = 1.0 if mixing is None else mixing
    check_strengths(outer_momentum=outer_momentum, mixing=mixing)
    outer = optax.sgd(outer_learning_rate, outer_momentum, nesterov=True)
    center, streaming = outer_step(mean_of(axis_name), outer, axis_name), Streaming(fragments, overlap)
    moving = streamed(center, mixing, streaming, axis_name=axis_name, period=period)
    return chained(optimizer, moving, axis_name=axis_name)


def center(params: optax.Params, state: Any, axis_name: AxisName) -> Any:
    """The center."""
    return shared_center(params, state, axis_name)
