"""Named worker axes: a worker is a position on one, or on several flattened in row-major order.

The same lines run inside `jax.vmap(..., axis_name=...)`, nested `jax.vmap`, `jax.pmap` and `jax.shard_map`.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Int

from lsgd_jax.exchange.trees import select, varying_axes

AxisName: TypeAlias = str | tuple[str, ...]
Tree = TypeVar("Tree")


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names of one or several axes as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def worker_index(axis_name: AxisName) -> Int[Array, ""]:
    """The calling worker's position on the (flattened) axis.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    check_bound(axis_name)
    return lax.axis_index(axis_names(axis_name))


def worker_count(axis_name: AxisName) -> int:
    """The number of workers on the (flattened) axis.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    check_bound(axis_name)
    return lax.axis_size(axis_names(axis_name))


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


def when(due: Bool[Array, ""], exchange: Callable[[Tree], Tree], tree: Tree, axis_name: AxisName) -> Tree:
    """The tree after the exchange if one is due, and as it is otherwise.

    A real branch, so that nothing is sent in between; a select only where `due` is batched by `jax.vmap`.

    Args:
      due: whether the workers exchange now; the same on all workers, or they wait for each other forever.
      exchange: takes the tree to one of the same shapes and dtypes; it may call collectives.
      tree: what an exchange changes; no worker axis.
      axis_name: all axes on which workers lie.
    """
    return lax.cond(due, lambda t: as_own(exchange(t), t, axis_name), lambda t: as_own(t, t, axis_name), tree)


def as_own(tree: Tree, before: Tree, axis_name: AxisName) -> Tree:
    """Type values that are equal on all workers as each worker's own, and varying wherever those before them vary.

    Under `jax.shard_map` a collective's result is typed as unvarying over its axis, and the branches of a `lax.cond`
    must agree on that. The select is free: both its sides are the same array. (`lax.pcast` is meant for this, but
    fails under `jax.vmap`.)
    """
    names = frozenset(axis_names(axis_name))

    @functools.cache
    def true_on(axes: frozenset[str]) -> Bool[Array, ""]:
        return worker_index(tuple(sorted(axes))) >= 0

    return jax.tree.map(lambda x, before: select(true_on(names | varying_axes(before)), x, x), tree, before)


def check_bound(axis_name: AxisName) -> None:
    """Raise NameError unless all axes are bound where this is called."""
    for name in axis_names(axis_name):
        try:
            lax.axis_size(name)
        except NameError:
            raise NameError(
                f"there is no axis {name!r} here: call this inside jax.shard_map or jax.pmap over an axis of that"
                f" name, or inside jax.vmap(..., axis_name={name!r})."
            ) from None
