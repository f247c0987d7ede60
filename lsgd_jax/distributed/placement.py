"""Where the workers are: the mesh that they lie on, and functions mapped over them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lsgd_jax.errors import UsageError

STACKED = PartitionSpec("group", "worker")
"""Arrays with an entry for every worker, [group, worker, ...], each where its worker is."""
SHARED = PartitionSpec()
"""Arrays that are the same for all workers."""


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

    @property
    def own_workers(self) -> list[int]:
        """The positions of the workers on this process's devices, in order."""
        positions = np.arange(math.prod(self.shape)).reshape(self.shape)
        parts = self.sharding(STACKED).addressable_devices_indices_map(self.shape).values()
        return np.unique([positions[part] for part in parts if part is not None]).tolist()

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Of arrays that are `STACKED` or `SHARED`."""
        return NamedSharding(self.mesh, spec)

    def put(self, tree: Any, spec: PartitionSpec) -> Any:
        """Arrays on the devices of all processes, from what each process has.

        Args:
          tree: `STACKED`: an entry for each of `own_workers`, [own worker, ...], which becomes an array
            [group, worker, ...]; `SHARED`: the same arrays on every process.
          spec: which of the two.
        """
        sharding = self.sharding(spec)
        if spec == SHARED:
            return jax.tree.map(
                lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__), tree
            )
        entries = self._entries

        def put_entries(x: Any) -> jax.Array:
            x = np.asarray(x)

            def part(index: Any) -> np.ndarray:
                return x[entries[index[:2]]]

            return jax.make_array_from_callback(self.shape + x.shape[1:], sharding, part)

        return jax.tree.map(put_entries, tree)

    def take(self, tree: Any) -> Any:
        """What `put` would make such `STACKED` arrays of: a copy on the host of the entries of `own_workers`."""
        own, entries = len(self.own_workers), self._entries

        def take_entries(x: jax.Array) -> np.ndarray:
            taken = np.empty((own, *x.shape[2:]), x.dtype)
            for shard in x.addressable_shards:
                taken[entries[shard.index[:2]]] = shard.data
            return taken

        return jax.tree.map(take_entries, tree)

    @property
    def _entries(self) -> np.ndarray:
        """The place of each worker [group, worker] among `own_workers`; of those of other processes, anything."""
        entries = np.zeros(self.shape, int)
        entries.flat[self.own_workers] = np.arange(len(self.own_workers))
        return entries

    def parts(self, tree: Any) -> list[Any]:
        """What of `STACKED` or `SHARED` arrays lies on the device of each of `own_workers`; nothing is copied.

        It needs a device a worker.
        """

        def part(leaf: jax.Array, device: jax.Device) -> jax.Array:
            return next(shard.data for shard in leaf.addressable_shards if shard.device == device)

        devices = [self.mesh.devices.flat[worker] for worker in self.own_workers]
        return [jax.tree.map(partial(part, device=device), tree) for device in devices]

    def stacked(self, parts: Sequence[Any]) -> Any:
        """The `STACKED` arrays of which these are the `parts`, [1, 1, ...] on each own worker's device; not copied."""

        def stack(*arrays: jax.Array) -> jax.Array:
            shape = self.shape + arrays[0].shape[2:]
            return jax.make_array_from_single_device_arrays(shape, self.sharding(STACKED), list(arrays))

        return jax.tree.map(stack, *parts)

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


def place(groups: int, workers: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Put the workers on as many of the devices as can share them evenly, equally many of every process.

    Workers that follow each other lie on one process, so that with as many groups as processes a group is a process's.

    Args:
      groups: of workers.
      workers: in each group.
      devices: None: all that there are.

    Raises:
      UsageError: if there are no devices, or the workers can't be shared out evenly among the processes.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"JAX finds no devices ({error}): set JAX_PLATFORMS=cpu, or what there is.") from None
    # By process: `jax.make_mesh` would put a group across the hosts of a TPU pod, and refuses some shapes of it.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    processes, count = len({device.process_index for device in devices}), groups * workers
    if count % processes:
        raise UsageError(
            f"{count} workers can't be shared out evenly among {processes} processes: change groups or workers."
        )
    sizes = [(g, w) for g in _divisors(groups) for w in _divisors(workers)]
    used = [(g, w) for g, w in sizes if g * w <= len(devices) and g * w % processes == 0]
    mesh_shape = max(used, key=lambda shape: (shape[0] * shape[1], shape[0]))
    of_processes = np.array(devices).reshape(processes, -1)[:, : math.prod(mesh_shape) // processes]
    mesh = Mesh(of_processes.reshape(mesh_shape), ("group", "worker"), axis_types=(AxisType.Auto,) * 2)
    return Placement(mesh, (groups // mesh_shape[0], workers // mesh_shape[1]))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
