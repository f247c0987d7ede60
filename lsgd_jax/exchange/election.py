"""Who leads: recent losses, the score made of them, and the election of the lowest."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsgd_jax.exchange.averages import Members, total
from lsgd_jax.exchange.axes import AxisName, axis_names, worker_count, worker_index
from lsgd_jax.exchange.trees import inexact, scalar_like

NOBODY = -1
"""The leader's position when no worker could be elected."""


def elect(
    score: Float[Array, ""],
    axis_name: AxisName,
    *,
    eligible: Bool[ArrayLike, ""] = True,
) -> Int[Array, ""]:
    """Elect the worker with the lowest finite score; ties go to the lowest position.

    Two scalar all-reduces, no matter how many workers: the lowest score, then the lowest position that has it.

    Args:
      score: this worker's scalar score, the lower the better. NaN and infinities are never elected.
      axis_name: the axis, or the axes, on which the candidates lie.
      eligible: whether this worker may be elected at all.

    Returns:
      The leader's int32 position on the (flattened) axis, the same for all workers, or `NOBODY` if no worker is
      eligible with a finite score.

    Raises:
      NameError: if the axis is not bound where this is called.
      ValueError: if the score is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scores = jnp.array([0.3, jnp.nan, 0.1, 0.1])
      >>> print(jax.vmap(lambda score: elect(score, "worker"), axis_name="worker")(scores))
      [2 2 2 2]
    """
    if jnp.shape(score) != ():
        raise ValueError(f"elect needs one scalar score a worker, got the shape {jnp.shape(score)}.")
    position, workers = worker_index(axis_name), worker_count(axis_name)
    names = axis_names(axis_name)
    candidate = jnp.isfinite(score) & eligible
    score = jnp.where(candidate, score, jnp.inf)
    best = candidate & (score == lax.pmin(score, names))
    leader = lax.pmin(jnp.where(best, position, workers), names)
    return jnp.where(leader == workers, NOBODY, leader)


def elect_quorum(
    score: Float[Array, ""], axis_name: AxisName, kappa: ArrayLike, *, eligible: Bool[ArrayLike, ""] = True
) -> tuple[Int[Array, ""], Members]:
    r"""Elect the workers whose scores are at most :math:`s_{\min} + \kappa (s_{\mathrm{med}} - s_{\min})`.

    The minimum and the median (of an even number the upper one) are those of all finite scores of eligible workers. One
    all-reduce, of as many scalars as there are workers.

    Args:
      score: as for `elect`.
      axis_name: the axis, or the axes, on which the candidates lie.
      kappa: width of the quorum; infinite for all candidates.
      eligible: whether this worker may be elected at all.

    Returns:
      The position of the worker with the lowest score, as `elect` has it, and the members of the quorum.

    Raises:
      NameError: if the axis is not bound where this is called.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scores = jnp.array([0.3, 0.2, jnp.nan, 0.9, 0.1])
      >>> first, members = jax.vmap(lambda score: elect_quorum(score, "worker", 3.0), axis_name="worker")(scores)
      >>> print(first, members.includes)
      [4 4 4 4 4] [ True  True False False  True]
    """
    position, workers = worker_index(axis_name), worker_count(axis_name)
    own = jnp.where(jnp.isfinite(score) & eligible, score, jnp.inf)
    scores = total(jnp.where(jnp.arange(workers) == position, own, 0), axis_name)
    candidates = jnp.isfinite(scores)
    in_order = jnp.sort(scores)
    lowest, median = in_order[0], in_order[candidates.sum() // 2]
    near = jnp.isinf(jnp.asarray(kappa)) | (scores - lowest <= kappa * (median - lowest))
    includes = candidates & near
    first = jnp.where(candidates.any(), jnp.argmin(scores), NOBODY).astype(jnp.int32)
    return first, Members(includes[position], includes.sum().astype(jnp.int32))


def all_finite(tree: Any, model_axis_name: AxisName | None = None) -> Bool[Array, ""]:
    """Whether all numbers in a worker's tree are finite.

    Args:
      tree: arrays or, over manual axes, the parts of them that a device has.
      model_axis_name: the axis, or the axes, over which the parts lie; only over these there is a collective.
    """
    # A number less itself is 0 if it is finite, otherwise NaN; a sum is several times faster than a reduction of bools.
    # (XLA writes the zeros of x * 0 to memory.)
    sums = [jnp.sum(x - x) for x in jax.tree.leaves(inexact(tree))]
    finite = jnp.isfinite(jnp.stack(sums).sum()) if sums else jnp.array(True)
    return finite if model_axis_name is None else lax.psum(~finite, axis_names(model_axis_name)) == 0


def init_losses(window: int, params: optax.Params) -> tuple[Float[Array, " window"], Float[Array, ""]]:
    """The recent losses and their mean, the score, before any has been seen.

    Args:
      window: how many losses are kept.
      params: one worker's; arrays that vary over the same axes are made.
    """
    score = scalar_like(params, jnp.inf, float)
    return jnp.zeros_like(score, shape=window), score


def record_loss(
    losses: Float[Array, " window"], value: Float[Array, ""] | None, seen: Int[Array, ""]
) -> tuple[Float[Array, " window"], Float[Array, ""]]:
    """The recent losses with one more, and the score: the mean of those really seen.

    The mean is taken anew each time, so that a NaN leaves with the window.

    Args:
      losses: the recent losses, the newest at the end.
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
