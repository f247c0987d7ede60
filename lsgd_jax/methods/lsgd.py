"""LSGD around any optimizer: the chain of Algorithm 1, with its options.

Teng et al., "Leader Stochastic Gradient Descent for Distributed Training of Deep Learning Models: Extension",
https://arxiv.org/abs/1905.10395; the algorithm itself is `lsgd_jax.leader`.
"""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

import jax
import numpy as np
import optax
from jaxtyping import Array

from lsgd_jax.checks import check_strengths, check_whole
from lsgd_jax.exchange import AxisName, BroadcastMethod, ShardSpecs, Wire, axis_names, own_entry, sending
from lsgd_jax.leader import leader_pull
from lsgd_jax.link import Pull, PullAt, chained
from lsgd_jax.methods.method import Level
from lsgd_jax.streaming import Election, Streaming
from lsgd_jax.variants import Delay, Revive, delayed, restarting, revive_from_leader, stale

PULL = 0.1
"""The paper's strength of either pull."""
GLOBAL = ("global_pull", "global_period", "global_stale_pull")
"""Options of exchanges among groups."""
POSTED = ("pull", "global_pull", "global_period", "window")
"""Options of workers at their own speed who take their leader from a board."""
JOINED = (*POSTED, "broadcast", "wire", "delay")
"""Options of workers at their own speed who meet to elect a leader, which is broadcast."""


def leader_sgd(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 4,
    pull: Pull = PULL,
    group_axis_name: AxisName | None = None,
    global_pull: Pull | None = None,
    global_period: int | None = None,
    window: int = 10,
    pull_at: PullAt = "after_step",
    stale_pull: Pull = 0.0,
    global_stale_pull: Pull = 0.0,
    broadcast: BroadcastMethod = "auto",
    wire: Wire | None = None,
    delay: Delay = 0,
    revive: Revive = "never",
    fragments: int | None = None,
    overlap: int | None = None,
    election: Election = "per_round",
    shard_specs: ShardSpecs | None = None,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LSGD with any optimizer and the paper's pulls: the optimizer, then a `leader_pull` for each level.

    A NaN in one worker's loss or parameters stays with that worker, who can't lead, or ends with its revival.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers of a group lie.
      period: updates between (local) exchanges.
      pull: strength of the pull towards the (local) leader, in [0, 1].
      group_axis_name: the axis, or the axes, on which the groups lie; None: one group, and nothing global.
      global_pull: strength of the pull towards the global leader, in [0, 1]; None: 0.1 if there are groups.
      global_period: updates between global exchanges, a multiple of `period`; None: 4 * period if there are groups.
      window: losses in the mean by which leaders are elected.
      pull_at: "after_step" pulls at the point after the worker's step, "before_step" at the point before it.
      stale_pull: strength of the pull towards the stored local leader, in [0, 1]; spread over the updates of a period.
      global_stale_pull: strength of the pull towards the stored global leader, in [0, 1]; spread over the updates of a
        global period.
      broadcast: how leaders are sent: "all_reduce" costs what an average costs, "ring" and "chain" towards half of it;
        "hierarchical" sends one copy between groups; "auto" chooses by size. All give the same bits.
      wire: number format in which leaders are sent: "bfloat16", "int8" differences to the last leader, or None for that
        of the parameters.
      delay: 1 applies each pull one exchange late, overlapping communication with compute.
      revive: "from_leader" restarts a worker whose loss or parameters are NaN or infinite from the leader at the next
        exchange; its optimizer state is then as at the start.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      election: of a leader sent in fragments, "per_round" for all of a period's fragments, or "per_fragment" for each.
      shard_specs: from what is exchanged to the PartitionSpecs of its arrays over `Auto` mesh axes, if a worker is
        itself spread over devices, as for `broadcast_from`.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread, as for `leader_pull`.

    Returns:
      A gradient transformation; `update(grads, state, params, value=loss)`, as for `leader_pull`. The state is a tuple:
      first the optimizer's, last the `LeaderPullState` of the leader of all, and that of the group's before it.

    Raises:
      ValueError: for an option out of range, and at `update` for missing params or value.
    """
    check_strengths(pull=pull, stale_pull=stale_pull, global_stale_pull=global_stale_pull)
    check_whole("period", period, "updates")
    if revive not in get_args(Revive):
        raise ValueError(f'revive must be "never" or "from_leader", got {revive!r}.')
    if revive == "from_leader" and (overlap or fragments not in (None, 1)):
        raise ValueError("a failed worker restarts from a whole leader: revive needs 1 fragment and no overlap.")
    way, put_off = sending(wire, broadcast, shard_specs), delayed(delay, overlap)
    streaming = Streaming(fragments, overlap, election)
    group_axes = () if group_axis_name is None else axis_names(group_axis_name)
    everyone = group_axes + axis_names(axis_name)

    def level(axes: tuple[str, ...], pull: Pull, period: int, stale_pull: Pull) -> optax.GradientTransformation:
        def own(pull: Pull, step: Any) -> Array:
            return own_entry(pull(step) if callable(pull) else pull, everyone)

        exchange = put_off
        if not isinstance(stale_pull, int | float) or stale_pull != 0:
            exchange = stale(lambda step: own(stale_pull, step) / period, exchange)
        if revive == "from_leader":
            exchange = restarting(exchange, model_axis_name)
        return leader_pull(
            lambda step: own(pull, step),
            axis_name=axes,
            period=period,
            window=window,
            pull_at=pull_at,
            sending=way,
            exchange=exchange,
            streaming=streaming,
            model_axis_name=model_axis_name,
        )

    pulls = [level(axis_names(axis_name), pull, period, stale_pull)]
    if group_axis_name is not None:
        global_pull = PULL if global_pull is None else global_pull
        check_strengths(global_pull=global_pull)
        global_period = default_global_period(period) if global_period is None else global_period
        check_whole("global_period", global_period, "updates")
        if global_period % period:
            raise ValueError(f"global_period must be a multiple of period, {period}, got {global_period}.")
        pulls.append(level(everyone, global_pull, global_period, global_stale_pull))
    elif global_period is not None or not _may_be_zero(global_pull) or not _may_be_zero(global_stale_pull):
        raise ValueError("global_pull, global_period and global_stale_pull need groups: pass group_axis_name too.")
    if revive == "from_leader":
        return revive_from_leader(optimizer, *pulls, axis_name=everyone, model_axis_name=model_axis_name)
    return chained(optimizer, *pulls, axis_name=everyone)


def default_global_period(period: int) -> int:
    """The paper's ratio: a global exchange with every fourth local one."""
    return 4 * period


def lsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float = 1e-4,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """LSGD with the settings of the paper's CIFAR-10 experiments: SGD with Nesterov momentum in `leader_sgd`.

    Args:
      learning_rate: a number or a schedule of the step, eta.
      axis_name: the axis, or the axes, on which the workers of a group lie.
      momentum: the coefficient of the worker's own momentum; None: plain SGD.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: added to the gradient, times the parameters, before the momentum.
      **options: the options of `leader_sgd`.

    Returns:
      A gradient transformation; `update(grads, state, params, value=loss)`, as for `leader_pull`.

    Raises:
      ValueError: as `leader_sgd` does.

    Example:
      >>> tx = lsgd(0.1, axis_name="worker", group_axis_name="group")
    """
    sgd = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov))
    return leader_sgd(sgd, axis_name=axis_name, **options)


