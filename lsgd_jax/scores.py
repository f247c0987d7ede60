"""Links that are told how good each worker is: its score, the mean of its recent training losses."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lsgd_jax.checks import check_window
from lsgd_jax.exchange import init_losses, record_loss
from lsgd_jax.exchange.trees import scalar_like
from lsgd_jax.link import LinkState, parts
from lsgd_jax.streaming import Streamed

CommonLoss: TypeAlias = Callable[[optax.Params], Float[Array, ""]]
"""From what a worker would send to its loss on a batch that all see, by which workers are compared in place of scores
if `update` is told it, `common_loss`. It is computed at exchanges only."""


class LeaderState(NamedTuple):
    """What a worker knows of its leader, or of the quorum of `lsgd_jax.methods.quorum`, whose first worker leads it."""

    position: Int[Array, ""]
    """The last leader's position among the workers who elected it; `NOBODY` before the first exchange, or if the last
    exchange found no worker that could lead."""
    leads: Bool[Array, ""]
    """Whether that is this worker; of a quorum, whether this worker belongs to it."""
    distance: Float[Array, ""]
    """||x - leader||, or to the quorum's average, at the last exchange, before the pull; 0 if nobody led. With a delay,
    of the pull that came then, which is that of the exchange before."""
    sent: Any
    """What the way to send keeps."""


class LeaderPullState(NamedTuple):
    """The state of `leader_pull` and `scored`: one worker's, without a worker axis."""

    losses: Float[Array, " window"]
    """The recent losses, the newest at the end; zeros in front as long as there have been fewer."""
    seen: Int[Array, ""]
    """How many losses there have been: updates so far or, after a revival, since then."""
    score: Float[Array, ""]
    """The mean of the losses seen, which elections compare; infinite before the first."""
    link: LinkState | Streamed
    """The counts of updates and exchanges, and what is known of the leader."""

    @property
    def leader(self) -> LeaderState:
        """What the worker knows of its leader: if streamed, of the first fragment's, with the distance over all."""
        first, *more = parts(LeaderState, self.link)
        squares = (each.distance**2 for each in (first, *more))
        return first._replace(distance=jnp.sqrt(sum(squares))) if more else first

    @property
    def exchanges(self) -> Int[Array, ""]:
        """Exchanges so far."""
        return self.link.exchanges


def scored(moving: optax.GradientTransformationExtraArgs, window: int) -> optax.GradientTransformationExtraArgs:
    """A link that is told, by the signal `score`, the mean of the last `window` losses passed as `value`.

    `update` may be told a `common_loss`, a `CommonLoss`, too.

    Args:
      moving: a `streamed` link whose attractor has a `LeaderState`.
      window: losses in a score.

    Raises:
      ValueError: if the window is out of range, and at `update` for a missing value.
    """
    check_window(window)

    def init(params: optax.Params) -> LeaderPullState:
        losses, score = init_losses(window, params)
        return LeaderPullState(losses, scalar_like(params, 0, jnp.int32), score, moving.init(params))

    def update(
        updates: optax.Updates,
        state: LeaderPullState,
        params: optax.Params | None = None,
        *,
        value: Float[Array, ""] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LeaderPullState]:
        losses, score = record_loss(state.losses, value, state.seen)
        updates, moved = moving.update(updates, state.link, params, score=score, **extra_args)
        return updates, LeaderPullState(losses, optax.safe_increment(state.seen), score, moved)

    return optax.GradientTransformationExtraArgs(init, update)
