r"""Streaming exchanges: parameters in fragments, one at a time, evenly over the period.

    streamed(attractor, pull, Streaming(fragments=4, overlap=2), axis_name="worker", period=64)

is a `lsgd_jax.link.link` that sends in a period what it would send at its end, but never more than a fragment at a
time, so that the peak falls by the number of fragments F. Of each period, fragment k = 1, ..., F is sent after update
:math:`\lfloor k \, period / F \rfloor`, and applied `overlap` updates later: a worker that has meanwhile gone on to x
moves by

    x  <-  x - pull (x - point)

towards the point that follows from where the workers were when they sent. Every fragment is a link of its own, over its
part of the parameters; with an overlap it is two, one that sends and one that applies.

Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a distributed free lunch",
https://arxiv.org/abs/2501.18512, whose mixing factor is 1 - pull.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsgd_jax.checks import check_static, check_whole
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import AxisName
from lsgd_jax.exchange.trees import check_updates, inexact, like, merged, scalar_like
from lsgd_jax.link import AT_ONCE, MISSING_PARAMS, Attractor, Exchange, LinkState, Moment, Pull, PullAt, Target, link

Election: TypeAlias = Literal["per_round", "per_fragment"]
"""How often a streamed leader is elected."""


class Streaming(NamedTuple):
    """How exchanges are spread over their period."""

    fragments: int | None = None
    """Number of parts into which the parameters are cut, of whole arrays in their order; None: 1."""
    overlap: int | None = None
    """Updates between sending a fragment and applying what is received; None: 0."""
    election: Election = "per_round"
    """"per_round" elects a leader for the first fragment, and for the others of the period whoever led that one and
    still can, or nobody; "per_fragment" elects one for each, so that workers are pulled towards a mix of leaders."""


WHOLE = Streaming()
"""All parameters at once, at the end of each period."""


class Streamed(NamedTuple):
    """The state of `streamed`, by fragment."""

    sending: tuple[LinkState, ...]
    applying: tuple[LinkState, ...]
    """Empty without an overlap, where what sends also applies."""

    @property
    def step(self) -> jax.Array:
        """Updates so far."""
        return self.sending[0].step

    @property
    def exchanges(self) -> jax.Array:
        """Rounds so far, in which every fragment was sent."""
        return self.sending[-1].exchanges


def streamed(
    attractor: Attractor,
    pull: Pull,
    streaming: Streaming,
    *,
    axis_name: AxisName,
    period: int = 1,
    pull_at: PullAt = "after_step",
    exchange: Exchange = AT_ONCE,
) -> optax.GradientTransformationExtraArgs:
    """A `link` whose exchanges are spread over the period; with `WHOLE`, the link itself.

    What an attractor and an exchange keep, they keep for each fragment. An attractor that decides by more than its
    fragment is told by the signal `before` what the fragment sent before in the same round has decided: its
    `LinkState`, or None for the first.

    Args:
      attractor: what pulls the workers, towards a point for any part of their parameters.
      pull: as for `link`; with an overlap, at the update in which a fragment is applied.
      streaming: how many fragments, and when they are applied.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates in which every fragment is sent once.
      pull_at: as for `link`; with an overlap, for sending and applying.
      exchange: how the pull is made when a fragment is applied.

    Returns:
      A gradient transformation for the end of a chain, as `link` makes it. Its state is a `Streamed`, or a `LinkState`
      with `WHOLE`.

    Raises:
      ValueError: if an option is out of range; at `init` and `update` if there are fewer arrays than fragments.
      NameError: at `update`, if an axis is not bound there.
    """
    check_whole("period", period, "updates")
    fragments, overlap = _checked(streaming, period)

    def make(attractor: Attractor, exchange: Exchange, offset: int) -> optax.GradientTransformationExtraArgs:
        return link(
            attractor,
            pull,
            axis_name=axis_name,
            period=period,
            pull_at=pull_at,
            exchange=exchange,
            offset=offset % period,
        )

    if fragments == 1 and not overlap:
        return make(attractor, exchange, 0)
    sent_after = schedule(fragments, period)
    sends = [make(attractor, _SEND if overlap else exchange, after) for after in sent_after]
    applies = [make(_RECEIVED, exchange, after + overlap) for after in sent_after if overlap]

    def init(params: optax.Params) -> Streamed:
        parts = cut(inexact(params), fragments)
        sending = tuple(each.init(part) for each, part in zip(sends, parts, strict=True))
        applying = tuple(each.init(part) for each, part in zip(applies, parts, strict=bool(overlap)))
        return Streamed(sending, applying)

    def update(
        updates: optax.Updates, state: Streamed, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Streamed]:
        if params is None:
            raise ValueError(MISSING_PARAMS)
        exchanged = inexact(params)
        check_updates(updates, exchanged)
        sending, applying = list(state.sending), list(state.applying)
        before: LinkState | None = None
        for k, part in enumerate(cut(exchanged, fragments)):
            moves = like(part, updates)
            if overlap:  # What is sent is at the point after a stale pull, as it is without an overlap.
                received = sending[k].attractor.received
                moves, applying[k] = applies[k].update(moves, applying[k], part, received=received, **extra_args)
            moves, sending[k] = sends[k].update(moves, sending[k], part, before=before, **extra_args)
            if streaming.election == "per_round":
                before = sending[k]
            updates = merged(moves, updates)
        # A next level may send other arrays in the same update. Exchanges that share no value could come in any order,
        # and processes wait for each other forever: so all updates depend on all exchanges, by what is always true.
        done = jnp.all(jnp.stack([each.exchanges for each in sending]) >= 0)
        moves = jax.tree.map(lambda u: jnp.where(done, u, jnp.zeros_like(u)), like(exchanged, updates))
        return merged(moves, updates), Streamed(tuple(sending), tuple(applying))

    return optax.GradientTransformationExtraArgs(init, update)


def schedule(fragments: int, period: int) -> list[int]:
    """Updates of a period after which each fragment is sent; the last at its end."""
    return [k * period // fragments for k in range(1, fragments + 1)]


def cut(tree: Any, fragments: int) -> list[Any]:
    """A tree in parts of neighboring arrays, so that the largest part has as few bytes as it can.

    Args:
      tree: of arrays, or of their shapes and dtypes.
      fragments: how many parts; all have an array, unless the tree has none.

    Returns:
      The parts: the tree, each with `optax.MaskedNode` in place of the others' arrays.

    Raises:
      UsageError: if there are fewer arrays than parts.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if 0 < len(leaves) < fragments:
        raise UsageError(
            f"fragments must be at most {len(leaves)}, the number of arrays that are exchanged, got {fragments}:"
            " an array is sent whole."
        )
    if not leaves:
        return [tree] * fragments
    ends = _ends([math.prod(np.shape(x)) * jnp.result_type(x).itemsize for x in leaves], fragments)
    return [
        jax.tree.unflatten(treedef, [x if first <= i < end else optax.MaskedNode() for i, x in enumerate(leaves)])
        for first, end in itertools.pairwise([0, *ends])
    ]