# For `optax.inject_hyperparams`, which reads the names of what it injects; it can't look into **options.
_own, _all = (list(inspect.signature(function).parameters.values()) for function in (lsgd, leader_sgd))
lsgd.__signature__ = inspect.Signature(_own[:-1] + _all[2:])  # type: ignore[attr-defined]


def _may_be_zero(pull: Pull | None) -> bool:
    """Whether a pull is none, or 0, or, being traced, may be: `optax.inject_hyperparams` passes defaults as arrays."""
    return pull is None or isinstance(pull, jax.core.Tracer) or (not callable(pull) and not np.any(pull))


def derived_global(options: Mapping[str, Any], groups: int, workers: int) -> dict[str, Any]:
    """The options of exchanges among groups, which by default are the paper's."""
    if groups == 1:
        return {}
    pull, period = options["global_pull"], options["global_period"]
    return {
        "global_pull": PULL if pull is None else pull,
        "global_period": default_global_period(options["period"]) if period is None else period,
    }


def levels(options: Mapping[str, Any], groups: int, workers: int) -> list[Level]:
    """Exchanges in each group and, if there are several, among all workers."""
    in_group = Level(workers, options["period"], {"pull": options["pull"]})
    if groups == 1:
        return [in_group]
    return [in_group, Level(groups * workers, options["global_period"], {"pull": options["global_pull"]})]


def periods(every: int, groups: int) -> dict[str, int]:
    """The periods with which all workers exchange every so many steps, and those of a group four times as often."""
    if groups == 1:
        return {"period": every}
    return {"period": max(every // default_global_period(1), 1), "global_period": every}
