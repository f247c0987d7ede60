r"""Quorum averaging: the workers whose scores are near the lowest are averaged, and all go on from there.

At an exchange, a worker is eligible with a finite score and finite parameters. Of the eligible workers' scores
:math:`s^i`, let :math:`s_{\min}` be the lowest and :math:`s_{\mathrm{med}}` the median (of an even number, the upper
one). The quorum and its average are

.. math:: Q = \{i : s^i \le s_{\min} + \kappa (s_{\mathrm{med}} - s_{\min})\}, \qquad
    A = \frac{1}{|Q|} \sum_{i \in Q} x^i.

An outer step with Nesterov momentum moves the center c towards A, and every worker is pulled towards c:

.. math:: v \leftarrow \mu v + (A - c), \qquad c \leftarrow c + \eta (A - c + \mu v), \qquad
    x^i \leftarrow x^i - \text{pull} \, (x^i - c).

So three numbers span a family. With :math:`\kappa = 0` a leader is all there is of the quorum, and without an outer
step (:math:`\mu = 0, \eta = 1`) that is LSGD, to the bit unless two scores are equal: of these LSGD takes the first
worker, the quorum both. With :math:`\kappa = \infty` all eligible workers are averaged: local SGD, or DiLoCo with an
outer step.

The parts are made to be put together otherwise: `quorum_of` is an attractor for any `lsgd_jax.streaming.streamed` link,
and `lsgd_jax.methods.base.outer_step` takes any optimizer of optax for the outer one.

    center = outer_step(quorum_of(axis_name="worker"), optax.adam(0.01), axis_name="worker")
    optax.chain(optax.sgd(0.1), scored(streamed(center, 1.0, WHOLE, axis_name="worker", period=16), window=10))
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lsgd_jax.checks import check_not_negative, check_positive, check_strengths, check_whole
from lsgd_jax.exchange import NOBODY, AxisName, Members, all_finite, axis_names, elect_quorum, mean, rounded_mean
from lsgd_jax.exchange.trees import distance, merged, scalar_like, select
from lsgd_jax.link import Attractor, PullAt, Target, chained, parts
from lsgd_jax.methods.base import center_of_start, common, mean_of_workers, moved_to, outer_step
from lsgd_jax.methods.lsgd import default_global_period
from lsgd_jax.methods.method import Level
from lsgd_jax.scores import CommonLoss, LeaderState, scored
from lsgd_jax.streaming import Election, Streaming, streamed
from lsgd_jax.variants import Delay, Revive, delayed, restarting, revive_from_leader

KAPPA = 3.0
"""Width of the quorum: it was chosen once, and has not been tuned."""
GLOBAL = ("global_pull", "global_period")
"""Options of exchanges among groups."""


def quorum(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    kappa: float = KAPPA,
    pull: float = 1.0,
    outer_learning_rate: float = 1.0,
    outer_momentum: float = 0.3,
    group_axis_name: AxisName | None = None,
    global_pull: float | None = None,
    global_period: int | None = None,
    window: int = 10,
    pull_at: PullAt = "after_step",
    wire: Literal["bfloat16"] | None = None,
    delay: Delay = 0,
    revive: Revive = "never",
    fragments: int | None = None,
    overlap: int | None = None,
    election: Election = "per_round",
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Quorum averaging.

    With groups, each group is pulled towards the plain average of its quorum, and the outer step is taken in exchanges
    among all. A NaN in one worker's loss or parameters stays with that worker, who is in no quorum, or ends with its
    revival.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers of a group lie.
      period: updates between (local) exchanges.
      kappa: width of the quorum, at least 0: how far above the lowest score a member's may be, in units of how far the
        median is above it. 0: the best worker alone; inf: all workers.
      pull: strength of the pull towards the center or, in a group, the average, in [0, 1].
      outer_learning_rate: learning rate of the outer step.
      outer_momentum: Nesterov momentum of the outer step, in [0, 1]. With 0, and a learning rate of 1, there is no
        outer step: workers are pulled towards the average itself.
      group_axis_name: the axis, or the axes, on which the groups lie; None: one group, and nothing global.
      global_pull: strength of the pull towards the center of all, in [0, 1]; None: that of `pull` if there are groups.
      global_period: updates between global exchanges, a multiple of `period`; None: 4 * period if there are groups.
      window: losses in the mean by which the quorum is chosen.
      pull_at: "after_step" pulls at the point after the worker's step, "before_step" at the point before it.
      wire: number format in which averages are sent: "bfloat16" differences to the last one, at first to that of the
        starts, or None for that of the parameters.
      delay: 1 applies each pull one exchange late, overlapping communication with compute.
      revive: "from_leader" restarts a worker whose loss or parameters are NaN or infinite from the center at the next
        exchange; its optimizer state is then as at the start.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      election: of a quorum sent in fragments, "per_round" for all of a period's fragments, or "per_fragment" for each.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread, as for `leader_pull`.

    Returns:
      A gradient transformation; `update(grads, state, params, value=loss)`, as for `leader_pull`.

    Raises:
      ValueError: for an option out of range, and at `update` for missing params or value.
    """
    check_positive(outer_learning_rate=outer_learning_rate)
    check_strengths(pull=pull, outer_momentum=outer_momentum)
    check_whole("period", period, "updates")
    if revive not in get_args(Revive):
        raise ValueError(f'revive must be "never" or "from_leader", got {revive!r}.')
    if revive == "from_leader" and (overlap or fragments not in (None, 1)):
        raise ValueError("a failed worker restarts from a whole center: revive needs 1 fragment and no overlap.")
    streaming, exchange = Streaming(fragments, overlap, election), delayed(delay, overlap)
    if revive == "from_leader":
        exchange = restarting(exchange, model_axis_name)
    workers, groups = axis_names(axis_name), () if group_axis_name is None else axis_names(group_axis_name)
    everyone = groups + workers

    def level(attractor: Attractor, axes: tuple[str, ...], pull: float, period: int) -> optax.GradientTransformation:
        moving = streamed(attractor, pull, streaming, axis_name=axes, period=period, pull_at=pull_at, exchange=exchange)
        return scored(moving, window)

    center = quorum_of(everyone, kappa, wire=wire, model_axis_name=model_axis_name)
    if has_outer_step(outer_learning_rate, outer_momentum):
        center = outer_step(center, optax.sgd(outer_learning_rate, outer_momentum, nesterov=True), everyone)
    if groups:
        global_pull = pull if global_pull is None else global_pull
        check_strengths(global_pull=global_pull)
        global_period = default_global_period(period) if global_period is None else global_period
        check_whole("global_period", global_period, "updates")
        if global_period % period:
            raise ValueError(f"global_period must be a multiple of period, {period}, got {global_period}.")
        of_group = quorum_of(workers, kappa, wire=wire, model_axis_name=model_axis_name)
        pulls = [level(of_group, workers, pull, period), level(center, everyone, global_pull, global_period)]
    elif global_pull is not None or global_period is not None:
        raise ValueError("global_pull and global_period need groups: pass group_axis_name too.")
    else:
        pulls = [level(center, everyone, pull, period)]
    if revive == "from_leader":
        return revive_from_leader(optimizer, *pulls, axis_name=everyone, model_axis_name=model_axis_name)
    return chained(optimizer, *pulls, axis_name=everyone)


