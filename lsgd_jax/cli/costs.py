"""The commands `lsgd info` and `lsgd compile`: what runs cost, before they are run."""

from pathlib import Path

import jax

from lsgd_jax import distributed
from lsgd_jax.cli.options import CHECKPOINTS, TUNING, UnplacedOptions
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import find
from lsgd_jax.tracking.output import say


def info(
    bytes: str | None = None,
    memory: str | None = None,
    chips_per_worker: int | None = None,
) -> None:
    """Print versions and devices, or the communication cost or the memory of a preset.

    Args:
      bytes: preset, or one of your own, for which to print the bytes per worker per exchange and per step, by method.
      memory: preset, or one of your own, for which to print the bytes that each device holds of a worker's state, by
        method and option.
      chips_per_worker: with --memory, devices of each worker; by default those of the preset.
    """
    if chips_per_worker is not None and memory is None:
        raise UsageError("chips_per_worker has no effect without --memory.")
    if memory is not None and bytes is not None:
        raise UsageError("info prints --bytes or --memory: leave out one of them.")
    if memory is not None:
        from lsgd_jax.costs.memory import table as memory_table

        config = find(memory)
        try:
            config = config if chips_per_worker is None else config.replace(chips_per_worker=chips_per_worker)
        except ValueError as error:
            raise UsageError(str(error)) from None
        distributed.simulate_devices(config.groups * config.workers * config.chips_per_worker)
        print(memory_table(config))
        return
    if bytes is None:
        from lsgd_jax.tracking.environment import environment

        for name, value in environment().items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            say(f"{name:<10}{text}", indent=10)
        return
    config = find(bytes)
    from lsgd_jax.costs.ledger import table
    from lsgd_jax.train.compile_ahead import parameter_shapes

    params = parameter_shapes(config)
    workers = f"{config.groups} x {config.workers} workers"
    print(f"{config.task}, {workers}, {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters\n")
    print(table(config, params))


def compile_ahead(options: UnplacedOptions, topology: str, hlo: Path | None = None) -> None:
    """Compile a preset ahead of time for a TPU topology; report communication, memory and FLOPs. No TPU needed.

    It needs libtpu (pip install 'jax[tpu]'), but not the data set.

    Args:
      options: preset and overrides; each device has one worker, or --chips-per-worker devices have.
      topology: TPU kind and number of chips along each axis, like v5e:16x16.
      hlo: output file for the text of the compiled program (HLO).
    """
    from lsgd_jax.train import compile_ahead
    from lsgd_jax.train.setup import place_workers

    if options.asynchronous is not None:
        raise UsageError("compile supports only synchronous training: asynchronous is for train.")
    options.refuse((*TUNING, *CHECKPOINTS), "in compile")
    try:
        if hlo is not None:
            hlo.touch()  # Before the compilation, which takes minutes.
    except OSError as error:
        raise UsageError(f"{hlo} can't be written ({error.strerror}): name another file with --hlo.") from None
    devices = compile_ahead.described_devices(topology)
    chips = options.chips_per_worker
    if chips < 1:
        raise UsageError(f"chips_per_worker must be at least 1, got {chips}.")
    groups, workers = compile_ahead.spread(options.groups, options.workers, devices, chips)
    placed = options.checked(groups=groups, workers=workers)
    compiled = compile_ahead.compile_steps(compile_ahead.lowered_steps(placed, place_workers(placed, devices)))
    try:
        if hlo is not None:
            hlo.write_text(compiled.as_text() or "")
    except OSError as error:
        raise UsageError(f"{hlo} can't be written ({error.strerror}).") from None
    steps, kind = compile_ahead.steps_per_call(placed), devices[0].device_kind
    print(f"one program of {steps} local steps of {placed.method} for {topology}, {len(devices)} devices ({kind})")
    print(f"groups: {groups}, workers in each: {workers}" + (f", chips of each worker: {chips}" if chips > 1 else ""))
    print(compile_ahead.report(compiled, chips))
    if chips > 1:
        print(compile_ahead.share_report(compiled, placed))
