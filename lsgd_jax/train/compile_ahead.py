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
from lsgd_jax.costs.ledger import share_bytes
from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, Placement
from lsgd_jax.errors import UsageError
from lsgd_jax.train.setup import feed_from, make_model, make_optimizer, program_of, step_key, steps_per_call
from lsgd_jax.train.step import state_shapes
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
        raise UsageError("compiling for TPUs needs libtpu: pip install 'jax[tpu]'.")
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

    def shaped(tree: object, spec: PartitionSpec, axes: tuple[int, ...] = ()) -> object:
        sharding = NamedSharding(placement.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(axes + x.shape, x.dtype, sharding=sharding), tree)

    batch = shaped(feed.batch, placement.batches(of_steps=True), (*placement.shape, steps_per_call(config)))
    numbers = np.int32(0), np.float32(1), jax.eval_shape(step_key, config.seed)
    program = program_of(config, model, optimizer, placement, feed)
    state = state_shapes(model, optimizer, placement)
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


def spread(groups: int | None, workers: int | None, devices: Sequence[jax.Device], chips: int = 1) -> tuple[int, int]:
    """The numbers of groups and of workers per group that put a worker on every device, or on so many chips.

    Args:
      groups: None: as many as fit with `workers`; if both are None, one per host or, with one worker per host, one.
      workers: per group; None: as many as fit with `groups`.
      devices: to be part of one worker each.
      chips: devices of each worker.

    Raises:
      UsageError: if the workers do not take all devices.
    """
    count, rest = divmod(len(devices), chips)
    if rest:
        raise UsageError(f"chips_per_worker must divide the {len(devices)} devices, got {chips}.")
    if groups is None:
        hosts = len({device.process_index for device in devices})
        of_hosts = chips == 1 or (count % hosts == 0 and count > hosts)
        groups = count // workers if workers else (hosts if of_hosts else 1)
    if workers is None:
        workers = count // groups if groups > 0 else 0
    if groups * workers != count:
        each = f"{chips} of the {len(devices)} devices" if chips > 1 else f"of the {count} devices"
        raise UsageError(f"there must be a worker on each {each}, got groups of workers {groups} x {workers}.")
    return groups, workers


def share_report(compiled: Compiled, config: Config) -> str:
    """What each chip of a worker sends to other workers, beside what it holds of the parameters, as text.

    Args:
      compiled: the program.
      config: for which it is.
    """
    found, steps = collectives(compiled.as_text() or "", config.chips_per_worker), steps_per_call(config)
    among = sum(each.bytes * (each.times or 0) / steps for each in found if not each.within_worker)
    share = share_bytes(config, parameter_shapes(config))
    return (
        f"among workers, in a step with all exchanges: {among:,.0f} bytes per chip,"
        f" which holds {share:,} bytes of the parameters"
    )


def report(compiled: Compiled, chips: int = 1) -> str:
    """Communication, memory and cost of one run of the program on each device, as text.

    Args:
      compiled: the program.
      chips: devices of each worker.
    """
    found = collectives(compiled.as_text() or "", chips)
    counts = Counter((*each[:3], each.times, each.within_worker, each.conditional) for each in found)
    lines = ["collectives", f"  {'':14} {'bytes':>14} {'devices':>8} {'times':>6}"]
    largest_first = sorted(counts.items(), key=lambda item: (-item[0][1], item[0][2]))
    for (kind, size, among, times, within, conditional), count in largest_first:
        often = "?" if times is None else times * count
        notes = f"{'at most' if conditional else '':8} {'within a worker' if within else ''}"
        lines.append(f"  {kind:14} {size:14,} {among:8} {often:>6}  {notes}".rstrip())
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
