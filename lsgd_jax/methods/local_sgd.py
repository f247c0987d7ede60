r"""Local SGD: workers go on from their mean, :math:`x^i \leftarrow \bar x`, every `period` updates.

Stich, "Local SGD converges fast and communicates little", https://arxiv.org/abs/1805.09767.
"""

import optax

from lsgd_jax.exchange import AxisName, mean
from lsgd_jax.methods.base import exchange_every
from lsgd_jax.trees import towards


def local_sgd(
    optimizer: optax.GradientTransformation, *, axis_name: AxisName, period: int = 4
) -> optax.GradientTransformationExtraArgs:
    """Local SGD, also called periodic averaging.

    A NaN in one worker's parameters reaches all at the next exchange; a NaN loss has no effect.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.

    Raises:
      ValueError: if the period is out of range.
    """

    def exchange(x: optax.Params, shared: None, grads: optax.Updates) -> tuple[optax.Updates, None]:
        return towards(x, mean(x, axis_name)), shared

    return exchange_every(period, optimizer, exchange, axis_name=axis_name)
