r"""DiLoCo: an outer optimiser takes the workers' mean progress for its gradient.

Every `period` updates, with the center c,

.. math:: c \leftarrow \text{outer step from } c \text{ with the gradient } c - \bar x, \qquad x^i \leftarrow c.

The outer optimiser is SGD with Nesterov momentum; the inner one, any optimiser, keeps its state.

Douillard et al., "DiLoCo: Distributed low-communication training of language models", https://arxiv.org/abs/2311.08105.
"""

from typing import Any

import optax

from lsgd_jax.checks import check_positive, check_strengths
from lsgd_jax.exchange import AxisName, mean
from lsgd_jax.methods.base import MethodState, difference, exchange_every, shared_center
from lsgd_jax.trees import towards


def diloco(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 16,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
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

    Raises:
      ValueError: if an option is out of range.
    """
    check_positive(outer_learning_rate=outer_learning_rate)
    check_strengths(outer_momentum=outer_momentum)
    outer = optax.sgd(outer_learning_rate, outer_momentum, nesterov=True)

    def exchange(x: optax.Params, shared: tuple, grads: optax.Updates) -> tuple[optax.Updates, tuple]:
        center, outer_state = shared
        updates, outer_state = outer.update(difference(center, mean(x, axis_name)), outer_state, center)
        new_center = optax.apply_updates(center, updates)
        return towards(x, new_center), (new_center, outer_state)

    return exchange_every(
        period,
        optimizer,
        exchange,
        axis_name=axis_name,
        share=lambda center, start: (center, outer.init(center)),
    )


def center(params: optax.Params, state: MethodState, axis_name: AxisName) -> Any:
    """The center."""
    return shared_center(state.shared[0], params, axis_name)
