"""Leader stochastic gradient descent (LSGD): the algorithm, to be read beside the paper.

Teng, Gao, Chalus, Choromanska, Goldfarb, Weller, "Leader Stochastic Gradient Descent for Distributed Training of Deep
Learning Models: Extension", https://arxiv.org/abs/1905.10395.

Each of the l workers in each of n groups holds parameters x, which minimise jointly (eq. 1)

    sum over workers of  E f(x)  +  lambda/2 ||x - x~^j||^2  +  lambda_G/2 ||x - x~||^2,

x~^j the best worker of the group j (the local leader), x~ the best of all (the global leader). The stochastic gradient
of that sum, with the leaders held fixed, is the update (eq. 2)

    x  <-  x - eta g(x) - pull (x - x~^j) - global_pull (x - x~).

Algorithm 1 takes it apart: a worker steps on its own, x <- x - eta g(x); every `period` steps it is pulled towards its
local leader, x <- x - pull (x - x~^j), and every `global_period` steps then towards the global one.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from lsgd_jax.checks import check_static, check_strengths, check_whole, check_window
from lsgd_jax.exchange import (
    NOBODY,
    AxisName,
    BroadcastMethod,
    Wire,
    all_finite,
    axis_names,
    broadcast_rounded,
    check_broadcast,
    elect,
    own_entry,
    when,
    worker_index,
)
from lsgd_jax.trees import (
    check_updates,
    distance,
    exchanged_with,
    inexact,
    like,
    merged,
    moved,
    norm,
    promoted,
    scalar_like,
    select,
    towards,
)

Revive: TypeAlias = Literal["never", "from_leader"]
"""What becomes of a worker whose score or parameters are not finite."""
Pull: TypeAlias = chex.Numeric | Callable[[chex.Numeric], chex.Numeric]
"""A strength in [0, 1], a schedule of the step, or an array with the shape of the worker axes."""
PULL = 0.1
"""The paper's strength of either pull."""
ARRIVED = 0.01
"""How far from its leader, relative to the leader's norm, a worker may be after a revival."""
MISSING_PARAMS = "leader_pull moves parameters: pass them, update(updates, state, params, value=loss)."


class LeaderState(NamedTuple):
    """What a worker knows of its local leader, or of the global one."""

    position: Int[Array, ""]
    """The last leader's position among the workers who elected it; `NOBODY` before the first exchange, or if the
    last exchange found no worker that could lead."""
    distance: Float[Array, ""]
    """||x - leader|| at the last exchange, before the pull; 0 if nobody led. With a delay, of the pull that came then,
    which is that of the exchange before."""
    exchanges: Int[Array, ""]
    """How many exchanges there have been."""
    stored: optax.Params | None
    """The last leader's parameters as they were received: what a stale pull draws to, and the reconstruction to which
    an int8 wire sends the difference, the same on all workers. Zeros before the first; None if neither needs it."""
    has_stored: Bool[Array, ""]
    """Whether a leader has been stored yet."""
    waiting: optax.Params | None
    """With a delay, the worker's own parameters at the last exchange, whose pull is still to come; otherwise None."""


class LeaderPullState(NamedTuple):
    """The state of `leader_pull`: one worker's, without a worker axis."""

    step: Int[Array, ""]
    """Updates so far."""
    losses: Float[Array, " window"]
    """The last losses, the newest at the end; zeros in front as long as there have been fewer."""
    seen: Int[Array, ""]
    """How many losses there have been: updates so far or, after a revival, since then."""
    score: Float[Array, ""]
    """The mean of the losses seen, which elections compare; infinite before the first."""
    revived: Bool[Array, ""]
    """Whether the last update has revived the worker."""
    failed: Bool[Array, ""] | None
    """Whether the worker has failed and waits for its revival; None if workers are not revived."""
    overwritten: optax.Params | None
    """Where the last update is the leader's value and not a difference, since the worker's own is not finite, for
    `apply_updates`: bools in the shapes of what is exchanged; None if workers are not revived."""
    leaders: tuple[LeaderState, ...]
    """The leader of the worker's group and, where there are groups, the global leader: `leaders[-1]` leads all."""


