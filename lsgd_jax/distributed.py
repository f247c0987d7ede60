"""Devices, the mesh that the workers lie on, and functions mapped over the workers."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lsgd_jax.errors import UsageError

STACKED = PartitionSpec("group", "worker")
"""Arrays with an entry for every worker, [group, worker, ...], each where its worker is."""
SHARED = PartitionSpec()
"""Arrays that are the same for all workers."""


def simulate_devices(count: int) -> None:
    """Let the CPU act as that many devices, unless the user's environment says how many it is.

    Call it before JAX is used: the number is fixed once a device has been asked for. GPUs and TPUs stay what they are.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", count)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the workers are: one a device or, where devices are fewer, several in the slots of one.

    A worker's group is its position on `group_axes`, and its position in the group that on `worker_axes`, each
    flattened. The slots of a device are axes of `jax.vmap`, within the `jax.shard_map` over the mesh.
    """

    mesh: Mesh
    """With the axes ("group", "worker")."""
    slots: tuple[int, int] = (1, 1)
    """Groups and workers of each group on every device."""

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and workers in each."""
        return self.mesh.shape["group"] * self.slots[0], self.mesh.shape["worker"] * self.slots[1]

    @property
    def group_axes(self) -> tuple[str, ...]:
        """The axes on which the groups lie."""
        return ("group", "group_slot") if self.slots[0] > 1 else ("group",)

    @property
    def worker_axes(self) -> tuple[str, ...]:
        """The axes on which the workers of a group lie."""
        return ("worker", "worker_slot") if self.slots[1] > 1 else ("worker",)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes on which all workers lie, groups first."""
        return self.group_axes + self.worker_axes

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """The sizes of `axes`."""
        slots = dict(zip(("group_slot", "worker_slot"), self.slots, strict=True))
        return tuple((dict(self.mesh.shape) | slots)[name] for name in self.axes)

    def put(self, tree: Any, spec: PartitionSpec) -> Any:
        """Arrays on the devices: `STACKED`, an entry [group, worker, ...] for every worker, or `SHARED`."""
        return jax.device_put(tree, NamedSharding(self.mesh, spec))

    def over_workers(
        self, function: Callable[..., tuple], in_specs: tuple[PartitionSpec, ...], out_specs: tuple[PartitionSpec, ...]
    ) -> Callable[..., tuple]:
        """Map one worker's function over all workers.

        Args:
          function: takes and returns trees without worker axes, and may call collectives over `axes`.
          in_specs: `STACKED` or `SHARED`, for each argument.
          out_specs: the same for each result; what is `SHARED` must be the same for all workers.
        """
        in_axes, out_axes = ([0 if spec == STACKED else None for spec in specs] for specs in (in_specs, out_specs))
        for name, size in zip(("worker_slot", "group_slot"), reversed(self.slots), strict=True):
            if size > 1:
                function = jax.vmap(function, in_axes, tuple(out_axes), axis_name=name)
            else:
                function = partial(_in_the_only_slot, function, in_axes, out_axes)
        # Collectives over a vmapped axis fail with replication checks on.
        checked = self.slots == (1, 1)
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=checked)

    def wait_for(self, tree: Any) -> None:
        """Wait on the CPU until a program's results are there; call it before the next program is dispatched.

        Simulated devices share a pool of threads: two programs with collectives in flight can fill it with threads
        that wait for each other.
        """
        if self.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(tree)


def _in_the_only_slot(function: Callable, in_axes: list, out_axes: list, *arguments: Any) -> tuple:
    """What `jax.vmap` does to the arguments and results, for an axis of one entry and without an axis."""
    own = [
        jax.tree.map(lambda x: x[0], argument) if axis == 0 else argument
        for axis, argument in zip(in_axes, arguments, strict=True)
    ]
    results = function(*own)
    return tuple(
        jax.tree.map(lambda x: x[None], result) if axis == 0 else result
        for axis, result in zip(out_axes, results, strict=True)
    )


def place(groups: int, workers: int) -> Placement:
    """Put the workers on as many of the devices as can share them evenly.

    Raises:
      UsageError: if there are no devices.
    """
    try:
        devices = jax.devices()
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"JAX finds no devices ({error}): set JAX_PLATFORMS=cpu, or what there is.") from None
    used = [(g, w) for g in _divisors(groups) for w in _divisors(workers) if g * w <= len(devices)]
    mesh_shape = max(used, key=lambda shape: (shape[0] * shape[1], shape[0]))
    count = mesh_shape[0] * mesh_shape[1]
    axis_types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(mesh_shape, ("group", "worker"), axis_types=axis_types, devices=devices[:count])
    return Placement(mesh, (groups // mesh_shape[0], workers // mesh_shape[1]))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
