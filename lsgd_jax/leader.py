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

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from lsgd_jax.checks import check_strengths, check_whole
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

Revive: TypeAlias = Literal["never", "from_leader"]
"""What becomes of a worker whose score or parameters are not finite."""
Pull: TypeAlias = chex.Numeric | Callable[[chex.Numeric], chex.Numeric]
"""A strength in [0, 1], a schedule of the step, or an array with the shape of the worker axes."""
PULL = 0.1
"""The paper's strength of either pull."""


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
    - A worker is one position on the axes, and its parameters are whole there: what is spread over further mesh axes
      would be judged finite, and its distance taken, piece by piece.
    - Only parameters are exchanged: momentum and other optimiser state stay the worker's own.

    `update` sees one worker, inside `jax.shard_map`, `jax.pmap` or `jax.vmap(..., axis_name=...)`. Whether an exchange
    is due must be the same on all workers, or they wait for each other for ever: wrappers that skip updates for some
    workers only (`optax.apply_if_finite`, `optax.MultiSteps`) go inside the chain, never around `leader_pull`.

    Args:
      pull: strength of the pull towards the (local) leader, dimensionless, in [0, 1]: a number, a schedule of the step,
        or an array with the shape of the worker axes, groups first, of which each worker takes its own entry. To change
        it during a run, `optax.inject_hyperparams(leader_pull, static_args=...)` with all other options static.
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
        and its leader as they were at the end of the last exchange k. The leader of then is not moved. What is sent is
        known a period before it is needed, so that a compiler may send it while the workers compute, where period and
        exchange are one straight program.
      revive: "from_leader" lets a worker whose score or parameters are not finite start anew from the leader at the
        next exchange that has one. Its losses are forgotten, and its updates are for once the leader's parameters: use
        `apply_updates` of this module in place of optax's, since a NaN swallows whatever is added to it.

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
    if delay not in (0, 1):
        raise ValueError(f"delay must be 0 or 1, got {delay!r}.")
    if revive not in get_args(Revive):
        raise ValueError(f'revive must be "never" or "from_leader", got {revive!r}.')
    check_whole("period", period, "updates")
    check_whole("window", window, "losses")
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

    def init(params: optax.Params) -> LeaderPullState:
        leaders = tuple(
            _unknown_leader(params, stores=level.has_stale_pull or wire == "int8", waits=delay == 1) for level in levels
        )
        losses, score = init_losses(window, params)
        seen, revived = (jnp.zeros_like(score, dtype) for dtype in (jnp.int32, bool))
        return LeaderPullState(jnp.zeros((), jnp.int32), losses, seen, score, revived, leaders)

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
            raise ValueError("leader_pull moves parameters: pass them, update(updates, state, params, value=loss).")
        losses, score = record_loss(state.losses, value, state.seen)
        step = state.step if step is None else step

        def point(updates: optax.Updates, revived: Bool[Array, ""] | None = None) -> optax.Params:
            x = params if pull_at == "before_step" else optax.apply_updates(params, updates)
            return x if revived is None or revive == "never" else _select(revived, updates, x)

        def strength(pull: Pull) -> Float[Array, ""]:
            return own_entry(pull(step) if callable(pull) else pull, worker_axes)

        for level, leader in zip(levels, state.leaders, strict=True):
            if level.has_stale_pull:
                stale = strength(level.stale_pull) / level.period
                updates = pulled(updates, point(updates), leader.stored, stale, leader.has_stored)

        def elected(x: optax.Params, revived: Bool[Array, ""], level: _Level) -> Int[Array, ""]:
            return elect(score, level.axis_names, eligible=all_finite(x) & ~revived)

        def exchange(level: _Level, before: tuple[optax.Updates, Array, LeaderState]) -> tuple:
            updates, revived, leader = before
            now = point(updates, revived)
            if delay:
                x, position = leader.waiting, leader.position
            else:
                x, position = now, elected(now, revived, level)
            leader_x = broadcast_rounded(x, position, level.axis_names, wire=wire, last=leader.stored, method=broadcast)
            follows = (position != NOBODY) & (position != worker_index(level.axis_names))
            updates = pulled(updates, x, leader_x, strength(level.pull), follows)
            leader = _met(leader, position, leader_x, x)
            if revive == "from_leader":
                starts_anew = (position != NOBODY) & ~revived & ~(jnp.isfinite(score) & all_finite(now))
                updates = _select(starts_anew, leader_x, updates)
                revived |= starts_anew
            if delay:
                x = point(updates, revived)
                leader = leader._replace(position=elected(x, revived, level), waiting=x)
            return updates, revived, leader

        leaders, revived = [], jnp.zeros_like(state.revived)
        for level, leader in zip(levels, state.leaders, strict=True):
            due = (step + 1) % level.period == 0
            updates, revived, leader = when(due, partial(exchange, level), (updates, revived, leader), worker_axes)
            leaders.append(leader)
        seen = optax.safe_increment(state.seen)
        if revive == "from_leader":
            forgotten = init_losses(window, params)
            losses, score = _select(revived, forgotten, (losses, score))
            seen = jnp.where(revived, 0, seen)
        return updates, LeaderPullState(optax.safe_increment(state.step), losses, seen, score, revived, tuple(leaders))

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
    """LSGD with any optimiser and the paper's pulls: the optimiser, then `leader_pull`.

    A NaN in one worker's loss or parameters stays with that worker, who can't lead, or ends with its revival.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers of a group lie.
      period: updates between (local) exchanges.
      pull: strength of the pull towards the (local) leader, in [0, 1].
      group_axis_name: the axis, or the axes, on which the groups lie; None: one group, and nothing global.
      global_pull: strength of the pull towards the global leader, in [0, 1]; None: 0.1 if there are groups.
      global_period: updates between global exchanges; None: `default_global_period` if there are groups.
      window: losses in the mean by which leaders are elected.
      pull_at: "after_step" or "before_step", as for `leader_pull`.
      stale_pull: towards the stored local leader, as for `leader_pull`.
      global_stale_pull: towards the stored global leader, as for `leader_pull`.
      broadcast: how leaders are sent, as for `leader_pull`.
      wire: in what numbers leaders are sent, as for `leader_pull`.
      delay: 1 puts off each pull to the next exchange, as for `leader_pull`.
      revive: "from_leader" lets workers that have failed start anew from the leader, as for `leader_pull`, with an
        optimiser state as at the start; parameters have to be updated by `apply_updates` of this module.

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
    return optax.chain(optimizer, pulls) if revive == "never" else _with_new_starts(optimizer, pulls)


def apply_updates(params: optax.Params, updates: optax.Updates, state: optax.OptState) -> optax.Params:
    """What `optax.apply_updates` does, but a worker that has just been revived is set to the updates.

    Args:
      params: one worker's; no worker axis.
      updates: for them.
      state: the optimiser's that `update` returned with the updates, with or without a `LeaderPullState` in it.
    """
    moved, revived = optax.apply_updates(params, updates), optax.tree.get(state, "revived")
    return moved if revived is None else _select(revived, updates, moved)


def _with_new_starts(
    optimizer: optax.GradientTransformation, pulls: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Chain the two; the optimiser of a worker that is revived starts anew, too."""
    chained = optax.chain(optimizer, pulls)

    def update(
        updates: optax.Updates, state: tuple, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, tuple]:
        updates, (own, pull_state) = chained.update(updates, state, params, **extra_args)
        # Where it is used, the updates are parameters.
        return updates, (_select(pull_state.revived, optimizer.init(updates), own), pull_state)

    return optax.GradientTransformationExtraArgs(chained.init, update)


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