class _Level(NamedTuple):
    """Among whom a leader is elected, how often, and how strongly it pulls."""

    axis_names: tuple[str, ...]
    period: int
    pull: Pull
    stale_pull: Pull

    @property
    def has_stale_pull(self) -> bool:
        return not isinstance(self.stale_pull, int | float) or self.stale_pull != 0


def leader_pull(
    pull: Pull,
    *,
    axis_name: AxisName,
    period: int = 1,
    group_axis_name: AxisName | None = None,
    global_pull: Pull = 0.0,
    global_period: int | None = None,
    window: int = 10,
    pull_at: Literal["after_step", "before_step"] = "after_step",
    stale_pull: Pull = 0.0,
    global_stale_pull: Pull = 0.0,
    broadcast: BroadcastMethod = "auto",
    wire: Wire | None = None,
    delay: Literal[0, 1] = 0,
    revive: Revive = "never",
) -> optax.GradientTransformationExtraArgs:
    r"""Pull every worker towards the leader, the worker whose recent training loss is lowest (Algorithm 1).

    The last link of an optax chain: the links before it make the worker's own step, :math:`x' = x + u`. On the updates
    number `period`, 2 `period`, ... the workers exchange. The one with the lowest score leads, its parameters
    :math:`\tilde x` are broadcast, and every worker moves to

    .. math:: x' - pull \, (x' - \tilde x).

    With groups, the leader is each group's own; on the updates number `global_period`, 2 `global_period`, ... the
    points that leave this pull are pulled likewise, by `global_pull`, towards the leader of all workers.

    - The score is the mean of the last `window` losses passed as `value`, or of all as long as there are fewer.
    - A worker can lead if its score and all its outgoing parameters are finite; ties go to the lowest position. If no
      worker can, nobody is pulled.
    - A leader is not moved by its own pull, to the bit. A pull of 1 is a consensus up to rounding, since
      optax applies updates by adding them.
    - A worker may be spread over further mesh axes, as a sharded model is. Where these are `Auto` axes, as for GSPMD,
      or `Explicit` ones, nothing changes. Where they are manual as well, each device is judged finite, and its distance
      taken, by its own piece, which is wrong; workers can't be revived then.
    - Arrays of floats and complex numbers are exchanged; integers, booleans and PRNG keys are left alone. Parameters of
      16 bits move by stochastic rounding, since a pull by less than half their last place would be lost.
    - Only parameters are exchanged: momentum and other optimizer state stay the worker's own.

    `update` sees one worker, inside `jax.shard_map`, `jax.pmap` or `jax.vmap(..., axis_name=...)`. Whether an exchange
    is due must be the same on all workers, or they wait for each other for ever: wrappers that skip updates for some
    workers only (`optax.apply_if_finite`) go inside the chain, around the worker's optimizer, and never around
    `leader_pull`.

    Args:
      pull: strength of the pull towards the (local) leader, dimensionless, in [0, 1]: a number, a schedule of the step,
        or an array with the shape of the worker axes, groups first, of which each worker takes its own entry. To change
        it during a run, `optax.inject_hyperparams(leader_pull, static_args=...)`, with `period`, `global_period`,
        `window` and `delay` static and, unless they are used, the stale pulls.
        In the objective form of eq. 1 it is the learning rate times lambda.
      axis_name: the axis, or the axes, on which the workers of a group lie.
      period: updates between (local) exchanges, tau.
      group_axis_name: the axis, or the axes, on which the groups lie; None: one group, one leader.
      global_pull: strength of the pull towards the global leader, like `pull`.
      global_period: updates between global exchanges, tau_G, a multiple of `period`; None: every `period`.
      window: losses in a score (10 in the paper for CIFAR-10, 64 for ImageNet).
      pull_at: "after_step" pulls at the point after the worker's step, as Algorithm 1 does; "before_step" takes
        eq. 2 literally, both pulls at :math:`x`.
      stale_pull: between exchanges, pull by `stale_pull` / `period` on every update, before the exchange if one is due,
        towards a stored copy of the last (local) leader. An option of the authors' code. A Python 0 stores no copy.
      global_stale_pull: the same towards the global leader, by `global_stale_pull` / `global_period`.
      broadcast: how leaders are sent, the `method` of `broadcast_from`; all move workers to the same bits.
      wire: in what numbers leaders are sent, as `broadcast_rounded` tells: None for those of the parameters, "bfloat16"
        for half the bytes of float32, "int8" for a quarter, as differences to the last leader that was received, of
        which every group and all together keep one of their own.
      delay: 1 puts off each pull to the next exchange: then x moves by :math:`-pull \, (x_k - \tilde x_k)`, the worker
        and its leader as they were at the end of the last exchange k. The worker that led that exchange is not moved.
        What is sent is known a period before it is needed, so that a compiler may send it while the workers compute,
        where period and exchange are one straight program.
      revive: "from_leader" restarts a worker that has failed from the leader at the next exchange that has one. A
        worker fails if its step would make its parameters NaN or infinite, which it then does not take, nor any other
        until its revival, or if its score is not finite when an exchange is due. A revived worker's losses are
        forgotten, and it can't lead before its window is full again. The link can't reset the optimizer before it in a
        chain, whose momentum may be NaN: `leader_sgd` does. The update of a revived worker is its difference to the
        leader, which whatever adds updates applies, up to the rounding of the parameters it had. Parameters that are
        not finite all the same, such as a NaN at the start, stay so under addition: `apply_updates` of this module sets
        them.

    Returns:
      A gradient transformation. `update(updates, state, params, value=loss)` needs the params and the worker's scalar
      training loss that came with the gradients. It takes an optional `step`, the number of updates made before this
      one, by which exchanges and schedules are timed instead of by the state's own count: given unbatched, it lets
      `jax.vmap` keep a branch that exchanges only when due. The state, `LeaderPullState`, holds the diagnostics.

    Raises:
      ValueError: for an option out of range here, and at `update` for missing params or value.
      NameError: at `update`, if an axis is not bound there.

    Example:
      Four workers on f(x) = x^2, the one at 1 in the lead.

      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.25), leader_pull(0.5, axis_name="worker"))
      >>> def step(x, state):
      ...     value, grad = jax.value_and_grad(lambda x: x**2)(x)
      ...     updates, state = tx.update(grad, state, x, value=value)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.array([4.0, 1.0, -2.0, 2.0])
      >>> x, (_, state) = jax.vmap(step, axis_name="worker")(x, jax.vmap(tx.init)(x))
      >>> print(x, state.leaders[0].position)
      [ 1.25  0.5  -0.25  0.75] [1 1 1 1]
    """
    check_strengths(pull=pull, global_pull=global_pull, stale_pull=stale_pull, global_stale_pull=global_stale_pull)
    if pull_at not in ("after_step", "before_step"):
        raise ValueError(f'pull_at must be "after_step" or "before_step", got {pull_at!r}.')
    check_broadcast(broadcast)
    if wire not in (None, *get_args(Wire)):
        raise ValueError(f'wire must be None, "bfloat16" or "int8", got {wire!r}.')
    check_static("delay", delay)
    if delay not in (0, 1):
        raise ValueError(f"delay must be 0 or 1, got {delay!r}.")
    if revive not in get_args(Revive):
        raise ValueError(f'revive must be "never" or "from_leader", got {revive!r}.')
    check_whole("period", period, "updates")
    check_window(window)
    levels = [_Level(axis_names(axis_name), period, pull, stale_pull)]
    if group_axis_name is not None:
        global_period = period if global_period is None else global_period
        check_whole("global_period", global_period, "updates")
        if global_period % period:
            raise ValueError(f"global_period must be a multiple of period, {period}, got {global_period}.")
        everyone = axis_names(group_axis_name) + axis_names(axis_name)
        levels.append(_Level(everyone, global_period, global_pull, global_stale_pull))
    elif global_period is not None or not _may_be_zero(global_pull) or not _may_be_zero(global_stale_pull):
        raise ValueError("global_pull, global_period and global_stale_pull need groups: pass group_axis_name too.")
    worker_axes = levels[-1].axis_names
    if len(set(worker_axes)) < len(worker_axes):
        raise ValueError(f"the axes of workers and groups must have different names, got {worker_axes}.")

    revives = revive == "from_leader"

    def init(params: optax.Params) -> LeaderPullState:
        params = inexact(params)
        leaders = tuple(
            _unknown_leader(params, worker_axes, stores=level.has_stale_pull or wire == "int8", waits=delay == 1)
            for level in levels
        )
        losses, score = init_losses(window, params, worker_axes)
        seen, false = (scalar_like(params, 0, dtype, worker_axes) for dtype in (jnp.int32, bool))
        overwritten = jax.tree.map(lambda x: jnp.zeros_like(x, bool), params) if revives else None
        return LeaderPullState(
            step=jnp.zeros((), jnp.int32),
            losses=losses,
            seen=seen,
            score=score,
            revived=false,
            failed=false if revives else None,
            overwritten=overwritten,
            leaders=leaders,
        )

    def update(
        updates: optax.Updates,
        state: LeaderPullState,
        params: optax.Params | None = None,
        *,
        value: Float[Array, ""] | None = None,
        step: Int[Array, ""] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LeaderPullState]:
        del extra_args  # Other links of the chain may want them.
        if params is None:
            raise ValueError(MISSING_PARAMS)
        all_updates, params = updates, inexact(params)
        check_updates(updates, params)
        updates = promoted(like(params, updates), params)
        losses, score = record_loss(state.losses, value, state.seen)
        step = state.step if step is None else step

        def point(updates: optax.Updates, revived: Bool[Array, ""]) -> optax.Params:
            if pull_at == "before_step" and not revives:
                return params
            landing = optax.apply_updates(params, updates)
            if not revives:
                return landing
            x = select(revived, landing, params) if pull_at == "before_step" else landing
            return _overwrite(x, updates, _overwritten(params, revived))

        def strength(pull: Pull) -> Float[Array, ""]:
            return own_entry(pull(step) if callable(pull) else pull, worker_axes)

        revived = jnp.zeros_like(state.revived)
        for level, leader in zip(levels, state.leaders, strict=True):
            if level.has_stale_pull:
                stale = strength(level.stale_pull) / level.period
                x = point(updates, revived)
                updates = pulled(updates, params, x, leader.stored, stale, leader.has_stored, step)
        able, failed = ~revived, revived
        if state.failed is not None:
            failed = state.failed | ~all_finite(optax.apply_updates(params, updates))
            updates = select(failed, jax.tree.map(jnp.zeros_like, updates), updates)
            # A window is as full as it can be if the worker has never been revived.
            able = ~failed & ((state.seen == state.step) | (optax.safe_increment(state.seen) >= window))

        def elected(x: optax.Params, revived: Bool[Array, ""], level: _Level) -> Int[Array, ""]:
            return elect(score, level.axis_names, eligible=all_finite(x) & able & ~revived)

        def exchange(level: _Level, before: tuple[optax.Updates, Array, Array, LeaderState]) -> tuple:
            updates, failed, revived, leader = before
            x = now = point(updates, revived)
            if delay:
                position, leader_x = leader.position, leader.waiting
                x = select(revived, now, leader.waiting)
            else:
                position, leader_x = elected(now, revived, level), now
            leader_x = broadcast_rounded(
                leader_x, position, level.axis_names, wire=wire, last=leader.stored, method=broadcast
            )
            follows = (position != NOBODY) & (position != worker_index(level.axis_names))
            updates = pulled(updates, params, x, leader_x, strength(level.pull), follows, step)
            leader = _met(leader, position, leader_x, x)
            if revives:
                restarts = (position != NOBODY) & ~revived & (failed | ~jnp.isfinite(score) | ~all_finite(now))
                updates = select(restarts, _arrival(leader_x, params), updates)
                # From very far away the difference to the leader is rounded too coarsely: once more, from nearer by.
                arrived = distance(point(updates, restarts), leader_x) <= ARRIVED * norm(leader_x)
                failed, revived = failed | restarts, revived | (restarts & arrived)
            if delay:
                x = point(updates, revived)
                leader = leader._replace(position=elected(x, revived, level), waiting=x)
            return updates, failed, revived, leader

        leaders = []
        for level, leader in zip(levels, state.leaders, strict=True):
            due = (step + 1) % level.period == 0
            before = (updates, failed, revived, leader)
            updates, failed, revived, leader = when(due, partial(exchange, level), before, worker_axes)
            leaders.append(leader)
        if revives and delay:  # A revived worker is pulled from where it is now; who leads is pulled to where it was.
            x = point(updates, revived)
            leaders = [
                leader._replace(
                    waiting=select(revived & (leader.position != worker_index(level.axis_names)), x, leader.waiting)
                )
                for level, leader in zip(levels, leaders, strict=True)
            ]
        state = state._replace(
            step=optax.safe_increment(state.step),
            losses=losses,
            seen=optax.safe_increment(state.seen),
            score=score,
            revived=revived,
            leaders=tuple(leaders),
        )
        if revives:
            state = _forgotten(state._replace(failed=failed & ~revived), params)
        return merged(updates, all_updates), state

    return optax.GradientTransformationExtraArgs(init, update)


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
    pull_at: Literal["after_step", "before_step"] = "after_step",
    stale_pull: Pull = 0.0,
    global_stale_pull: Pull = 0.0,
    broadcast: BroadcastMethod = "auto",
    wire: Wire | None = None,
    delay: Literal[0, 1] = 0,
    revive: Revive = "never",
) -> optax.GradientTransformationExtraArgs:
    """LSGD with any optimizer and the paper's pulls: the optimizer, then `leader_pull`.

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
        exchange, with an optimizer state as at the start.

    Raises:
      ValueError: as `leader_pull` does.
    """
    if global_pull is None:
        global_pull = 0.0 if group_axis_name is None else PULL
    if global_period is None and group_axis_name is not None:
        global_period = default_global_period(period)
    pulls = leader_pull(
        pull,
        axis_name=axis_name,
        period=period,
        group_axis_name=group_axis_name,
        global_pull=global_pull,
        global_period=global_period,
        window=window,
        pull_at=pull_at,
        stale_pull=stale_pull,
        global_stale_pull=global_stale_pull,
        broadcast=broadcast,
        wire=wire,
        delay=delay,
        revive=revive,
    )
    axes = axis_names(axis_name) if group_axis_name is None else axis_names(group_axis_name) + axis_names(axis_name)
    return _chained(optimizer, pulls, axes)


