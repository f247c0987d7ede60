"""Placement of workers on a mesh of devices, and functions mapped over them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lsgd_jax.distributed.chips import CHIP, specs_of_state
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import ShardSpecs

STACKED = PartitionSpec("group", "worker")
"""Arrays with one entry per worker, [group, worker, ...], each on its worker's device, or on all of its chips."""
SHARED = PartitionSpec()
"""Arrays that are the same for all workers."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the workers are: one per device, on several devices each or, with fewer devices, several in slots of each.

    A worker's group is its index on `group_axes`, and its index in the group is that on `worker_axes`, each flattened.
    The slots of a device are axes of `jax.vmap` inside the `jax.shard_map` over the mesh.
    """

    mesh: Mesh
    """Devices, with the axes ("group", "worker") and, if a worker has several, "chip"."""
    slots: tuple[int, int] = (1, 1)
    """Groups, and workers of each group, per device."""
    shard_specs: ShardSpecs | None = None
    """How one worker's parameters lie over its chips, if it has several."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of groups, and of workers in each."""
        return self.mesh.shape["group"] * self.slots[0], self.mesh.shape["worker"] * self.slots[1]

    @property
    def chips(self) -> int:
        """Number of devices of each worker; 1 also where several workers share a device."""
        return self.mesh.shape.get(CHIP, 1)

    @property
    def group_axes(self) -> tuple[str, ...]:
        """Names of the group axes."""
        return ("group", "group_slot") if self.slots[0] > 1 else ("group",)

    @property
    def worker_axes(self) -> tuple[str, ...]:
        """Names of the axes of the workers within a group."""
        return ("worker", "worker_slot") if self.slots[1] > 1 else ("worker",)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of all workers, group axes first."""
        return self.group_axes + self.worker_axes

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Sizes of `axes`."""
        slots = dict(zip(("group_slot", "worker_slot"), self.slots, strict=True))
        return tuple((dict(self.mesh.shape) | slots)[name] for name in self.axes)

    @cached_property
    def own_workers(self) -> list[int]:
        """Global indices of the workers on this process's devices, in order."""
        positions = np.arange(math.prod(self.shape)).reshape(self.shape)
        parts = self.sharding(STACKED).addressable_devices_indices_map(self.shape).values()
        return np.unique([positions[part] for part in parts if part is not None]).tolist()

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding of arrays that lie like this."""
        return NamedSharding(self.mesh, spec)

    def specs(self, params: Any, state: Any) -> Any:
        """How the states of all workers lie, [group, worker, ...]: `STACKED`, and over chips as parameters do.

        Args:
          params: one worker's, or their shapes and dtypes.
          state: one worker's, a tree of any arrays.
        """
        if self.chips == 1 or self.shard_specs is None:
            return jax.tree.map(lambda _: STACKED, state)
        own = specs_of_state(self.shard_specs, params, state)
        return jax.tree.map(lambda spec: PartitionSpec(*STACKED, *spec), own)

    def batches(self, *, of_steps: bool) -> PartitionSpec:
        """How batches lie: `STACKED`, and their examples over the worker's chips.

        Args:
          of_steps: whether there are batches of several steps, [group, worker, step, example, ...].
        """
        if self.chips == 1:
            return STACKED
        return PartitionSpec(*STACKED, *([None] if of_steps else []), CHIP)

    def put(self, tree: Any, specs: Any) -> Any:
        """Put arrays of this process on the devices of all processes.

        Args:
          tree: `SHARED`: the same arrays in every process; else one entry for each of `own_workers`, [own worker, ...],
            to become [group, worker, ...].
          specs: `SHARED`, or how the arrays lie then: one for all of them, or a tree.
        """
        if specs == SHARED:
            sharding = self.sharding(SHARED)
            return jax.tree.map(
                lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__), tree
            )
        entries = self._entries

        def put_entries(x: Any, spec: PartitionSpec) -> jax.Array:
            x = np.asarray(x)

            def part(index: Any) -> np.ndarray:
                return x[entries[index[:2]], *index[2:]]

            return jax.make_array_from_callback(self.shape + x.shape[1:], self.sharding(spec), part)

        if isinstance(specs, PartitionSpec):
            return jax.tree.map(lambda x: put_entries(x, specs), tree)
        return jax.tree.map(put_entries, tree, specs)

    def take(self, tree: Any) -> Any:
        """A copy on the host of the entries of `own_workers` in stacked arrays: the inverse of `put`.

        Of a worker that is spread over several processes it is the part that lies on this one's devices: see `box`.
        """
        own, entries = len(self.own_workers), self._entries

        def take_entries(x: jax.Array) -> np.ndarray:
            box = self.box(x)
            taken = np.empty((own, *(end - start for start, end in box)), x.dtype)
            for shard in x.addressable_shards:
                held = zip(_bounds(shard.index[2:], x.shape[2:]), box, strict=True)
                within = (slice(start - first, end - first) for (start, end), (first, _) in held)
                taken[entries[shard.index[:2]], *within] = shard.data
            return taken

        return jax.tree.map(take_entries, tree)

    def box(self, x: jax.Array) -> list[tuple[int, int]]:
        """Which part of each own worker's array this process holds: from where to where along each of its axes."""
        held = [_bounds(shard.index[2:], x.shape[2:]) for shard in x.addressable_shards]
        return [(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*held, strict=True)]

    @cached_property
    def _entries(self) -> np.ndarray:
        """Index of each worker [group, worker] in `own_workers`; arbitrary for workers of other processes."""
        entries = np.zeros(self.shape, int)
        entries.flat[self.own_workers] = np.arange(len(self.own_workers))
        return entries

    def parts(self, tree: Any) -> list[Any]:
        """The part of `STACKED` or `SHARED` arrays on the device of each of `own_workers`; nothing is copied.

        Requires one device per worker.
        """

        def part(leaf: jax.Array, device: jax.Device) -> jax.Array:
            return next(shard.data for shard in leaf.addressable_shards if shard.device == device)

        devices = [self.mesh.devices.flat[worker] for worker in self.own_workers]
        return [jax.tree.map(partial(part, device=device), tree) for device in devices]

    def stacked(self, parts: Sequence[Any]) -> Any:
        """The `STACKED` arrays with these `parts`, [1, 1, ...] on each own worker's device; nothing is copied."""

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
          in_specs: `STACKED` or `SHARED`, per argument.
          out_specs: the same per result; `SHARED` results must be the same for all workers.
        """
        in_axes, out_axes = ([0 if spec == STACKED else None for spec in specs] for specs in (in_specs, out_specs))
        # XLA refuses sums over manual axes of which none has several devices, beside the chips that it manages itself.
        is_alone = self.chips > 1 and self.shape == (1, 1)
        names = ("worker", "group") if is_alone else ("worker_slot", "group_slot")
        for name, size in zip(names, reversed(self.slots), strict=True):
            if size > 1 or is_alone:
                function = jax.vmap(function, in_axes, tuple(out_axes), axis_name=name)
            else:
                function = partial(_in_the_only_slot, function, in_axes, out_axes)
        if is_alone:
            return partial(_on_mesh, self.mesh, function)
        # Collectives over a vmapped axis fail with replication checks on.
        checked = self.slots == (1, 1)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={*STACKED}, check_vma=checked
        )

    def wait_for(self, tree: Any) -> None:
        """Wait on the CPU until a program's results are there; call it before the next program is dispatched.

        Simulated devices share a thread pool: two programs with collectives in flight can fill it with threads that
        wait for each other.
        """
        if self.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(tree)


def _bounds(index: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The start and the end of a slice along each axis."""
    return [each.indices(n)[:2] for each, n in zip(index, shape, strict=True)]


