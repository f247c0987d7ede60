r"""Robust averages: workers go on from the median or the trimmed mean of every single parameter.

Every `period` updates

.. math:: x^i_k \leftarrow x^i_k - \text{pull} \, (x^i_k - c_k), \qquad
    c_k = \text{median or trimmed mean of } x^1_k, ..., x^n_k.

Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning: Towards optimal statistical rates",
https://arxiv.org/abs/1803.01498, which takes them of gradients. No all-reduce can tell them: every worker receives the
parameters of all, :math:`n - 1` times what one has, where an average costs less than twice that.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from lsgd_jax.checks import check_strengths
from lsgd_jax.exchange import AxisName, all_finite, axis_names, total, worker_count
from lsgd_jax.exchange.trees import wide
from lsgd_jax.link import Attractor, Target, chained
from lsgd_jax.streaming import Streaming, streamed


def coordinate_median(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    pull: float = 1.0,
    fragments: int | None = None,
    overlap: int | None = None,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Workers are pulled towards the median of each parameter; of an even number, the mean of the two in the middle.

    A NaN in one worker's parameters stays with that worker, who is left out; a NaN loss has no effect.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      pull: strength of the pull towards the median, in [0, 1].
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread, as for `leader_pull`.

    Raises:
      ValueError: if an option is out of range.
    """
    check_strengths(pull=pull)
    attractor, streaming = middle_of(axis_name, 0.5, model_axis_name), Streaming(fragments, overlap)
    moving = streamed(attractor, pull, streaming, axis_name=axis_name, period=period)
    return chained(optimizer, moving, axis_name=axis_name)


def trimmed_mean(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    trim: float = 0.25,
    pull: float = 1.0,
    fragments: int | None = None,
    overlap: int | None = None,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Workers are pulled towards the mean of each parameter without the lowest and the highest ones.

    A NaN in one worker's parameters stays with that worker, who is left out; a NaN loss has no effect.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      trim: share of the workers whose values are left out at either end, in [0, 0.5], rounded down.
      pull: strength of the pull towards the trimmed mean, in [0, 1].
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread, as for `leader_pull`.

    Raises:
      ValueError: if an option is out of range.
    """
    check_strengths(pull=pull)
    if not 0 <= trim <= 0.5:
        raise ValueError(f"trim must be in [0, 0.5], got {trim}.")
    attractor, streaming = middle_of(axis_name, trim, model_axis_name), Streaming(fragments, overlap)
    moving = streamed(attractor, pull, streaming, axis_name=axis_name, period=period)
    return chained(optimizer, moving, axis_name=axis_name)


def middle_of(axis_name: AxisName, trim: float, model_axis_name: AxisName | None = None) -> Attractor:
    """The attractor that is, in each parameter, the mean of the workers' values without the lowest and the highest.

    Args:
      axis_name: the axis, or the axes, on which the workers lie.
      trim: share of the workers that is left out at either end; one value, or two, are always left.
      model_axis_name: as for `leader_pull`.
    """

    def locate(x: optax.Params, state: tuple) -> tuple[Target, tuple]:
        finite = all_finite(x, model_axis_name)
        count = total(finite.astype(jnp.int32), axis_name)
        most = int(trim * worker_count(axis_name) + 1e-9)  # 0.29 of 100 is 29.
        cut = jnp.minimum(most, (count - 1) // 2)

        def middle(x: Array) -> Array:
            if jnp.iscomplexobj(x):
                return lax.complex(middle(x.real), middle(x.imag))
            return _mean_between(gathered(jnp.where(finite, x, jnp.inf), axis_name), cut, count - cut)

        exists = count > 0
        return Target(jax.tree.map(middle, x), exists, exists), state

    return Attractor(lambda params: (), locate)


def gathered(x: Array, axis_name: AxisName) -> Array:
    """The arrays of all workers, with a further axis in front: one all-gather for each worker axis."""
    x = x[None]
    for name in reversed(axis_names(axis_name)):
        x = lax.all_gather(x, name, tiled=True)
    return x


def _mean_between(x: Array, first: Int[Array, ""], end: Int[Array, ""]) -> Array:
    """The mean over the first axis of the values with the ranks from the first to the one before the end.

    Ranks are counted, without sorting: XLA sorts along an axis far slower than it compares each two of a few workers.
    """
    place = jnp.arange(len(x)).reshape(-1, *[1] * x.ndim)
    one, other = x[:, None], x[None]
    follows = jnp.where(place > place.swapaxes(0, 1), one >= other, one > other)  # Equal values in their order.
    rank = follows.sum(1)
    return (jnp.where((rank >= first) & (rank < end), wide(x), 0).sum(0) / (end - first)).astype(x.dtype)


def one_count(arrays: int, workers: int) -> tuple[int, ...]:
    """The scalar that is all-reduced in an exchange: how many workers are finite."""
    return (1,)
