"""Workers that are spread over several devices: each device sends its own shards, and nothing is gathered.

A worker can be a sharded model: its arrays lie over further mesh axes, the *inner* axes, which the `jax.shard_map` over
the workers leaves to the compiler. Whatever flattens or cuts such arrays would gather them first. Mapped once more,
over the inner axes, the same lines see the shards of one device.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from lsgd_jax.exchange.axes import AxisName, axis_names
from lsgd_jax.exchange.trees import checks_replication, like

ShardSpecs: TypeAlias = Callable[[Any], Any]
"""From a tree of one worker's arrays to a tree of their PartitionSpecs over the inner axes."""


def largest_axis(tree: Any, axis_name: AxisName, size: int) -> Any:
    """Shard each array along its largest axis that the devices divide, and replicate those that have none.

    Args:
      tree: arrays, or their shapes and dtypes; no worker axis.
      axis_name: the inner axis, or the inner axes.
      size: number of devices on them.

    Returns:
      A tree of PartitionSpecs.

    Example:
      >>> import jax.numpy as jnp
      >>> largest_axis({"w": jnp.zeros((3, 8, 4)), "b": jnp.zeros(3)}, "chip", 2)
      {'b': P(), 'w': P(None, 'chip')}
    """

    def spec(x: Any) -> PartitionSpec:
        divided = [axis for axis, n in enumerate(x.shape) if n and n % size == 0]
        if size == 1 or not divided:
            return PartitionSpec()
        return PartitionSpec(*[None] * max(divided, key=lambda axis: (x.shape[axis], -axis)), axis_name)

    return jax.tree.map(spec, tree)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of one of a worker's arrays a device has."""

    shape: tuple[int, ...]
    """Shape of the whole array."""
    spec: PartitionSpec
    """How it lies over the inner axes."""

    def names(self, *axes: int) -> tuple[str, ...]:
        """The inner axes over which these axes of the array are sharded."""
        entries = [self.spec[axis] for axis in axes if axis < len(self.spec)]
        return tuple(name for entry in entries if entry is not None for name in axis_names(entry))

    @property
    def all_names(self) -> tuple[str, ...]:
        """The inner axes over which the array is sharded."""
        return self.names(*range(len(self.shape)))


def inner_axes() -> dict[str, int]:
    """The sizes of the mesh axes that are left to the compiler here, by name; those of one device do not count."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: n for name, n in mesh.shape.items() if name not in mesh.manual_axes and n > 1}


def specs_of(
    tree: Any, axis_name: AxisName, shard_specs: ShardSpecs | None, *, by_largest_axis: bool
) -> list[PartitionSpec] | None:
    """How the arrays of a tree lie over the inner axes; None if they are whole here, or nobody knows how they lie.

    Args:
      tree: one worker's arrays.
      axis_name: the axis, or the axes, on which the workers lie.
      shard_specs: how they lie over Auto axes. How they lie over Explicit axes, their types say.
      by_largest_axis: whether arrays of which nobody knows it are taken to lie as `largest_axis` has it; those that do
        not are moved there first.
    """
    inner, manual = inner_axes(), jax.sharding.get_abstract_mesh().manual_axes
    if not inner or not set(axis_names(axis_name)) & set(manual):
        return None
    if shard_specs is not None:
        return jax.tree.leaves(like(tree, shard_specs(tree)))
    typed = [jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree)]
    if any(entry is not None for spec in typed for entry in spec):
        return typed
    if by_largest_axis:
        return jax.tree.leaves(largest_axis(tree, tuple(inner), math.prod(inner.values())))
    return None


def by_shard(
    send: Callable[..., list[Array]],
    specs: list[PartitionSpec] | None,
    method: str,
    root: Int[Array, ""],
    *lists: list[Array],
) -> list[Array]:
    """Send arrays to all workers, each device its own shards.

    Args:
      send: `send(method, shards, root, *lists)` returns an array like each of the first list.
      specs: how the arrays lie over the inner axes; None: as if all were whole.
      method: of the broadcast. If some arrays are sharded, those that are not go by an all-reduce.
      root: of the broadcast.
      *lists: arrays, in every list of the same shapes.
    """
    shapes = [x.shape for x in lists[0]]
    shards = [Shard(shape, spec) for shape, spec in zip(shapes, specs or [PartitionSpec()] * len(shapes), strict=True)]
    sharded = [i for i, shard in enumerate(shards) if shard.all_names]
    if not sharded:
        return send(method, shards, root, *lists)
    whole = [i for i, shard in enumerate(shards) if not shard.all_names]
    own = [shards[i] for i in sharded]

    def on_one_device(root: Array, *lists: list[Array]) -> list[Array]:
        return send(method, own, root, *lists)

    inner, lying = {name for shard in own for name in shard.all_names}, [shard.spec for shard in own]
    mapped = jax.shard_map(
        on_one_device,
        in_specs=(PartitionSpec(), *[lying] * len(lists)),
        out_specs=lying,
        axis_names=inner,
        check_vma=checks_replication(jax.sharding.get_abstract_mesh().manual_axes),  # As the map over the workers does.
    )
    received = dict(zip(sharded, mapped(root, *[[arrays[i] for i in sharded] for arrays in lists]), strict=True))
    if whole:
        rest = send("all_reduce", [shards[i] for i in whole], root, *[[arrays[i] for i in whole] for arrays in lists])
        received |= zip(whole, rest, strict=True)
    return [received[i] for i in range(len(shards))]
