"""Delayed pulls, stale pulls, and workers that restart from their leader: what the methods' papers do not have.

The first two are exchanges, ways to make the pull of any `lsgd_jax.link.link`, and nest:

    leader_pull(0.1, axis_name="worker", period=4, exchange=stale(0.025, DELAYED))
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from lsgd_jax.checks import check_static
from lsgd_jax.exchange import AxisName, all_finite
from lsgd_jax.exchange.trees import distance, like, merged, norm, promoted, scalar_like, select, towards
from lsgd_jax.link import AT_ONCE, Attractor, Exchange, Moment, Target, chained, parts, pulled
from lsgd_jax.scores import LeaderPullState, LeaderState

Revive: TypeAlias = Literal["never", "from_leader"]
"""What becomes of a worker whose score or parameters are not finite."""
Delay: TypeAlias = Literal[0, 1]
"""By how many exchanges a pull is put off."""
ARRIVED = 0.01
"""How far from its leader, relative to the leader's norm, a worker may be after a revival."""


class Delayed(NamedTuple):
    """The state of a delayed exchange."""

    attractor: Any
    x: optax.Params
    """The worker's own parameters at the end of the last exchange, or at the start, whose pull is still to come."""


def _delayed(
    attractor: Attractor, updates: optax.Updates, state: Delayed, now: Moment
) -> tuple[optax.Updates, Delayed, Target]:
    target, inner = attractor.locate(state.x, state.attractor)
    updates = pulled(updates, now.params, state.x, target.point, now.strength(), target.follows, now.step)
    x = now.point(updates)
    return updates, Delayed(attractor.choose(x, inner, **now.signals), x), target


DELAYED = Exchange(
    lambda attractor, params: Delayed(attractor.init(params), jax.tree.map(jnp.copy, params)),
    _delayed,
)
"""Puts off each pull to the next exchange: x moves by -pull (x_k - point_k), both as they were at the end of the last
exchange k. What is sent is known a period before it is needed, so that a compiler may send it while the workers
compute, where period and exchange are one straight program. A worker that led exchange k is not moved by it."""


def delayed(delay: Delay, overlap: int | None = None) -> Exchange:
    """The exchange for a `delay` of 0 or 1.

    Args:
      delay: by how many exchanges pulls are put off.
      overlap: by how many updates they are, as for `lsgd_jax.streaming`.

    Raises:
      ValueError: if the delay is another number, or pulls are put off by both.
    """
    check_static("delay", delay)
    if delay not in (0, 1):
        raise ValueError(f"delay must be 0 or 1, got {delay!r}.")
    if delay and overlap:
        raise ValueError(
            f"delay must be 0 with an overlap, which puts pulls off as well, got {delay} and an overlap of {overlap}."
        )
    return DELAYED if delay else AT_ONCE


class Stale(NamedTuple):
    """The state of an exchange with a stale pull."""

    attractor: Any
    point: optax.Params
    """The last point as it was received."""
    exists: Bool[Array, ""]
    """Whether there has been one."""


def stale(strength: Callable[[Any], Any] | float, exchange: Exchange = AT_ONCE) -> Exchange:
    """An exchange that also pulls, at every step before the exchange, towards a stored copy of the last point.

    Args:
      strength: of that pull at each step, in [0, 1]: a number, or a schedule of the step.
      exchange: how the pull at exchanges is made.
    """

    def init(attractor: Attractor, params: optax.Params) -> Stale:
        inner, zeros = exchange.init(attractor, params), jax.tree.map(jnp.zeros_like, params)
        return Stale(inner, zeros, scalar_like(params, False, bool))

    def meet(
        attractor: Attractor, updates: optax.Updates, state: Stale, now: Moment
    ) -> tuple[optax.Updates, Stale, Target]:
        updates, inner, target = exchange.exchange(attractor, updates, state.attractor, now)
        point = target.point if target.exists is True else select(target.exists, target.point, state.point)
        return updates, Stale(inner, point, state.exists | target.exists), target

    def between(attractor: Attractor, updates: optax.Updates, state: Stale, now: Moment) -> optax.Updates:
        own = jnp.asarray(strength(now.step) if callable(strength) else strength)
        return pulled(updates, now.params, now.point(updates), state.point, own, state.exists, now.step)

    return Exchange(init, meet, between)


class Restarting(NamedTuple):
    """The state of an exchange that restarts workers."""

    attractor: Any
    restarted: Bool[Array, ""]
    """Whether the last exchange has sent the worker to the leader."""
    arrived: Bool[Array, ""]
    """Whether it has come there: from very far away the difference to the leader is rounded too coarsely."""