def quorum_of(
    axis_name: AxisName,
    kappa: float = KAPPA,
    *,
    wire: Literal["bfloat16"] | None = None,
    model_axis_name: AxisName | None = None,
) -> Attractor:
    """The attractor that is the average of the workers in the quorum, for a link that is told the signal `score`.

    An exchange is two all-reduces: one of a score for each worker, and one of the parameters, zero on all who are not
    in the quorum.

    Args:
      axis_name: the axis, or the axes, on which the workers lie.
      kappa: width of the quorum, as for `quorum`.
      wire: number format in which the average is sent, as for `quorum`.
      model_axis_name: as for `leader_pull`.

    Raises:
      ValueError: if an option is out of range.
    """
    check_not_negative(kappa=kappa)
    if wire not in (None, "bfloat16"):
        raise ValueError(f'the wire of an average must be None or "bfloat16", got {wire!r}.')

    def init(params: optax.Params) -> LeaderState:
        nobody, gap = scalar_like(params, NOBODY, jnp.int32), scalar_like(params, 0, float)
        count = scalar_like(params, 0, jnp.int32)
        return LeaderState(nobody, scalar_like(params, False, bool), gap, (count, center_of_start(params)))

    def choose(
        x: optax.Params,
        state: LeaderState,
        *,
        score: Array,
        able: Any = True,
        before: Any = None,
        common_loss: CommonLoss | None = None,
        **signals: Any,
    ) -> LeaderState:
        score = score if common_loss is None else common_loss(x)
        # Of parameters sent in fragments, the quorum of the first one sends the rest: whoever of it still can.
        belonged, width = (True, kappa) if before is None else (parts(LeaderState, before)[0].leads, math.inf)
        eligible = all_finite(x, model_axis_name) & able & belonged
        first, members = elect_quorum(score, axis_name, width, eligible=eligible)
        return state._replace(position=first, leads=members.includes, sent=(members.number, state.sent[1]))

    def locate(x: optax.Params, state: LeaderState) -> tuple[Target, LeaderState]:
        (count, last), somebody = state.sent, state.position != NOBODY
        members = Members(state.leads, count)
        if wire is None:
            average = mean(x, axis_name, members)
        else:
            average = rounded_mean(x, common(last, axis_name), axis_name, members)
        gap = jnp.where(somebody, distance(x, average, model_axis_name), 0).astype(state.distance.dtype)
        kept = select(somebody, moved_to(average, last), last)
        return Target(average, somebody, somebody), state._replace(distance=gap, sent=(count, kept))

    return Attractor(init, locate, choose)