def _ends(sizes: Sequence[int], parts: int) -> list[int]:
    """Where the parts of a row of arrays end, if each is filled up to the least capacity with which that works."""

    def filled(capacity: int) -> list[int]:
        ends: list[int] = []
        load = 0
        for i, size in enumerate(sizes):
            # The last arrays are one part each where no more are left than parts.
            if i and (load + size > capacity or len(sizes) - i < parts - len(ends)):
                ends.append(i)
                load = 0
            load += size
        return [*ends, len(sizes)]

    capacities = range(max(sizes), sum(sizes) + 1)
    return filled(capacities[bisect_left(capacities, True, key=lambda capacity: len(filled(capacity)) <= parts)])


def _checked(streaming: Streaming, period: int) -> tuple[int, int]:
    """The fragments and the overlap.

    Raises:
      ValueError: if one is out of range.
    """
    fragments, overlap, election = streaming
    fragments, overlap = 1 if fragments is None else fragments, 0 if overlap is None else overlap
    check_whole("fragments", fragments, "parts")
    if fragments > period:
        raise ValueError(f"fragments must be at most the period, {period}, got {fragments}: one is sent at a time.")
    check_static("overlap", overlap)
    if not isinstance(overlap, Integral) or overlap < 0:
        raise ValueError(f"overlap must be a whole number of updates, at least 0, got {overlap!r}.")
    if overlap and overlap * fragments >= period:
        raise ValueError(
            f"overlap must be less than period / fragments, {period} / {fragments}, got {overlap}: a fragment is"
            " applied before the next one is sent."
        )
    if election not in get_args(Election):
        raise ValueError(f'election must be "per_round" or "per_fragment", got {election!r}.')
    return fragments, overlap


class _InFlight(NamedTuple):
    """The state of an exchange that sends and moves nobody."""

    attractor: Any
    received: Target
    """What was sent last."""


def _init_sending(attractor: Attractor, params: optax.Params) -> _InFlight:
    nothing = scalar_like(params, False, bool)
    return _InFlight(attractor.init(params), Target(jax.tree.map(jnp.zeros_like, params), nothing, nothing))


def _send(
    attractor: Attractor, updates: optax.Updates, state: _InFlight, now: Moment
) -> tuple[optax.Updates, _InFlight, Target]:
    x = now.point(updates)
    target, inner = attractor.locate(x, attractor.choose(x, state.attractor, **now.signals))
    received = Target(target.point, jnp.asarray(target.exists), jnp.asarray(target.follows))
    return updates, _InFlight(inner, received), target


_SEND = Exchange(_init_sending, _send)


def _receive(x: optax.Params, state: tuple, *, received: Target, **signals: Any) -> Target:
    return received


_RECEIVED = Attractor(lambda params: (), lambda x, received: (received, ()), _receive)
"""The attractor at what was received: `choose` takes it from the signals, and `locate` sends nothing."""