def apply_updates(params: optax.Params, updates: optax.Updates, state: optax.OptState) -> optax.Params:
    """What `optax.apply_updates` does, but a revived worker's parameters that were not finite are set to the leader's.

    Args:
      params: one worker's; no worker axis.
      updates: for them.
      state: the optimizer's that `update` returned with the updates, with any number of `LeaderPullState` in it.
    """
    x = optax.apply_updates(params, updates)
    for link in links(state):
        there = link.overwritten
        if there is not None:
            x = merged(_overwrite(like(there, x), like(there, updates), there), x)
    return x


def has_failed(params: optax.Params, state: optax.OptState) -> Bool[Array, ""]:
    """Whether a worker's parameters are not all finite, or it waits for its revival; no collective.

    Args:
      params: one worker's; no worker axis.
      state: the optimizer's, with any number of `LeaderPullState` in it.
    """
    failed = ~all_finite(params)
    for link in links(state):
        failed |= False if link.failed is None else link.failed
    return failed


def links(state: optax.OptState) -> list[LeaderPullState]:
    """The states of all `leader_pull` in an optimizer's state."""
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, LeaderPullState))
    return [part for part in parts if isinstance(part, LeaderPullState)]


def _chained(
    optimizer: optax.GradientTransformation,
    pulls: optax.GradientTransformationExtraArgs,
    worker_axes: tuple[str, ...],
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, but only what the optimizer trains is exchanged, and a revived worker's optimizer is reset."""
    exchanged, optimizer = exchanged_with(optimizer, worker_axes), optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> tuple:
        return optimizer.init(params), pulls.init(exchanged(params))

    def update(
        updates: optax.Updates, state: tuple, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, tuple]:
        if params is None:
            raise ValueError(MISSING_PARAMS)
        own, pull_state = state
        trained = exchanged(params)
        check_updates(updates, trained)
        updates, own = optimizer.update(updates, own, params, **extra_args)
        moves, pull_state = pulls.update(like(trained, updates), pull_state, trained, **extra_args)
        updates = merged(moves, updates)
        if pull_state.failed is not None:
            start = optimizer.init(apply_updates(params, updates, pull_state))
            own = _reset(pull_state.revived, start, own)
        return updates, (own, pull_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _reset(revived: Bool[Array, ""], start: optax.OptState, state: optax.OptState) -> optax.OptState:
    """The optimizer's state of a worker, as at the start if it was revived; but schedules and what they set go on."""
    injected = optax.schedules.InjectStatefulHyperparamsState

    def reset(state: Any, start: Any) -> Any:
        if isinstance(state, optax.ScaleByScheduleState):
            return state
        if isinstance(state, injected):
            return state._replace(inner_state=_reset(revived, start.inner_state, state.inner_state))
        return jnp.where(revived, jnp.asarray(start, state.dtype), state)

    return jax.tree.map(
        reset, state, start, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState | injected)
    )


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
      ValueError: as `leader_pull` does.

    Example:
      >>> tx = lsgd(0.1, axis_name="worker", group_axis_name="group")
    """
    sgd = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum, nesterov))
    return leader_sgd(sgd, axis_name=axis_name, **options)


# For `optax.inject_hyperparams`, which reads the names of what it injects; it can't look into **options.
_own, _all = (list(inspect.signature(function).parameters.values()) for function in (lsgd, leader_sgd))
lsgd.__signature__ = inspect.Signature(_own[:-1] + _all[2:])  # type: ignore[attr-defined]


def init_losses(
    window: int, params: optax.Params, axis_name: AxisName
) -> tuple[Float[Array, " window"], Float[Array, ""]]:
    """The last losses and their mean, the score, before any has been seen.

    Args:
      window: how many losses are kept.
      params: a worker's; arrays that vary over the same axes are made.
      axis_name: the axis, or the axes, on which the workers lie.
    """
    score = scalar_like(params, jnp.inf, float, axis_names(axis_name))
    return jnp.zeros_like(score, shape=window), score


def record_loss(
    losses: Float[Array, " window"], value: Float[Array, ""] | None, seen: Int[Array, ""]
) -> tuple[Float[Array, " window"], Float[Array, ""]]:
    """The last losses with one more, and the score: the mean of those really seen.

    The mean is taken anew each time, so that a NaN goes with the window.

    Args:
      losses: the last losses, the newest at the end.
      value: the new loss.
      seen: how many losses there have been before.

    Raises:
      ValueError: if the value is missing or not a scalar.
    """
    if value is None:
        raise ValueError("workers are compared by their losses: pass it, update(updates, state, params, value=loss).")
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be the scalar loss of one worker, got the shape {jnp.shape(value)};"
            " call update inside the mapped function, where there is no worker axis."
        )
    window = len(losses)
    losses = jnp.append(losses[1:], jnp.asarray(value, losses.dtype))
    seen = jnp.minimum(optax.safe_increment(seen), window)
    return losses, jnp.where(jnp.arange(window) >= window - seen, losses, 0).sum() / seen


def pulled(
    updates: optax.Updates,
    params: optax.Params,
    x: optax.Params,
    leader_x: optax.Params,
    strength: Array,
    follows: Bool[Array, ""],
    step: Int[Array, ""],
) -> optax.Updates:
    """The updates, less strength (x - leader_x), where the worker follows; elsewhere the updates to the bit.

    Args:
      updates: a worker's, to which the pull is added.
      params: a worker's, to which the updates will be added.
      x: the point at which it is pulled.
      leader_x: the leader's point.
      strength: of the pull, in [0, 1].
      follows: whether there is a leader, and it is another worker.
      step: the number of the update, for stochastic rounding of parameters of 16 bits.
    """
    return select(follows, moved(updates, params, towards(x, leader_x, strength), step), updates)


def _unknown_leader(params: optax.Params, worker_axes: tuple[str, ...], *, stores: bool, waits: bool) -> LeaderState:
    scalar = partial(scalar_like, params, axis_name=worker_axes)
    return LeaderState(
        position=scalar(NOBODY, jnp.int32),
        distance=scalar(0, float),
        exchanges=scalar(0, jnp.int32),
        stored=jax.tree.map(jnp.zeros_like, params) if stores else None,
        has_stored=scalar(False, bool),
        waiting=jax.tree.map(jnp.zeros_like, params) if waits else None,
    )


def _met(leader: LeaderState, position: Int[Array, ""], leader_x: optax.Params, x: optax.Params) -> LeaderState:
    """What is known after an exchange in which the worker stood at x."""
    somebody = position != NOBODY
    return leader._replace(
        position=position,
        distance=jnp.where(somebody, distance(x, leader_x).astype(leader.distance.dtype), 0),
        exchanges=optax.safe_increment(leader.exchanges),
        stored=None if leader.stored is None else select(somebody, leader_x, leader.stored),
        has_stored=leader.has_stored | somebody,
    )


def _arrival(leader_x: optax.Params, params: optax.Params) -> optax.Updates:
    """What takes a worker to the leader: the difference or, where its own value is not finite, the leader's."""
    return jax.tree.map(
        lambda move, p, leader_x: jnp.where(jnp.isfinite(p), move, leader_x.astype(move.dtype)),
        towards(params, leader_x, 1.0),
        params,
        leader_x,
    )


def _overwritten(params: optax.Params, revived: Bool[Array, ""]) -> optax.Params:
    """Where the updates of a revived worker are the leader's values."""
    return jax.tree.map(lambda p: revived & ~jnp.isfinite(p), params)


def _overwrite(x: optax.Params, updates: optax.Updates, overwritten: optax.Params) -> optax.Params:
    return jax.tree.map(lambda x, u, there: jnp.where(there, u.astype(x.dtype), x), x, updates, overwritten)


def _forgotten(state: LeaderPullState, params: optax.Params) -> LeaderPullState:
    """The state of a worker that, if it was revived from these params, has no losses."""
    revived = state.revived
    return state._replace(
        losses=jnp.where(revived, 0, state.losses),
        seen=jnp.where(revived, 0, state.seen),
        score=jnp.where(revived, jnp.inf, state.score),
        overwritten=_overwritten(params, revived),
    )


def _may_be_zero(pull: Pull) -> bool:
    """Whether a pull is 0 or, being traced, may be: `optax.inject_hyperparams` passes defaults as traced arrays."""
    return isinstance(pull, jax.core.Tracer) or (not callable(pull) and not np.any(pull))
