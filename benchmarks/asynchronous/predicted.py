"""Real runs beside what the simulator predicts of them: 8 workers on digits, with imposed speeds.

    python -m benchmarks.asynchronous.predicted

Speeds are imposed by sleeping, so that cores are not the limit: a step takes --min-step-seconds, times the worker's
slowdown. Workers in step are the training program of `lsgd train`, a round of which takes as long as the slowest
worker's steps; the others are those of `lsgd train --asynchronous`, where each sleeps for itself. The simulator is told
these times of steps, which vary by 1 % in virtual time, where they would end at the same instants otherwise, and that
nothing else takes time. Clocks start after compilation and stand still during tests, but for workers who wait for
nobody and are tested as they go on.

A run is at an end with the first exchange after the workers' steps together have come to 8 times --steps; a real worker
stops after its own steps, and is given so many that none stops before. The test error is the center's, every 4 steps.
DOWNPOUR has the learning rate that `benchmarks.asynchronous.simulated` gives it, and takes more steps.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from benchmarks.asynchronous.simulated import METHODS, NEARLY_EQUAL, RESULTS, for_method, straggler_config
from lsgd_jax.config import Config
from lsgd_jax.distributed import Placement, simulate_devices
from lsgd_jax.errors import RunFailed
from lsgd_jax.simulate import SCHEDULES, SECOND, Cluster, event_log
from lsgd_jax.simulate.training import Network, train_on
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train import loop, setup
from lsgd_jax.train.compile_ahead import parameter_shapes

WORKERS = 8
SLOWDOWNS = {
    "no straggler": [1.0] * WORKERS,
    "one at half speed": [2.0] + [1.0] * (WORKERS - 1),
    "one at a tenth": [10.0] + [1.0] * (WORKERS - 1),
    "lognormal speeds": np.random.default_rng(0).lognormal(sigma=0.5, size=WORKERS).round(3).tolist(),
}


FREE: Any = {"local_latency": 0.0, "local_bandwidth": float("inf")}
"""Exchanges."""


class Seconds(NamedTuple):
    """What is compared."""

    to_end: float
    to_target: float | None
    """None if it was not reached."""


def predicted(method: str, config: Config, cluster: Cluster, network: Network, target: float) -> Seconds:
    """What the simulator says."""
    longer = dataclasses.replace(config, steps=config.steps + config.period)
    log = event_log(SCHEDULES[method], longer, cluster, parameter_shapes(config))
    steps = np.cumsum([event.kind == "step" for event in log.events])
    ends = [
        event.end
        for event, count in zip(log.events, steps, strict=True)
        if event.kind == "exchange" and count >= WORKERS * config.steps
    ]
    course = train_on(log, SCHEDULES[method], longer, network)
    return Seconds(ends[0] / SECOND, course.seconds_to(target))


def in_step(config: Config, step_seconds: float, target: float) -> Seconds:
    """What a run takes whose steps take so many seconds."""
    rounds = setup.rounds

    def slow_rounds(feed: Any, placement: Placement, steps: int, at_once: int, first: int) -> Iterator[Any]:
        for batches in rounds(feed, placement, steps, at_once, first):
            yield batches  # What follows is done while the devices compute.
            time.sleep(at_once * step_seconds)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "rounds", slow_rounds):
        loop.train_and_evaluate(config, Path(folder) / "run", lines=False)
        evaluations = read_metrics(Path(folder) / "run", "evaluation")
    return Seconds(evaluations[-1]["seconds"], _seconds_to(target, evaluations))


def asynchronously(config: Config, steps: int, target: float) -> Seconds:
    """What a run takes to so many steps of the average worker; it is ended there by an error."""
    log, ends = RunFolder.log, []

    def log_until_the_end(folder: RunFolder, event: str, **values: Any) -> None:
        log(folder, event, **values)
        if event == "exchange" and values["count"] >= WORKERS * steps:
            ends.append(values["seconds"])
            raise StopAsyncIteration

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(RunFolder, "log", log_until_the_end):
        with contextlib.suppress(RunFailed):
            loop.train_and_evaluate(config, Path(folder) / "run", lines=False)
        return Seconds(min(ends), _seconds_to(target, read_metrics(Path(folder) / "run", "evaluation")))


def _seconds_to(target: float, evaluations: list[dict[str, Any]]) -> float | None:
    return next((event["seconds"] for event in evaluations if event["center_error"] <= target), None)


def all_runs(base: Config, least: float, target: float) -> list[dict[str, Any]]:
    """Every method with all speeds, with the load of the machine before each run."""
    of_others, of_downpour = Network(base), Network(for_method(base, "downpour"))
    runs = []
    for speeds, slowdowns in SLOWDOWNS.items():
        slow = tuple(enumerate(slowdowns))
        cluster = dataclasses.replace(NEARLY_EQUAL, step_seconds=least, slow=slow, **FREE)
        for method in METHODS:
            config, schedule = for_method(base, method), SCHEDULES[method]
            expected = predicted(method, config, cluster, of_downpour if method == "downpour" else of_others, target)
            load = os.getloadavg()[0]
            if schedule.counts == "own" and schedule.waits == "together":
                found = in_step(config, max(slowdowns) * least, target)
            else:
                imposed: dict[str, Any] = {"min_step_seconds": least, "slowdowns": tuple(slowdowns)}
                imposed["asynchronous"] = "posted" if schedule.waits == "server" else "joined"
                longer = config.replace(steps=4 * config.steps, **imposed)
                found = asynchronously(longer, config.steps, target)
            seconds = {"real": found._asdict(), "predicted": expected._asdict()}
            runs.append({"speeds": speeds, "method": method, "load": load, **seconds})
            print(runs[-1], flush=True)
    return runs


def table(runs: list[dict[str, Any]], target: float) -> str:
    to_target = f"to an error of {target:.0%}"
    lines = [f"| speeds | method | seconds to the end | predicted | ratio | {to_target} | predicted | ratio |"]
    lines.append("|---" * 8 + "|")
    for run in runs:
        cells = [run["speeds"], run["method"]]
        for of in Seconds._fields:
            found, expected = run["real"][of], run["predicted"][of]
            cells += ["not reached" if seconds is None else f"{seconds:.2f}" for seconds in (found, expected)]
            cells.append("-" if None in (found, expected) else f"{found / expected:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [run["real"]["to_end"] / run["predicted"]["to_end"] for run in runs]
    return "\n".join(lines) + f"\n\nTo the end, real times are {min(ratios):.3f} to {max(ratios):.3f} of the predicted."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48, help="of the average worker, a multiple of 4")
    parser.add_argument("--min-step-seconds", type=float, default=0.1)
    parser.add_argument("--target-error", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    target, begun = arguments.target_error, time.perf_counter()
    simulate_devices(WORKERS)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    base = dataclasses.replace(straggler_config(arguments.steps), checkpoint_every=0)
    with tempfile.TemporaryDirectory() as compiled:  # Runs have programs in common.
        jax.config.update("jax_compilation_cache_dir", compiled)
        runs = all_runs(base, arguments.min_step_seconds, target)
    text = table(runs, target)
    print(text)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    settings |= {"workers": WORKERS, "period": base.period, "slowdowns": SLOWDOWNS}
    minutes = (time.perf_counter() - begun) / 60
    content = {"settings": settings, "runs": runs, "minutes": minutes, "environment": environment()}
    (arguments.out / "predicted.json").write_text(json.dumps(content, indent=2) + "\n")
    (arguments.out / "predicted.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
