"""The link that every method is made of: after each step of its own optimizer, a worker is pulled towards a point.

    optax.chain(optax.sgd(0.1), link(attractor, pull, axis_name="worker", period=4))

Every `period` updates the workers exchange, and each moves some way, `pull`, towards the point of an attractor:

    x  <-  x - pull (x - point).

Methods differ in the attractor: the leader, the mean, a center that itself moves, an average weighted by gradient
norms. A level is a link: two links in a chain, each over its own axes, are a method with groups. How the pull is made
is an `Exchange`: `AT_ONCE`, or one of those in `lsgd_jax.variants`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lsgd_jax.checks import check_strengths, check_whole
from lsgd_jax.exchange.axes import AxisName, axis_names, own_entry, when
from lsgd_jax.exchange.trees import (
    check_updates,
    exchanged_with,
    inexact,
    like,
    merged,
    moved,
    promoted,
    scalar_like,
    select,
    towards,
)

Pull: TypeAlias = chex.Numeric | Callable[[chex.Numeric], chex.Numeric]
"""A strength in [0, 1], a schedule of the step, or an array with the shape of the worker axes."""
PullAt: TypeAlias = Literal["after_step", "before_step"]
"""The point at which a worker is pulled: after its own step, or before it."""
MISSING_PARAMS = "a link moves parameters: pass them, update(updates, state, params, value=loss)."


class Target(NamedTuple):
    """The point towards which an attractor pulls a worker."""

    point: optax.Params
    exists: Bool[Array, ""] | Literal[True] = True
    """Whether there is such a point: it may be that nobody can lead."""
    follows: Bool[Array, ""] | Literal[True] = True
    """Whether the worker is moved: the point exists and is not its own."""


def _nothing_to_choose(x: optax.Params, state: Any, **signals: Any) -> Any:
    return state


class Attractor(NamedTuple):
    """What pulls the workers: pure functions of one worker's values, of which the last two may call collectives."""

    init: Callable[[optax.Params], Any]
    """From parameters to the attractor's state."""
    locate: Callable[[optax.Params, Any], tuple[Target, Any]]
    """`locate(x, state)` sends what is large; it returns the target of a worker at x, and the new state."""
    choose: Callable[..., Any] = _nothing_to_choose
    """`choose(x, state, **signals)` decides by a few scalars, before `locate`; it returns the new state. The signals
    are the extra arguments of `update`, such as the score."""


class Moment(NamedTuple):
    """One worker's update in which an exchange may fall."""

    params: optax.Params
    """Those to which the updates will be added."""
    step: Int[Array, ""]
    """The number of updates before this one."""
    pull_at: PullAt
    strength: Callable[[], Float[Array, ""]]
    """Strength of the worker's pull, in [0, 1]."""
    signals: dict[str, Any]

    def point(self, updates: optax.Updates) -> optax.Params:
        """Where the worker is pulled, given its updates so far."""
        return self.params if self.pull_at == "before_step" else optax.apply_updates(self.params, updates)


class Exchange(NamedTuple):
    """How the pull towards an attractor is made: pure functions that take the attractor first."""

    init: Callable[[Attractor, optax.Params], Any]
    """From parameters to the state, with the attractor's in it."""
    exchange: Callable[[Attractor, optax.Updates, Any, Moment], tuple[optax.Updates, Any, Target]]
    """From updates and state to those after the exchange, and its target."""
    between: Callable[[Attractor, optax.Updates, Any, Moment], optax.Updates] | None = None
    """What becomes of the updates at every step, before the exchange if one is due; None: nothing."""


def _at_once(
    attractor: Attractor, updates: optax.Updates, state: Any, now: Moment
) -> tuple[optax.Updates, Any, Target]:
    x = now.point(updates)
    target, state = attractor.locate(x, attractor.choose(x, state, **now.signals))
    updates = pulled(updates, now.params, x, target.point, now.strength(), target.follows, now.step)
    return updates, state, target


AT_ONCE = Exchange(lambda attractor, params: attractor.init(params), _at_once)
"""Towards where the attractor is now."""


class LinkState(NamedTuple):
    """The state of `link`: one worker's, without a worker axis."""

    step: Int[Array, ""]
    """Updates so far."""
    exchanges: Int[Array, ""]
    """Exchanges so far."""
    attractor: Any
    """What the attractor keeps, such as a center, and what the exchange keeps around it."""