def _on_mesh(mesh: Mesh, function: Callable[..., tuple], *arguments: Any) -> tuple:
    """Call a function that tells the compiler how its arrays lie on a mesh."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(*arguments)


def _in_the_only_slot(function: Callable, in_axes: list, out_axes: list, *arguments: Any) -> tuple:
    """Map a function like `jax.vmap` over an axis of size 1, but without naming an axis."""
    own = [
        jax.tree.map(lambda x: x[0], argument) if axis == 0 else argument
        for axis, argument in zip(in_axes, arguments, strict=True)
    ]
    results = function(*own)
    return tuple(
        jax.tree.map(lambda x: x[None], result) if axis == 0 else result
        for axis, result in zip(out_axes, results, strict=True)
    )


def place(
    groups: int,
    workers: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    chips: int = 1,
    shard_specs: ShardSpecs | None = None,
) -> Placement:
    """Place the workers evenly on as many devices as possible, equally many of every process.

    Consecutive workers are in the same process, so that with as many groups as processes each process has one group.

    Args:
      groups: their number.
      workers: in each group.
      devices: None: all devices.
      chips: devices of each worker.
      shard_specs: how a worker's parameters lie over its chips, if it has several.

    Raises:
      UsageError: if there are no devices, or the workers can't be distributed evenly among the processes, or there are
        too few devices for workers of several chips.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"JAX finds no devices ({error}): set JAX_PLATFORMS=cpu, or what there is.") from None
    # By process: `jax.make_mesh` would spread a group over the hosts of a TPU pod, and refuses some of its shapes.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    processes, count = len({device.process_index for device in devices}), groups * workers
    if chips > 1:
        mesh = Mesh(_of_chips(devices, processes, groups, workers, chips), (*STACKED, CHIP), axis_types=_auto(3))
        return Placement(mesh, shard_specs=shard_specs)
    if count % processes:
        raise UsageError(
            f"{count} workers can't be distributed evenly among {processes} processes: change groups or workers."
        )
    sizes = [(g, w) for g in _divisors(groups) for w in _divisors(workers)]
    used = [(g, w) for g, w in sizes if g * w <= len(devices) and g * w % processes == 0]
    mesh_shape = max(used, key=lambda shape: (shape[0] * shape[1], shape[0]))
    of_processes = np.array(devices).reshape(processes, -1)[:, : math.prod(mesh_shape) // processes]
    mesh = Mesh(of_processes.reshape(mesh_shape), (*STACKED,), axis_types=_auto(2))
    return Placement(mesh, (groups // mesh_shape[0], workers // mesh_shape[1]))


def _of_chips(devices: Sequence[jax.Device], processes: int, groups: int, workers: int, chips: int) -> np.ndarray:
    """The devices [group, worker, chip] of workers of several chips.

    Raises:
      UsageError: if there are too few, or they can't be distributed evenly among the processes.
    """
    needed = groups * workers * chips
    if needed > len(devices):
        raise UsageError(
            f"{groups * workers} workers of {chips} chips each need {needed} devices, but there are {len(devices)}:"
            " lower groups, workers or chips_per_worker."
        )
    each, rest = divmod(needed, processes)
    if rest or (each % chips and chips % each):
        raise UsageError(
            f"{groups * workers} workers of {chips} chips each can't be distributed evenly among {processes} processes:"
            " change groups, workers or chips_per_worker."
        )
    return np.array(devices).reshape(processes, -1)[:, :each].reshape(groups, workers, chips)


def _auto(axes: int) -> tuple[AxisType, ...]:
    return (AxisType.Auto,) * axes


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
