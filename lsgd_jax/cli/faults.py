"""The commands `lsgd chaos`, which injects faults into a run, and `lsgd replay`, which checks what came of it."""

import math
import sys
import time
from pathlib import Path

import tyro

from lsgd_jax import distributed, files
from lsgd_jax.cli.options import TUNING, Options
from lsgd_jax.errors import UsageError


def replay(run: tyro.conf.Positional[Path], data_dir: Path | None = None) -> int:
    """Train a run of --asynchronous posted again from its events, and compare all parameters to the bit.

    The exit code is 1 if they differ. They may on another machine, or with other versions of JAX.

    Args:
      run: run folder.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    from lsgd_jax.simulate import replay

    distributed.simulate_devices(replay.device_count(run))
    replayed = replay.replay(run, data_dir)
    print(replayed)
    return 1 if replayed.differences else 0


def chaos(
    options: Options,
    minutes: float = 5.0,
    faults_per_hour: float = 120.0,
    processes: int | None = None,
    plan: Path | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
) -> int:
    """Train a preset with --asynchronous posted, inject faults into its processes, and sum up what they did.

    For example: lsgd chaos digits --groups 1 --workers 4 --minutes 2 --min-step-seconds 0.02. Processes are killed,
    stopped, cut off from each other, slowed down, and can't write files, on Linux. The first tenth of the time is
    without faults, for comparison. In the end the run is replayed; the exit code is 1 if parameters differ, or if a
    worker died although nothing was done to it. The seed determines the faults, too.

    Args:
      options: preset and overrides.
      minutes: duration, after all processes have begun to train.
      faults_per_hour: mean number of random faults per hour.
      processes: number of processes; by default one per worker.
      plan: file with the faults, in place of random ones. A line has the seconds since the start, the kind (kill, stop,
        partition, slow or disk), the processes, and how many seconds it lasts: 12.5 kill leader, or 20 stop 0,3 2.5.
      out: output folder: a new one, by default under runs/.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    from lsgd_jax import chaos as room
    from lsgd_jax.chaos import run

    if sys.platform != "linux":
        raise UsageError(f"chaos needs Linux, got {sys.platform}.")
    if options.asynchronous not in (None, "posted"):
        raise UsageError(f"chaos supports only posted training, got {options.asynchronous}.")
    options.refuse(TUNING, "in chaos")
    given = options.given | {"asynchronous": "posted"}
    if "steps" not in given and not options.base.rate_depends_on_steps:
        given["steps"] = run.STEPS
    try:
        config = options.base.replace(**given)
    except ValueError as error:
        raise UsageError(str(error)) from None
    workers = config.groups * config.workers
    processes = workers if processes is None else processes
    if not 2 <= processes <= workers or workers % processes:
        raise UsageError(f"processes must be at least 2 and divide the {workers} workers, got {processes}.")
    if not 0 < minutes < math.inf:
        raise UsageError(f"minutes must be positive, got {minutes}.")
    if not 0 <= faults_per_hour < math.inf:
        raise UsageError(f"faults_per_hour must be at least 0, got {faults_per_hour}.")
    seconds = 60 * minutes
    quiet = seconds / 10
    if plan is None:
        faults = room.plan(processes, seconds=seconds, per_hour=faults_per_hour, quiet=quiet, seed=config.seed)
    else:
        faults = room.read_plan(plan, processes)
        quiet = min([seconds, *(fault.at for fault in faults)])
    out = out or Path("runs") / f"chaos-{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    files.check_writable(out)
    if any(out.iterdir()):
        raise UsageError(f"the folder {out} is not empty: name another with --out.")
    outcome = run.chaos(
        run.arguments_of(options.preset, given),
        config,
        processes,
        [fault for fault in faults if fault.at < seconds],
        out,
        seconds=seconds,
        quiet=quiet,
        data_dir=data_dir,
        message=lambda sentence: print(sentence, flush=True),
    )
    text = run.write(outcome, config.task.headline.title, " ".join(["lsgd", *sys.argv[1:]]), out)
    print(f"\n{text}see {out}")
    return 0 if outcome.is_equal and not outcome.summary.ended else 1
