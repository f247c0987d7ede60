"""Runs a posted run, injects faults into it, sums up what came of it, and replays it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from lsgd_jax import files
from lsgd_jax.asynchronous.links import LINKS
from lsgd_jax.chaos.faults import Fault
from lsgd_jax.chaos.injector import Injector
from lsgd_jax.chaos.summary import Summary, summarize
from lsgd_jax.config import Config
from lsgd_jax.distributed.interruption import deferred_signals
from lsgd_jax.errors import Interrupted, RunFailed, UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.run_folder import read_metrics

LSGD = (sys.executable, "-m", "lsgd_jax")
STEPS = 10**8
"""Steps of a run that is to end by the clock."""
STOP = 60.0
"""Seconds in which they must have ended when they are asked to."""
TICK = 0.05
"""Seconds between two looks at what is due."""


class Outcome(NamedTuple):
    """What came of a run with faults."""

    summary: Summary
    replayed: str
    """The replay's verdict, as text."""
    is_equal: bool
    """Whether all parameters that were replayed were equal to the bit."""


def chaos(
    command: Sequence[str],
    config: Config,
    processes: int,
    plan: Sequence[Fault],
    out: Path,
    *,
    seconds: float,
    quiet: float,
    data_dir: Path | None = None,
    message: Callable[[str], None],
) -> Outcome:
    """Launch a posted run, inject faults, sum up and replay.

    Writes to `out` the run folder `run`, what the processes printed and the faults (`faults.jsonl`).

    Args:
      command: of the run: `train`, its preset and options.
      config: of the run.
      processes: their number; each has equally many workers.
      plan: the faults.
      out: empty folder.
      seconds: of the run, after all workers have begun to train.
      quiet: of them, seconds at the start in which the plan has no fault.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      message: takes sentences on what happens.

    Raises:
      RunFailed: if not all workers begin to train, or the run ends before its time.
      Interrupted: if SIGINT, SIGTERM or SIGHUP has stopped this process; the run is stopped, too.
    """
    run, workers = out / "run", config.groups * config.workers // processes
    data = [] if data_dir is None else ["--data-dir", str(data_dir)]
    # A process that is killed over and over by faults is not given up.
    launch = [*LSGD, "launch", "--processes", str(processes), "--restarts", "1000", "--", *command]
    records: list[dict[str, Any]] = []
    with deferred_signals() as signal_to_stop, (out / "output.txt").open("wb") as output:
        links = out / "links.json"
        launcher = subprocess.Popen(
            [*launch, "--run-dir", str(run), *data],
            env=os.environ | {LINKS: str(links.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        own = [range(number * workers, (number + 1) * workers) for number in range(processes)]
        injector = Injector(run, launcher.pid, links, own)

        def wait(until: Callable[[], bool], failed: str) -> None:
            while not until():
                injector.tick()
                time.sleep(TICK)
                if number := signal_to_stop():
                    raise Interrupted(f"stopped by {signal.Signals(number).name}, and so is the run.", number)
                if launcher.poll() is not None:
                    raise RunFailed(f"{failed}: see {out / 'output.txt'}.")

        try:
            with closing(injector):
                wait(lambda: _have_started(run, processes * workers), "not all workers have begun to train")
                message(f"all {processes} processes train")
                begun = time.monotonic()
                for fault in [*sorted(plan), None]:
                    end = begun + (seconds if fault is None else fault.at)
                    wait(lambda end=end: time.monotonic() >= end, "the run has ended before its time")
                    if fault is not None:
                        message(str(fault))
                        records.append(injector.inject(fault))
                        with (out / "faults.jsonl").open("a") as file:
                            file.write(json.dumps(records[-1]) + "\n")
        finally:
            _stop(launcher)
    summary = summarize(read_metrics(run), records, quiet=quiet, measure=config.task.headline.name)
    if not METHODS[config.method].elects:
        return Outcome(summary, f"not replayed, since {config.method} has no leaders", is_equal=True)
    message("replaying the run")
    replay = subprocess.run(
        [*LSGD, "replay", str(run), *data],
        env={"JAX_PLATFORMS": "cpu"} | os.environ,  # As `lsgd launch` has it.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    verdict = replay.stdout.strip() or f"the replay has failed: {replay.stderr.strip()}"
    return Outcome(summary, verdict, is_equal=replay.returncode == 0)


def write(outcome: Outcome, measure: str, command: str, out: Path) -> str:
    """Write the summary as text and as JSON; returns the text.

    Args:
      outcome: of the run.
      measure: title of its headline measure.
      command: that was given.
      out: folder.
    """
    summary = outcome.summary
    text = f"{summary.table(measure)}\n{outcome.replayed}\n"
    files.write(out / "summary.txt", f"{command}\n\n{text}")
    fields = summary._asdict() | {name: getattr(summary, name)._asdict() for name in ("noticed", "back", "stalls")}
    replayed = {"replay": outcome.replayed, "is_equal": outcome.is_equal}
    files.write(out / "summary.json", json.dumps({"command": command, **fields, **replayed}, indent=2) + "\n")
    return text


def arguments_of(preset: str, given: dict[str, Any]) -> list[str]:
    """The command line of `train` with a preset and these fields."""
    arguments = ["train", preset]
    for name, value in given.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else [value]
            arguments += [f"--{option}", *map(str, values)]
    return arguments


def _have_started(run: Path, workers: int) -> bool:
    """Whether so many workers have begun to train."""
    try:
        return len({event["worker"] for event in read_metrics(run, "start")}) == workers
    except UsageError:  # There are no events yet.
        return False


def _stop(launcher: subprocess.Popen) -> None:
    """Ask all processes to leave, and kill them if they don't."""
    for _ in range(2):
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)  # The second one kills.
            try:
                launcher.wait(STOP)
            except subprocess.TimeoutExpired:
                continue
    if launcher.poll() is None:
        launcher.kill()
        launcher.wait()