def restarting(exchange: Exchange, model_axis_name: AxisName | None = None) -> Exchange:
    """An exchange that sends workers who have failed to the point, for the links of `revive_from_leader`.

    Args:
      exchange: how the pull is made.
      model_axis_name: as for `leader_pull`.
    """

    def init(attractor: Attractor, params: optax.Params) -> Restarting:
        false = scalar_like(params, False, bool)
        return Restarting(exchange.init(attractor, params), false, false)

    def meet(
        attractor: Attractor, updates: optax.Updates, state: Restarting, now: Moment
    ) -> tuple[optax.Updates, Restarting, Target]:
        revived = now.signals["revived"]
        # Who has been revived in this update goes on from where it is now, as if it had been there.
        landing = _landing(now.params, updates, _overwritten(now.params, revived))
        now = now._replace(params=select(revived, landing, now.params))
        moves = select(revived, jax.tree.map(jnp.zeros_like, updates), updates)
        finite = jnp.isfinite(now.signals["score"]) & all_finite(now.point(moves), model_axis_name)
        unwell = now.signals["failed"] | ~finite
        waiting = _waiting_at(landing, revived, state.attractor)
        moves, inner, leader = exchange.exchange(attractor, moves, waiting, now)
        restarts = leader.exists & ~revived & unwell
        moves = select(restarts, _arrival(leader.point, now.params), moves)
        arrival = _landing(now.params, moves, _overwritten(now.params, restarts))
        arrived = distance(arrival, leader.point, model_axis_name) <= ARRIVED * norm(leader.point, model_axis_name)
        updates = jax.tree.map(lambda u, m: jnp.where(revived, u + m, m), updates, moves)
        return updates, Restarting(inner, restarts, restarts & arrived), leader

    def between(attractor: Attractor, updates: optax.Updates, state: Restarting, now: Moment) -> optax.Updates:
        assert exchange.between is not None
        return select(now.signals["failed"], updates, exchange.between(attractor, updates, state.attractor, now))

    return Exchange(init, meet, between if exchange.between else None)


class Revival(NamedTuple):
    """Where a worker stands with its revival."""

    failed: Bool[Array, ""]
    """Whether it has failed and waits for its revival."""
    revived: Bool[Array, ""]
    """Whether the last update has revived it."""
    overwritten: optax.Params
    """Where the last update is the leader's value and not a difference, since the worker's own is not finite, for
    `apply_updates`: bools in the shapes of what is exchanged."""


