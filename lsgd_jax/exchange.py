"""Collectives over named worker axes: whatever moves bytes between workers lives here.

A worker is a position on a named axis, or on several flattened in row-major order. The same lines run inside
`jax.vmap(..., axis_name=...)`, nested `jax.vmap`, `jax.pmap` and `jax.shard_map`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

AxisName: TypeAlias = str | tuple[str, ...]
Tree = TypeVar("Tree")

NOBODY = -1
"""The leader's position when no worker could be elected."""


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names of one or several axes as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def worker_index(axis_name: AxisName) -> Int[Array, ""]:
    """The calling worker's position on the (flattened) axis.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    _check_bound(axis_name)
    return lax.axis_index(axis_names(axis_name))


def worker_count(axis_name: AxisName) -> int:
    """The number of workers on the (flattened) axis.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    _check_bound(axis_name)
    return lax.axis_size(axis_names(axis_name))


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


def broadcast_from(tree: Tree, root: Int[ArrayLike, ""], axis_name: AxisName) -> Tree:
    """Give every worker the root's copy of a tree, bit for bit.

    One masked all-reduce over the arrays' bits as unsigned integers, so it costs on the wire what averaging the tree
    costs: 2 (n - 1) / n times its size for n workers (on GPUs, where XLA widens 16-bit integers, twice that for 16-bit
    parameters). On floats the sum would lose the sign of zeros and the payload
    of NaNs; and no value of another worker, NaN or not, can leak, because it is masked and not multiplied.

    Args:
      tree: arrays of any shape and dtype, of the same shapes and dtypes on every worker; no worker axis.
      root: the sender's position on the (flattened) axis, the same on all workers; it may be traced.
      axis_name: the axis, or the axes, on which the workers lie.

    Returns:
      The root's tree; zeros if the root is not a position on the axis, as `NOBODY` is not.

    Raises:
      NameError: if the axis is not bound where this is called.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([10.0, 11.0, 12.0])
      >>> print(jax.vmap(lambda x: broadcast_from(x, 1, "worker"), axis_name="worker")(x))
      [11. 11. 11.]
    """
    is_root = worker_index(axis_name) == root
    names = axis_names(axis_name)

    def broadcast(x: Array) -> Array:
        if jnp.iscomplexobj(x):
            return lax.complex(broadcast(x.real), broadcast(x.imag))
        if x.dtype == bool:
            return broadcast(x.astype(jnp.uint8)).astype(bool)
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return lax.bitcast_convert_type(lax.psum(jnp.where(is_root, bits, 0), names), x.dtype)

    return jax.tree.map(lambda x: broadcast(jnp.asarray(x)), tree)


def mean(tree: Tree, axis_name: AxisName) -> Tree:
    """The mean of a tree over the workers: one all-reduce.

    Args:
      tree: arrays of the same shapes on every worker; no worker axis.
      axis_name: the axis, or the axes, on which the workers lie.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    _check_bound(axis_name)
    return lax.pmean(tree, axis_names(axis_name))


def own_entry(values: ArrayLike, axis_name: AxisName) -> Array:
    """The calling worker's own entry of an array with the shape of the worker axes; a scalar is everybody's.

    Raises:
      NameError: if an axis is not bound where this is called.
      ValueError: if the array has another shape.
    """
    values, names = jnp.asarray(values), axis_names(axis_name)
    sizes = tuple(worker_count(name) for name in names)
    if values.ndim == 0:
        return values
    if values.shape != sizes:
        raise ValueError(f"values a worker must have the shape of the axes {names}, {sizes}, got {values.shape}.")
    return values[tuple(worker_index(name) for name in names)]


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers in a worker's tree are finite; no collective."""
    # Zero times a number is 0 if it is finite, otherwise NaN; a sum is several times faster than a reduction of bools.
    return jnp.isfinite(jnp.stack([jnp.sum(x * 0) for x in jax.tree.leaves(tree)]).sum())


def when(due: Bool[Array, ""], exchange: Callable[[Tree], Tree], tree: Tree, axis_name: AxisName) -> Tree:
    """The tree after the exchange if one is due, and as it is otherwise.

    A real branch, so that nothing is sent in between; a select only where `due` is batched by `jax.vmap`.

    Args:
      due: whether the workers exchange now; the same on all workers, or they wait for each other for ever.
      exchange: takes the tree to one of the same shapes and dtypes; it may call collectives.
      tree: what an exchange changes; no worker axis.
      axis_name: all axes on which workers lie.
    """
    return lax.cond(due, lambda t: _as_own(exchange(t), axis_name), lambda t: _as_own(t, axis_name), tree)


def _as_own(tree: Tree, axis_name: AxisName) -> Tree:
    """Type values that are equal on all workers as each worker's own.

    Under `jax.shard_map` a collective's result is typed as unvarying over its axis, and the branches of a `lax.cond`
    must agree on that. The select is free: both its sides are the same array. (`lax.pcast` is meant for this, but
    fails under `jax.vmap`.)
    """
    here = worker_index(axis_name) >= 0
    return jax.tree.map(lambda x: jnp.where(here, x, x), tree)


def _check_bound(axis_name: AxisName) -> None:
    for name in axis_names(axis_name):
        try:
            lax.axis_size(name)
        except NameError:
            raise NameError(
                f"there is no axis {name!r} here: call this inside jax.shard_map or jax.pmap over an axis of that"
                f" name, or inside jax.vmap(..., axis_name={name!r})."
            ) from None
