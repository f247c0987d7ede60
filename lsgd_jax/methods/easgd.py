r"""Elastic averaging SGD: workers and a center variable pull each other.

Every `period` updates worker i and the center c move, from the same values,

.. math:: x^i \leftarrow x^i - \alpha (x^i - c), \qquad c \leftarrow c + \beta (\bar x - c).

With Nesterov momentum in the worker's optimizer it is EAMSGD.

Zhang, Choromanska, LeCun, "Deep learning with Elastic Averaging SGD", https://arxiv.org/abs/1412.6651.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lsgd_jax.checks import check_strengths, is_unknown
from lsgd_jax.exchange import AxisName, mean, worker_count
from lsgd_jax.link import Attractor, PullAt, Target, chained
from lsgd_jax.methods.base import Center, center_of_start, common, difference, moved_to, scaled, shared_center
from lsgd_jax.methods.method import Meeting
from lsgd_jax.streaming import Streaming, streamed


def easgd(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    pull: float | None = None,
    center_pull: float | None = None,
    pull_at: PullAt = "after_step",
    fragments: int | None = None,
    overlap: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Elastic averaging SGD.

    The center starts at the mean of the starts. A NaN in one worker's parameters reaches the center at the next
    exchange and all workers at the one after that; a NaN loss has no effect.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      pull: strength alpha of the workers' pull towards the center, in [0, 1]; None: center_pull / workers, so that
        forces are symmetric.
      center_pull: strength beta of the center's pull towards the mean, in [0, 1]; None: workers * pull likewise, or
        0.9^8, the paper's choice, if there is no pull either.
      pull_at: "after_step" pulls at the point after the worker's step, "before_step" at the point before it.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.

    Raises:
      ValueError: if an option is out of range; at `update`, if workers * pull is more than 1 where it stands for
        center_pull.
    """
    check_strengths(pull=0 if pull is None else pull, center_pull=0 if center_pull is None else center_pull)

    def locate(x: optax.Params, state: Center) -> tuple[Target, Center]:
        _, beta = strengths(pull, center_pull, worker_count(axis_name))
        center = common(state, axis_name)
        towards_mean = difference(mean(x, axis_name), center)
        new_center = jax.tree.map(lambda c, d: c + d, center, scaled(beta, towards_mean))
        return Target(center), moved_to(new_center, state)

    def alpha(step: Any) -> float:
        return strengths(pull, center_pull, worker_count(axis_name))[0]

    attractor, streaming = Attractor(center_of_start, locate), Streaming(fragments, overlap)
    moving = streamed(attractor, alpha, streaming, axis_name=axis_name, period=period, pull_at=pull_at)
    return chained(optimizer, moving, axis_name=axis_name)


def strengths(pull: float | None, center_pull: float | None, workers: int) -> tuple[float, float]:
    """The strengths alpha of the workers' pull and beta of the center's, where one follows from the other.

    Args:
      pull: as for `easgd`.
      center_pull: as for `easgd`.
      workers: how many there are.

    Raises:
      ValueError: if workers * pull is more than 1 where it stands for center_pull.
    """
    beta = center_pull
    if beta is None:
        beta = 0.9**8 if pull is None else workers * pull
    if not is_unknown(beta) and beta > 1:
        raise ValueError(f"workers * pull must be at most 1, got {workers} * {pull}: give center_pull, too.")
    return beta / workers if pull is None else pull, beta


def derived_strengths(options: Mapping[str, Any], groups: int, workers: int) -> dict[str, Any]:
    """The strengths with which these options of `easgd` train so many groups of workers, by the options' names."""
    pull, center_pull = strengths(options["pull"], options["center_pull"], groups * workers)
    return {"pull": pull, "center_pull": center_pull}


def meet_center(
    x: optax.Params, center: optax.Params, pull: float, center_pull: float
) -> tuple[optax.Params, optax.Params]:
    r"""One worker's exchange with the center on its own clock, as the paper's asynchronous algorithm has it.

    .. math:: x \leftarrow x - \alpha (x - c), \qquad c \leftarrow c + \beta (x - c),

    both from the same values.

    Args:
      x: the worker's point.
      center: the center, c.
      pull: alpha.
      center_pull: beta; as in the paper alpha for symmetric forces, or a share 1 / workers of the synchronous beta.

    Returns:
      The worker's new point and the new center.

    Example:
      >>> x, c = meet_center(1.0, 0.0, 0.25, 0.5)
      >>> print(x, c)
      0.75 0.5
    """
    apart = difference(x, center)
    return (
        optax.apply_updates(x, scaled(-pull, apart)),
        optax.apply_updates(center, scaled(center_pull, apart)),
    )


def meeting(options: Mapping[str, Any], workers: int) -> Meeting:
    """`meet_center` with these options of `easgd`, as one of so many workers does it."""
    pull, center_pull = options["pull"], options["center_pull"] / workers
    return lambda x, center, last_center: meet_center(x, center, pull, center_pull)


def center(params: optax.Params, state: Any, axis_name: AxisName) -> Any:
    """The center variable."""
    return shared_center(params, state, axis_name)
