"""Sums and means over the workers, by all-reduces."""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from lsgd_jax.exchange.axes import AxisName, axis_names, check_bound, worker_count
from lsgd_jax.exchange.trees import nearest, wide

Tree = TypeVar("Tree")


class Members(NamedTuple):
    """Which workers a mean is of."""

    includes: Bool[Array, ""]
    """Whether it is of this worker, too."""
    number: Int[Array, ""]
    """How many workers it is of, the same on all."""


def total(tree: Tree, axis_name: AxisName) -> Tree:
    """The sum of a tree over the workers: one all-reduce.

    Args:
      tree: arrays of the same shapes on every worker; no worker axis.
      axis_name: the axis, or the axes, on which the workers lie.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    check_bound(axis_name)
    add = partial(lax.psum, axis_name=axis_names(axis_name))

    def add_wide(tree: Tree) -> Tree:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), add(wide), tree)

    # On CPUs XLA itself adds bfloat16 in float32, but aborts at it where a worker is spread over several devices.
    return lax.platform_dependent(tree, cpu=add_wide, default=add)


def mean(tree: Tree, axis_name: AxisName, members: Members | None = None) -> Tree:
    """The mean of a tree over the workers: one all-reduce.

    Args:
      tree: arrays of the same shapes on every worker; no worker axis.
      axis_name: the axis, or the axes, on which the workers lie.
      members: the workers whose mean it is; nothing of the others leaks, NaN or not. None: all workers.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    return _divided(total(_of_members(tree, members), axis_name), axis_name, members)


def rounded_mean(tree: Tree, center: Tree, axis_name: AxisName, members: Members | None = None) -> Tree:
    """The mean of a tree over the workers, sent in bfloat16: one all-reduce of half the bytes of float32.

    What is summed is each worker's difference to a center that all share, so that the error is relative to how far
    workers have moved and not to the size of their parameters; what is rounded away is lost.

    Args:
      tree: floats or complex numbers, of the same shapes on every worker; no worker axis.
      center: the same on all workers.
      axis_name: the axis, or the axes, on which the workers lie.
      members: as for `mean`.

    Raises:
      NameError: if the axis is not bound where this is called.
    """

    def rounded(x: Array, c: Array) -> list[Array]:
        apart = wide(x) - wide(c)
        parts = [apart.real, apart.imag] if jnp.iscomplexobj(apart) else [apart]
        return [nearest(part, jnp.bfloat16).astype(jnp.bfloat16) for part in parts]

    def moved(c: Array, parts: list[Array]) -> Array:
        real = [part.astype(jnp.finfo(c.dtype).dtype if c.dtype.itemsize > 2 else jnp.float32) for part in parts]
        apart = _divided(lax.complex(*real) if len(real) == 2 else real[0], axis_name, members)
        return (wide(c) + apart).astype(c.dtype)

    sums = total(_of_members(jax.tree.map(rounded, tree, center), members), axis_name)
    return jax.tree.map(moved, center, sums)


def _of_members(tree: Tree, members: Members | None) -> Tree:
    """The tree, zero where the worker is not a member."""
    return tree if members is None else jax.tree.map(lambda x: jnp.where(members.includes, x, 0), tree)


def _divided(sums: Tree, axis_name: AxisName, members: Members | None) -> Tree:
    """Sums over the members, or over all workers, by their number."""
    if members is None:
        workers = worker_count(axis_name)
        return jax.tree.map(lambda x: x / workers, sums)
    return jax.tree.map(lambda x: x / members.number.astype(x.dtype), sums)