def revive_from_leader(
    optimizer: optax.GradientTransformation,
    *pulls: optax.GradientTransformation,
    axis_name: AxisName,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer and the `leader_pull` of each level; workers who have failed restart from a leader.

    A worker fails if its step would make its parameters NaN or infinite, which it then does not take, nor any other
    until its revival, or if its score is not finite when an exchange is due. It restarts at the next exchange that has
    a leader, with an optimizer state as at the start, except that schedules and injected hyperparameters go on. Its
    losses are forgotten, and it can't lead before its window is full again.

    The update of a revived worker is its difference to the leader, which whatever adds updates applies, up to the
    rounding of the parameters it had. Parameters that are not finite all the same, such as a NaN at the start, stay so
    under addition: `apply_updates` of this module sets them.

    Args:
      optimizer: the worker's own.
      *pulls: `leader_pull(..., exchange=restarting(...))`, those in groups first.
      axis_name: the axis, or the axes, on which all workers lie.
      model_axis_name: as for `leader_pull`.

    Returns:
      A gradient transformation. Its state is that of the optimizer, the `Revival` and the states of the pulls, in a
      tuple.
    """
    chain = chained(optimizer, _reviving(pulls, model_axis_name), axis_name=axis_name)

    def init(params: optax.Params) -> tuple:
        own, of_pulls = chain.init(params)
        return own, *of_pulls

    def update(
        updates: optax.Updates, state: tuple, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, tuple]:
        own, *of_pulls = state
        updates, (own, of_pulls) = chain.update(updates, (own, tuple(of_pulls)), params, **extra_args)
        revival: Revival = of_pulls[0]
        start = optimizer.init(apply_updates(params, updates, revival))
        return updates, (_reset(revival.revived, start, own), *of_pulls)

    return optax.GradientTransformationExtraArgs(init, update)


def _reviving(
    pulls: tuple[optax.GradientTransformation, ...], model_axis_name: AxisName | None
) -> optax.GradientTransformationExtraArgs:
    """The pulls of all levels, one after the other, as one link that keeps a `Revival` before their states."""

    def init(params: optax.Params) -> tuple:
        false = scalar_like(params, False, bool)
        overwritten = jax.tree.map(lambda x: jnp.zeros_like(x, bool), params)
        return Revival(false, false, overwritten), *(pull.init(params) for pull in pulls)

    def update(updates: optax.Updates, state: tuple, params: optax.Params, **extra_args: Any) -> tuple:
        revival, *states = state
        first: LeaderPullState = states[0]
        updates = promoted(updates, params)
        failed = revival.failed | ~all_finite(optax.apply_updates(params, updates), model_axis_name)
        updates = select(failed, jax.tree.map(jnp.zeros_like, updates), updates)
        # A window is as full as it can be if the worker has never been revived.
        full = (first.seen == first.link.step) | (optax.safe_increment(first.seen) >= len(first.losses))
        able, revived = ~failed & full, jnp.zeros_like(failed)
        for i, (pull, before) in enumerate(zip(pulls, states, strict=True)):
            signals = {"failed": failed, "revived": revived, "able": able & ~revived}
            updates, after = pull.update(updates, before, params, **signals, **extra_args)
            restart, met = parts(Restarting, after)[0], after.exchanges != before.exchanges
            failed, revived = failed | (met & restart.restarted), revived | (met & restart.arrived)
            states[i] = after
        x = _landing(params, updates, _overwritten(params, revived))
        states = [_forgotten(_waiting_at(x, revived, each), revived) for each in states]
        return updates, (Revival(failed & ~revived, revived, _overwritten(params, revived)), *states)

    return optax.GradientTransformationExtraArgs(init, update)


def _waiting_at(x: optax.Params, revived: Bool[Array, ""], state: Any) -> Any:
    """The state of a revived worker, whose delayed pull is to be from x; but who leads is followed to where it was."""
    (leader,) = parts(LeaderState, state)

    def at_x(part: Any) -> Any:
        return part._replace(x=select(revived & ~leader.leads, x, part.x)) if isinstance(part, Delayed) else part

    return jax.tree.map(at_x, state, is_leaf=lambda part: isinstance(part, Delayed))


def _forgotten(state: LeaderPullState, revived: Bool[Array, ""]) -> LeaderPullState:
    """The state of a worker that, if it was revived, has no losses."""
    return state._replace(
        losses=jnp.where(revived, 0, state.losses),
        seen=jnp.where(revived, 0, state.seen),
        score=jnp.where(revived, jnp.inf, state.score),
    )


def _arrival(point: optax.Params, params: optax.Params) -> optax.Updates:
    """What takes a worker to a point: the difference or, where its own value is not finite, the point's."""
    return jax.tree.map(
        lambda move, p, point: jnp.where(jnp.isfinite(p), move, point.astype(move.dtype)),
        towards(params, point, 1.0),
        params,
        point,
    )


def _overwritten(params: optax.Params, revived: Bool[Array, ""]) -> optax.Params:
    """Where the updates of a revived worker are the leader's values."""
    return jax.tree.map(lambda p: revived & ~jnp.isfinite(p), params)


def _landing(params: optax.Params, updates: optax.Updates, overwritten: optax.Params) -> optax.Params:
    """Where updates take a worker."""
    x = optax.apply_updates(params, updates)
    return jax.tree.map(lambda x, u, there: jnp.where(there, u.astype(x.dtype), x), x, updates, overwritten)


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


def apply_updates(params: optax.Params, updates: optax.Updates, state: optax.OptState) -> optax.Params:
    """What `optax.apply_updates` does, but a revived worker's parameters that were not finite are set to the leader's.

    Args:
      params: one worker's; no worker axis.
      updates: for them.
      state: the optimizer's that `update` returned with the updates, with any number of methods with revival in it.
    """
    x = optax.apply_updates(params, updates)
    for revival in parts(Revival, state):
        there = revival.overwritten
        x = merged(_landing(like(there, params), like(there, updates), there), x)
    return x


def has_failed(params: optax.Params, state: optax.OptState, model_axis_name: AxisName | None = None) -> Bool[Array, ""]:
    """Whether a worker's parameters are not all finite, or it waits for its revival; no collective among workers.

    Args:
      params: one worker's; no worker axis.
      state: the optimizer's, with any number of methods with revival in it.
      model_axis_name: as for `leader_pull`.
    """
    failed = ~all_finite(params, model_axis_name)
    for revival in parts(Revival, state):
        failed |= revival.failed
    return failed


def was_revived(state: optax.OptState) -> Bool[Array, ""] | None:
    """Whether the last update has revived the worker; None if no method in an optimizer's state revives workers."""
    # No constant: between processes, a collective of one depends on nothing, and may come in any order among others.
    revivals = parts(Revival, state)
    return functools.reduce(jnp.logical_or, (revival.revived for revival in revivals)) if revivals else None


def links(state: optax.OptState) -> list[LeaderPullState]:
    """The states of all `leader_pull` in an optimizer's state, in their order."""
    return parts(LeaderPullState, state)
