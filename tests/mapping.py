"""The ways to put workers on a named axis, behind one call: what a test must not depend on."""

import math
from collections.abc import Callable
from functools import partial

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

GROUPS, WORKERS = 2, 4
MAPPINGS = ("vmap", "pmap", "shard_map", "slots")


def need_devices(count: int) -> None:
    """Skip a test that needs more devices than there are; a GPU is one, while the CPUs simulate eight."""
    if jax.device_count() < count:
        pytest.skip(f"{count} devices are needed, but there are {jax.device_count()}")


def quickest(shape: tuple[int, int] = (GROUPS, WORKERS)) -> str:
    """The mapping that is traced in a third of the time, if there are devices for it."""
    return "shard_map" if jax.device_count() >= math.prod(shape) else "vmap"


def over_workers(function: Callable, mapping: str, shape: tuple[int, int] = (GROUPS, WORKERS)) -> Callable:
    """Map a function over the axes ("group", "worker") of arrays [*shape, ...] and jit it.

    "pmap" has its groups vmapped, "slots" has its workers vmapped within a shard_map over the groups.
    """
    program = mapped(function, mapping, shape)
    # Two programs with collectives in flight can deadlock on simulated devices, which share a pool of threads.
    return lambda *arguments: jax.block_until_ready(program(*arguments))


def mapped(function: Callable, mapping: str, shape: tuple[int, int] = (GROUPS, WORKERS)) -> Callable:
    inner = jax.vmap(function, axis_name="worker")
    if mapping == "vmap":
        return jax.jit(jax.vmap(inner, axis_name="group"))
    if mapping == "pmap":
        need_devices(shape[1])
        grouped = jax.vmap(function, axis_name="group")
        return jax.pmap(grouped, axis_name="worker", in_axes=1, out_axes=1)
    axes = ("group", "worker") if mapping == "shard_map" else ("group",)
    sizes = shape[: len(axes)]
    need_devices(math.prod(sizes))
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    spec = PartitionSpec(*axes)

    def on_device(*stacked):
        own = jax.tree.map(lambda x: x.reshape(x.shape[len(axes) :]), stacked)
        result = function(*own) if mapping == "shard_map" else inner(*own)
        return jax.tree.map(lambda x: x.reshape((1,) * len(axes) + x.shape), result)

    checked = mapping == "shard_map"  # Collectives over a vmapped axis need the replication checks off.
    return jax.jit(partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=checked)(on_device))
