"""A worker of several chips: its parameters and optimizer state are sharded over them, and so are its batches (FSDP).

The worker axes of the mesh are manual, and the axis of a worker's chips is left to the compiler (Auto), so that one
training step serves workers of one chip and of many. What the compiler is told is here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from lsgd_jax.config import Config
from lsgd_jax.exchange import ShardSpecs, largest_axis

CHIP = "chip"
"""The mesh axis of a worker's chips."""
Tree = TypeVar("Tree")


def shard_specs(config: Config) -> ShardSpecs:
    """How a worker's parameters lie over its chips: each array along its largest axis that the chips divide."""
    return partial(largest_axis, axis_name=CHIP, size=config.chips_per_worker)


def specs_of_state(shard_specs: ShardSpecs, params: Any, state: Any) -> Any:
    """How one worker's state lies over its chips: each array as the parameter that it belongs to, all others whole.

    An array belongs to the parameter of its shape whose path its own path ends with, as a momentum does.

    Args:
      shard_specs: how the parameters lie.
      params: one worker's, or their shapes and dtypes.
      state: any tree of arrays, or their shapes and dtypes, such as an optimizer's state.

    Returns:
      A tree of PartitionSpecs over `CHIP`.
    """
    specs = jax.tree.leaves(shard_specs(params))
    of_params = {
        (path, x.shape): spec
        for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True)
    }

    def spec(path: tuple, x: Any) -> PartitionSpec:
        ends = ((path[start:], x.shape) for start in range(len(path) + 1))
        return next((of_params[end] for end in ends if end in of_params), PartitionSpec())

    return jax.tree_util.tree_map_with_path(spec, state)


def over_chips(batch: Tree) -> Tree:
    """A worker's batch, its examples sharded over the worker's chips; as it is for workers of one chip."""
    return jax.lax.with_sharding_constraint(batch, PartitionSpec(CHIP)) if _has_chips() else batch


def fully_sharded(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """A function of sharded parameters that computes with whole ones (FSDP); as it is for workers of one chip.

    Each array is gathered where it is used, and for the gradient again, so that no chip keeps all of them.
    """
    if not _has_chips():
        return function

    def gathering(params: Any, *arguments: Any) -> Tree:
        return function(jax.lax.with_sharding_constraint(params, PartitionSpec()), *arguments)

    return jax.checkpoint(gathering, policy=lambda primitive, *_, **__: primitive.name != "sharding_constraint")


def _has_chips() -> bool:
    return CHIP in jax.sharding.get_abstract_mesh().axis_names