def has_outer_step(learning_rate: Any, momentum: Any) -> bool:
    """Whether there is an outer step, by which a center moves to another point than the average."""
    known = isinstance(learning_rate, int | float) and isinstance(momentum, int | float)  # They may be traced.
    return not (known and learning_rate == 1 and momentum == 0)


def own_average(params: optax.Params, state: Any) -> optax.Params:
    """A worker's copy of the last quorum's average; what is not exchanged is the worker's own."""
    averages = (each.sent[1].x for each in parts(LeaderState, state[-1]))  # One for each fragment.
    return merged(functools.reduce(merged, averages), params)


def center(params: optax.Params, state: Any, axis_name: AxisName, model_axis_name: AxisName | None = None) -> Any:
    """The average of the last quorum of all workers; before the first exchange, the mean of the starts."""
    averages = (each.sent[1].x for each in parts(LeaderState, state[-1]))
    average = mean(functools.reduce(merged, averages), axis_name)
    return merged(average, mean_of_workers(params, state, axis_name, model_axis_name))


def scores(arrays: int, workers: int) -> tuple[int, ...]:
    """The numbers in each all-reduce of scalars: the scores of all workers in one."""
    return (workers,)


def averages_start(options: Mapping[str, Any], among_all: bool) -> int:
    """How often the first exchange averages the starts: for the center, and for what differences are sent to."""
    has_center = among_all and has_outer_step(options["outer_learning_rate"], options["outer_momentum"])
    return has_center + (options.get("wire") is not None)


def derived_global(options: Mapping[str, Any], groups: int, workers: int) -> dict[str, Any]:
    """The options of exchanges among groups: by default those of a group, every fourth time."""
    if groups == 1:
        return {}
    pull, period = options["global_pull"], options["global_period"]
    return {
        "global_pull": options["pull"] if pull is None else pull,
        "global_period": default_global_period(options["period"]) if period is None else period,
    }


def levels(options: Mapping[str, Any], groups: int, workers: int) -> list[Level]:
    """Exchanges in each group, without an outer step, and among all workers."""
    own = {name: options[name] for name in ("kappa", "pull", "outer_learning_rate", "outer_momentum")}
    if groups == 1:
        return [Level(workers, options["period"], own)]
    in_group = own | {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    among_all = own | {"pull": options["global_pull"]}
    return [
        Level(workers, options["period"], in_group),
        Level(groups * workers, options["global_period"], among_all),
    ]
