"""Ahead-of-time compilation of the training step for a TPU topology, to read its communication, memory and FLOPs.

libtpu compiles for a topology on any machine without TPUs; the data set need not be prepared either.
"""

import importlib.util
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered

from lsgd_jax.config import Config
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, STACKED, Placement
from lsgd_jax.errors import UsageError
from lsgd_jax.train.setup import feed_from, make_model, make_optimizer, step_key, steps_per_call
from lsgd_jax.train.step import TrainState, local_steps
from lsgd_jax.train.task_checks import check_functions, raised_by


def described_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology, to compile for.

    Call it before JAX is used: it keeps JAX from looking for TPUs of this machine.

    Args:
      topology: TPU type and chips along each axis, such as v5e:16x16.

    Raises:
      UsageError: if there is no such topology, or libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("compiling for TPUs needs libtpu: pip install 'lsgd-jax[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    # Otherwise libtpu looks for these on this machine; any type will do, since the topology is what counts.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # It would lock the machine's TPUs, which are not used here.
    }
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"there is no TPU topology {topology!r}, as v5e:2x4 and v5e:16x16 are: {error}") from None


def lowered_steps(config: Config, placement: Placement) -> Lowered:
    """The program that `lsgd_jax.train` runs, lowered but not compiled: some local steps with their exchanges.

    Args:
      config: of the run.
      placement: of its workers, on devices that need not exist.

    Raises:
      UsageError: if the configuration does not fit the data.
    """
    feed = blank_feed(config)
    model = nnx.eval_shape(lambda: make_model(config))
    check_functions(config.task, model, feed, config.worker_batch_size)
    optimizer = make_optimizer(config, placement)
    _, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    one_worker = TrainState(params, statistics, jax.eval_shape(optimizer.init, params))

    def shaped(tree: object, spec: PartitionSpec, axes: tuple[int, ...] = ()) -> object:
        sharding = NamedSharding(placement.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(axes + x.shape, x.dtype, sharding=sharding), tree)

    batch = shaped(feed.batch, STACKED, (*placement.shape, steps_per_call(config)))
    numbers = np.int32(0), np.float32(1), jax.eval_shape(step_key, config.seed)
    program = local_steps(config.task, model, optimizer, placement, feed)
    state = shaped(one_worker, STACKED, placement.shape)
    return program.lower(state, shaped(feed.shared, SHARED), batch, *numbers)


def compile_steps(lowered: Lowered) -> Compiled:
    """The program compiled for its devices.

    Raises:
      UsageError: if it does not fit into their memory, or the compiler fails in another way.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"the devices can't run it: {str(error).splitlines()[0]}") from None


def parameter_shapes(config: Config) -> Any:
    """The shapes and dtypes of one worker's parameters; nothing is computed.

    Raises:
      UsageError: if the network does not fit the data.
    """
    return nnx.state(nnx.eval_shape(lambda: make_model(config)), nnx.Param)


def blank_feed(config: Config) -> Feed:
    """The feed that the configuration would have, with blank examples that take no memory.

    Raises:
      UsageError: if the data set is too small for the workers and their batches.
    """
    with raised_by(config.task, "blank"):
        data = config.task.blank()
    return feed_from(config, data)


def spread(groups: int | None, workers: int | None, devices: Sequence[jax.Device]) -> tuple[int, int]:
    """The numbers of groups and of workers per group that put one worker on every device.

    Args:
      groups: None: as many as fit with `workers`; one per host if both are None.
      workers: per group; None: as many as fit with `groups`.
      devices: to have one worker each.

    Raises:
      UsageError: if there are not as many workers as devices.
    """
    count = len(devices)
    if groups is None:
        groups = count // workers if workers else len({device.process_index for device in devices})
    if workers is None:
        workers = count // groups if groups > 0 else 0
    if groups * workers != count:
        raise UsageError(
            f"there must be a worker on each of the {count} devices, got groups of workers {groups} x {workers}."
        )
    return groups, workers


def report(compiled: Compiled) -> str:
    """Communication, memory and cost of one run of the program on each device, as text."""
    counts = Counter((*each[:3], each.times, each.conditional) for each in collectives(compiled.as_text() or ""))
    lines = ["collectives", f"  {'':14} {'bytes':>14} {'devices':>8} {'times':>6}"]
    largest_first = sorted(counts.items(), key=lambda item: (-item[0][1], item[0][2]))
    for (kind, size, among, times, conditional), count in largest_first:
        often = "?" if times is None else times * count
        lines.append(f"  {kind:14} {size:14,} {among:8} {often:>6}  {'at most' if conditional else ''}".rstrip())
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    on_device = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "outputs in place of arguments": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    lines += ["bytes on each device", *(f"  {name:29} {size:15,}" for name, size in on_device.items())]
    lines.append("cost on each device, a loop's body counted once")
    return "\n".join([*lines, *(f"  {name:29} {round(cost[name]):15,}" for name in ("flops", "bytes accessed"))])
