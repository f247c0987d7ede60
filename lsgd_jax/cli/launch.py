"""Commands of `lsgd` for the processes of a run: launch several, and join a posted run."""

import functools
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import tyro

from lsgd_jax import distributed, files
from lsgd_jax.checks import check_path
from lsgd_jax.cli.commands import default_run_dir, report_result, train
from lsgd_jax.cli.options import check_spelling, in_a_sentence, refuse, with_presets
from lsgd_jax.cli.overview import own_preset
from lsgd_jax.config import Config
from lsgd_jax.distributed.interruption import stopped_at_once
from lsgd_jax.errors import InUseError, UsageError
from lsgd_jax.tracking.member_folder import alone

RESTARTS = 10
"""Restarts in a row of a process of a posted run, by default."""


def launch(
    command: tyro.conf.Positional[tuple[str, ...]],
    processes: int,
    devices_per_process: int | None = None,
    restarts: int | None = None,
    hang_seconds: float | None = None,
    detach: bool = False,
    join_timeout: int | None = None,
    heartbeat: int | None = None,
) -> int:
    """Train in several processes on this machine, as if on several hosts: lsgd launch --processes 2 -- train mnist1d.

    On SIGINT (Ctrl-C), SIGTERM or SIGHUP the run saves a checkpoint and stops; a second signal stops it immediately.
    With --asynchronous posted, a process that was killed, has crashed or hangs is restarted by itself, while the others
    train on, and a signal to one process stops that one alone.

    Args:
      command: train and its options, after two dashes.
      processes: number of processes.
      devices_per_process: simulated devices per process; by default one per worker.
      restarts: maximum number of restarts from the latest checkpoint after a process was killed or crashed; by default
        none. With --asynchronous posted, restarts in a row of each process, by default 10, with a growing delay.
      hang_seconds: with --asynchronous posted, seconds without a step after which a process is killed and restarted; 0
        for never, by default 300.
      detach: with --asynchronous posted, let the run go on if the launcher itself is killed.
      join_timeout: seconds to wait for processes that are missing at the start; by default LSGD_JOIN_TIMEOUT or 300. No
        effect on posted runs, which wait for nobody.
      heartbeat: seconds without a heartbeat after which a process counts as dead and all end; by default LSGD_HEARTBEAT
        or 100. No effect on posted runs. Too few seconds end a run on a busy machine.
    """
    if command[:1] != ("train",):
        raise UsageError(
            "launch supports only train, as in lsgd launch --processes 2 -- train mnist1d;"
            f" got {command[0] if command else 'no command'}."
        )
    at_least_1 = {"processes": processes, "devices_per_process": devices_per_process}
    of_steps = {"join_timeout": join_timeout, "heartbeat": heartbeat}
    for name, count in (at_least_1 | of_steps).items():
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, got {count}.")
    for name, value in (("restarts", restarts), ("hang_seconds", hang_seconds)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} must be at least 0, got {value}.")
    program = [sys.executable, "-m", "lsgd_jax", *command]
    given = _train_arguments(command)
    config, run_dir = given["options"].checked(), given.get("run_dir")
    if config.asynchronous == "posted":
        from lsgd_jax.distributed.supervision import supervise

        refuse((name for name, seconds in of_steps.items() if seconds is not None), "in posted training")

        if run_dir is None:  # All processes need the same.
            program += ["--run-dir", str(default_run_dir(config))]
        return supervise(
            program,
            processes,
            devices_per_process,
            restarts=RESTARTS if restarts is None else restarts,
            hang_seconds=300.0 if hang_seconds is None else hang_seconds,
            detached=detach,
        )
    for name, has_value in (("hang_seconds", hang_seconds is not None), ("detach", detach)):
        if has_value:
            raise UsageError(f"{name} has no effect unless training is posted.")
    if restarts and run_dir is None:
        raise UsageError("restarts resume in the run's folder: name it with --run-dir.")
    from lsgd_jax.distributed.launch import launch as run_processes

    return run_processes(program, processes, devices_per_process, restarts or 0, **of_steps)


def _train_arguments(command: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `train` that a command line gives."""

    @functools.wraps(train)
    def given(*arguments: Any, **options: Any) -> dict[str, Any]:
        return inspect.signature(train).bind(*arguments, **options).arguments

    own = own_preset(command)
    check_spelling(command, own)
    with in_a_sentence():
        return tyro.cli(
            with_presets(given, own),
            prog="lsgd train",
            args=command[1:],
            config=(tyro.conf.CascadeSubcommandArgs,),
        )


def join(
    run_dir: tyro.conf.Positional[Path],
    workers: int = 1,
    first: int | None = None,
    data_dir: Path | None = None,
    tensorboard: bool = False,
    host: str | None = None,
) -> int:
    """Add a process to a posted run, from any machine that sees its folder: lsgd join runs/a.

    It takes the places of workers whose process has ended or was never started, and starts from the leader's
    parameters. On SIGINT (Ctrl-C), SIGTERM or SIGHUP this process saves its workers and leaves; the others train on.

    Args:
      run_dir: run folder.
      workers: number of consecutive workers of this process.
      first: index of its first worker; by default the first where that many places are vacant.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      tensorboard: also write TensorBoard event files, to a subfolder of the run folder.
      host: address or name of this machine's network interface at which processes on other machines reach this one; by
        default only processes on this machine do.
    """
    from lsgd_jax.tracking.run_folder import read_config

    config = read_config(check_path("run_dir", run_dir))
    if config.asynchronous != "posted":
        raise UsageError(f"only a posted run can be joined, and the one in {run_dir} is not posted.")
    everybody = config.groups * config.workers
    if not 1 <= workers <= everybody:
        raise UsageError(f"workers must be in [1, {everybody}], got {workers}.")
    if first is not None and not 0 <= first <= everybody - workers:
        raise UsageError(f"first must be in [0, {everybody - workers}], got {first}.")
    with stopped_at_once("no step was under way, and the same command joins again"):
        from lsgd_jax.train import train_and_evaluate
        from lsgd_jax.train.posted import LOOPBACK

        distributed.simulate_devices(workers)
        while True:
            own = _vacant(run_dir, config, workers) if first is None else range(first, first + workers)
            try:
                measured = train_and_evaluate(
                    config,
                    run_dir,
                    data_dir=data_dir,
                    resume=True,
                    tensorboard=tensorboard,
                    positions=own,
                    host=host or LOOPBACK,
                )
                break
            except InUseError:  # Another process has taken the place meanwhile.
                if first is not None:
                    raise
        if measured is not None:  # Else another process has evaluated the end.
            report_result(config, run_dir, measured)
    return 0


def _vacant(run_dir: Path, config: Config, workers: int) -> range:
    """The first consecutive workers that no process has.

    Raises:
      UsageError: if there are not so many.
    """
    everybody = config.groups * config.workers
    try:
        with alone(run_dir):  # As those who open it or look into it.
            vacant = [not files.is_locked(run_dir / "workers" / str(position)) for position in range(everybody)]
    except OSError as error:
        raise UsageError(f"{error.filename} can't be opened ({error.strerror}): nobody can join from here.") from None
    for start in range(everybody - workers + 1):
        if all(vacant[start : start + workers]):
            return range(start, start + workers)
    raise UsageError(
        f"there is no place for {workers} consecutive workers in {run_dir}: {everybody - sum(vacant)} of its"
        f" {everybody} workers are training."
    )