def link(
    attractor: Attractor,
    pull: Pull = 1.0,
    *,
    axis_name: AxisName,
    period: int = 1,
    pull_at: PullAt = "after_step",
    exchange: Exchange = AT_ONCE,
    offset: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Pull every worker towards an attractor's point, every `period` updates.

    - Arrays of floats and complex numbers are exchanged; integers, booleans and PRNG keys are left alone. Parameters
      of 16 bits move by stochastic rounding, since a pull by less than half their last place would be lost.
    - Moves are added to the updates, so that where a worker is to arrive at a given point, it does so up to rounding.
    - Whether an exchange is due must be the same on all workers, or they wait for each other forever: wrappers that
      skip updates for some workers only (`optax.apply_if_finite`) go around the worker's optimizer, never around a
      link.

    Args:
      attractor: what pulls the workers.
      pull: strength in [0, 1]: a number, a schedule of the step, or an array with the shape of the worker axes, of
        which each worker takes its own entry.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      pull_at: "after_step" pulls at the point after the worker's step, "before_step" at the point before it.
      exchange: how the pull is made.
      offset: after how many updates of each period the exchange comes, less than the period; 0: at its end.

    Returns:
      A gradient transformation for the end of a chain. `update(updates, state, params)` takes an optional `step`, the
      number of updates made before this one, by which exchanges and schedules are timed instead of by the state's own
      count: given unbatched, it lets `jax.vmap` keep a branch that exchanges only when due.

    Raises:
      ValueError: if an option is out of range, or at `update` for missing params.
      NameError: at `update`, if an axis is not bound there.
    """
    check_strengths(pull=pull)
    check_whole("period", period, "updates")
    if not 0 <= offset < period:
        raise ValueError(f"offset must be at least 0 and less than the period, {period}, got {offset}.")
    if pull_at not in ("after_step", "before_step"):
        raise ValueError(f'pull_at must be "after_step" or "before_step", got {pull_at!r}.')
    axes = axis_names(axis_name)
    if len(set(axes)) < len(axes):
        raise ValueError(f"the axes of workers and groups must have different names, got {axes}.")

    def init(params: optax.Params) -> LinkState:
        params = jax.tree.map(jnp.asarray, inexact(params))
        exchanges = scalar_like(params, 0, jnp.int32)
        return LinkState(jnp.zeros((), jnp.int32), exchanges, exchange.init(attractor, params))

    def update(
        updates: optax.Updates,
        state: LinkState,
        params: optax.Params | None = None,
        *,
        step: Int[Array, ""] | None = None,
        **signals: Any,
    ) -> tuple[optax.Updates, LinkState]:
        if params is None:
            raise ValueError(MISSING_PARAMS)
        all_updates, params = updates, inexact(params)
        check_updates(updates, params)
        updates = promoted(like(params, updates), params)
        step = state.step if step is None else step

        def strength() -> Float[Array, ""]:
            return own_entry(pull(step) if callable(pull) else pull, axes)

        now = Moment(params, step, pull_at, strength, signals)
        if exchange.between is not None:
            updates = exchange.between(attractor, updates, state.attractor, now)

        def meet(before: tuple[optax.Updates, Any, Array]) -> tuple[optax.Updates, Any, Array]:
            updates, kept, exchanges = before
            updates, kept, _ = exchange.exchange(attractor, updates, kept, now)
            return updates, kept, optax.safe_increment(exchanges)

        due = (step + 1) % period == offset
        updates, kept, exchanges = when(due, meet, (updates, state.attractor, state.exchanges), axes)
        return merged(updates, all_updates), LinkState(optax.safe_increment(state.step), exchanges, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def parts(kind: type, state: Any) -> list:
    """All parts of a state that are of a kind, such as `Delayed`, in their order."""
    found = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kind))
    return [part for part in found if isinstance(part, kind)]


def chained(
    optimizer: optax.GradientTransformation, *links: optax.GradientTransformation, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of a worker's optimizer and links, in which only what the optimizer trains is exchanged.

    Args:
      optimizer: the worker's own.
      *links: which move the worker after its step, one after the other; they are told the raw gradients, `gradient`.
      axis_name: the axis, or the axes, on which all workers lie.

    Returns:
      A gradient transformation. Its state is that of the optimizer and those of the links, in a tuple.
    """
    exchanged, optimizer = exchanged_with(optimizer, axis_names(axis_name)), optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> tuple:
        trained = exchanged(params)
        return optimizer.init(params), *(each.init(trained) for each in links)

    def update(
        updates: optax.Updates, state: tuple, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, tuple]:
        if params is None:
            raise ValueError(MISSING_PARAMS)
        trained = exchanged(params)
        check_updates(updates, trained)
        gradient = like(trained, updates)
        all_updates, own = optimizer.update(updates, state[0], params, **extra_args)
        moves, states = like(trained, all_updates), [own]
        for each, link_state in zip(links, state[1:], strict=True):
            moves, link_state = each.update(moves, link_state, trained, gradient=gradient, **extra_args)
            states.append(link_state)
        return merged(moves, all_updates), tuple(states)

    return optax.GradientTransformationExtraArgs(init, update)


def pulled(
    updates: optax.Updates,
    params: optax.Params,
    x: optax.Params,
    point: optax.Params,
    strength: Array,
    follows: Bool[Array, ""] | Literal[True],
    step: Int[Array, ""],
) -> optax.Updates:
    """The updates, less strength (x - point), where the worker follows; elsewhere the updates to the bit.

    Args:
      updates: one worker's, to which the pull is added.
      params: one worker's, to which the updates will be added.
      x: where it is pulled.
      point: towards which it is pulled.
      strength: of the pull, in [0, 1].
      follows: whether it is pulled at all.
      step: the number of the update, for stochastic rounding of parameters of 16 bits.
    """
    moves = moved(updates, params, towards(x, point, strength), step)
    return moves if follows is True else select(follows, moves, updates)
