"""Runs a posted run, injects faults into it, sums up what came of it, and replays it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lsgd_jax import files
from lsgd_jax.asynchronous.links import LINKS
from lsgd_jax.chaos.faults import Fault
from lsgd_jax.chaos.injector import Injector
from lsgd_jax.chaos.summary import Summary, summarize
from lsgd_jax.config import Config
from lsgd_jax.distributed.interruption import deferred_signals
from lsgd_jax.errors import Interrupted, RunFailed, UsageError
from lsgd_jax.tracking.run_folder import read_metrics

STEPS = 10**8
"""Steps of a run that is to end by the clock."""
START = 600.0
"""Seconds in which all processes must have begun to train."""
STOP = 60.0
"""Seconds in which they must have ended when they are asked to."""
TICK = 0.05


def chaos(
    command: Sequence[str],
    config: Config,
    processes: int,
    plan: Sequence[Fault],
    out: Path,
    *,
    seconds: float,
    quiet: float,
    message: Callable[[str], None],
) -> tuple[Summary, str]:
    """Launch a posted run, inject faults and sum up.

    Writes to `out` the run folder `run`, what the processes printed, the faults (`faults.jsonl`) and the summary.

    Args:
      command: of the run: `train`, its preset and options.
      config: of the run.
      processes: their number; each has equally many workers.
      plan: the faults.
      out: empty folder.
      seconds: of the run, after all workers have begun to train.
      quiet: of them, seconds at the start in which the plan has no fault.
      message: takes sentences on what happens.

    Returns:
      The summary, and the replay's verdict.

    Raises:
      RunFailed: if not all workers begin to train, or the run ends before its time.
      Interrupted: if SIGINT, SIGTERM or SIGHUP has stopped this process; the run is stopped, too.
    """
    run, workers = out / "run", config.groups * config.workers // processes
    own = [range(number * workers, (number + 1) * workers) for number in range(processes)]
    lsgd, links = [sys.executable, "-m", "lsgd_jax"], out / "links.json"
    # A place whose process is killed over and over by faults is not given up.
    launch = [*lsgd, "launch", "--processes", str(processes), "--restarts", "1000", "--", *command]
    records: list[dict[str, Any]] = []
    with deferred_signals() as signal_to_stop, (out / "output.txt").open("wb") as output:
        launcher = subprocess.Popen(
            [*launch, "--run-dir", str(run)],
            env=os.environ | {LINKS: str(links.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        injector = Injector(run, launcher.pid, links, own)
        try:
            _wait_for_start(launcher, run, processes * workers, out)
            message(f"all {processes} processes train")
            begun = time.monotonic()
            for fault in [*sorted(plan), None]:
                end = begun + (seconds if fault is None else fault.at)
                while (now := time.monotonic()) < end and launcher.poll() is None:
                    injector.tick()
                    time.sleep(min(TICK, end - now))
                    if number := signal_to_stop():
                        raise Interrupted(f"stopped by {signal.Signals(number).name}, and with it the run.", number)
                if launcher.poll() is not None:
                    raise RunFailed(f"the run has ended before its time: see {out / 'output.txt'}.")
                if fault is not None:
                    message(str(fault))
                    records.append(injector.inject(fault))
                    with (out / "faults.jsonl").open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
        finally:
            injector.close()
            _stop(launcher)
    measure = config.task.headline.name
    summary = summarize(read_metrics(run), records, quiet=quiet, measure=measure)
    message("replaying the run")
    verdict = subprocess.run([*lsgd, "replay", str(run)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    replayed = verdict.stdout.strip() or verdict.stderr.strip() or "the replay printed nothing"
    return summary, replayed


def write(summary: Summary, replayed: str, measure: str, command: str, out: Path) -> str:
    """Write a summary as text and as JSON; returns the text."""
    text = f"{summary.table(measure)}\n{replayed}\n"
    files.write(out / "summary.txt", f"{command}\n\n{text}")
    fields = summary._asdict() | {name: getattr(summary, name)._asdict() for name in ("noticed", "back", "stalls")}
    files.write(out / "summary.json", json.dumps({"command": command, **fields, "replay": replayed}, indent=2) + "\n")
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


def _wait_for_start(launcher: subprocess.Popen, run: Path, workers: int, out: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and launcher.poll() is None:
        if len({event["worker"] for event in _started(run)}) == workers:
            return
        time.sleep(0.2)
    raise RunFailed(f"not all {workers} workers have begun to train: see {out / 'output.txt'}.")


def _started(run: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run, "start")
    except UsageError:  # There are none yet.
        return []


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