def init_losses(window: int, params: optax.Params) -> tuple[Float[Array, " window"], Float[Array, ""]]:
    """The last losses and their mean, the score, before any has been seen.

    Args:
      window: how many losses are kept.
      params: a worker's; arrays that vary over the same axes are made.
    """
    leaf = jax.tree.leaves(params)[0]
    return jnp.zeros_like(leaf, float, shape=window), jnp.full_like(leaf, jnp.inf, float, shape=())


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
    updates: optax.Updates, x: optax.Params, leader_x: optax.Params, strength: Array, follows: Bool[Array, ""]
) -> optax.Updates:
    """The updates, less strength (x - leader_x), where the worker follows; elsewhere the updates to the bit.

    Args:
      updates: a worker's, to which the pull is added.
      x: the point at which it is pulled.
      leader_x: the leader's point.
      strength: of the pull, in [0, 1].
      follows: whether there is a leader, and it is another worker.
    """

    def pulled_leaf(u: Array, x: Array, leader_x: Array) -> Array:
        return jnp.where(follows, u - (strength.astype(x.dtype) * (x - leader_x)).astype(u.dtype), u)

    return jax.tree.map(pulled_leaf, updates, x, leader_x)


def distance(x: optax.Params, leader_x: optax.Params) -> Float[Array, ""]:
    """||x - leader_x||, over all arrays."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, x, leader_x))


def _unknown_leader(params: optax.Params, *, stores: bool, waits: bool) -> LeaderState:
    leaf = jax.tree.leaves(params)[0]
    return LeaderState(
        position=jnp.full_like(leaf, NOBODY, jnp.int32, shape=()),
        distance=jnp.zeros_like(leaf, float, shape=()),
        exchanges=jnp.zeros_like(leaf, jnp.int32, shape=()),
        stored=jax.tree.map(jnp.zeros_like, params) if stores else None,
        has_stored=jnp.zeros_like(leaf, bool, shape=()),
        waiting=jax.tree.map(jnp.zeros_like, params) if waits else None,
    )


def _met(leader: LeaderState, position: Int[Array, ""], leader_x: optax.Params, x: optax.Params) -> LeaderState:
    """What is known after an exchange in which the worker stood at x."""
    somebody = position != NOBODY
    stored = leader.stored
    if stored is not None:
        stored = jax.tree.map(lambda new, old: jnp.where(somebody, new, old), leader_x, stored)
    return leader._replace(
        position=position,
        distance=jnp.where(somebody, distance(x, leader_x).astype(leader.distance.dtype), 0),
        exchanges=optax.safe_increment(leader.exchanges),
        stored=stored,
        has_stored=leader.has_stored | somebody,
    )


def _select(condition: Bool[Array, ""], chosen: Any, otherwise: Any) -> Any:
    """One tree or the other."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), chosen, otherwise)


def _may_be_zero(pull: Pull) -> bool:
    """Whether a pull is 0 or, being traced, may be: `optax.inject_hyperparams` passes defaults as traced arrays."""
    return isinstance(pull, jax.core.Tracer) or (not callable(pull) and not np.any(pull))
