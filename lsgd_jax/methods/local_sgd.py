r"""Local SGD: workers go on from their mean, :math:`x^i \leftarrow \bar x`, every `period` updates.

Stich, "Local SGD converges fast and communicates little", https://arxiv.org/abs/1805.09767. With a delay of 1 it is
overlapped local SGD, :math:`x^i \leftarrow x^i - (x^i_k - \bar x_k)` from the points at the end of the last exchange k,
as in Zhou et al., "DaSGD: Squeezing SGD parallelization performance in distributed training using delayed averaging",
https://arxiv.org/abs/2006.00441.
"""

from collections.abc import Mapping
from typing import Any, Literal

import optax

from lsgd_jax.checks import check_strengths
from lsgd_jax.exchange import AxisName
from lsgd_jax.link import chained
from lsgd_jax.methods.base import mean_of, rounded_mean_of
from lsgd_jax.streaming import Streaming, streamed
from lsgd_jax.variants import Delay, delayed


def local_sgd(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    delay: Delay = 0,
    wire: Literal["bfloat16"] | None = None,
    fragments: int | None = None,
    overlap: int | None = None,
    mixing: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Local SGD, also called periodic averaging.

    A NaN in one worker's parameters reaches all at the next exchange; a NaN loss has no effect.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      delay: 1 applies each move to the mean one exchange late, overlapping communication with compute.
      wire: number format in which averages are sent: "bfloat16" differences to the last mean, at first to that of the
        starts, or None for that of the parameters.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      mixing: weight of what is received beside the worker's own parameters as it is applied, in [0, 1]; None: 1.

    Raises:
      ValueError: if an option is out of range.
    """
    if wire not in (None, "bfloat16"):
        raise ValueError(f'the wire of an average must be None or "bfloat16", got {wire!r}.')
    mixing = 1.0 if mixing is None else mixing
    check_strengths(mixing=mixing)
    average = mean_of(axis_name) if wire is None else rounded_mean_of(axis_name)
    streaming, exchange = Streaming(fragments, overlap), delayed(delay, overlap)
    moving = streamed(average, mixing, streaming, axis_name=axis_name, period=period, exchange=exchange)
    return chained(optimizer, moving, axis_name=axis_name)


def averages_start(options: Mapping[str, Any], among_all: bool) -> int:
    """How often the first exchange averages the starts, to which rounded averages send differences."""
    return options.get("wire") is not None
