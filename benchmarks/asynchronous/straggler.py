"""What a straggler costs the others: 8 workers on digits, of whom one takes ten times as long for a step.

    python -m benchmarks.asynchronous.straggler

Speeds are imposed by sleeping, so that cores are not the limit: a step takes at least --min-step-seconds. For each
way to exchange it tells the steps a second of the other seven workers, with the straggler and without, after the first
exchange and before the first of them has finished; and their ratio beside what a model without any cost but the waiting
predicts. Synchronous workers are the training program of train, and a round lasts as long as the slowest's steps.
"""

import argparse
import dataclasses
import heapq
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED, simulate_devices
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.train.setup import prepare, rounds, step_key
from lsgd_jax.train.step import init_state, local_steps

RESULTS = Path(__file__).parent / "results" / "straggler.json"
WORKERS, SLOWDOWN = 8, 10.0


def asynchronous_speed(config: Config) -> float:
    """Steps a second of a worker, the mean over all but the first."""
    with tempfile.TemporaryDirectory() as folder:
        train_and_evaluate(config, Path(folder) / "run", lines=False)
        events = read_metrics(Path(folder) / "run", "exchange")
    speeds = []
    for worker in range(1, WORKERS):
        if config.asynchronous == "joined":
            seen = [(np.ravel(event["worker_steps"])[worker], event["seconds"]) for event in events]
        else:
            seen = [(event["worker_step"], event["seconds"]) for event in events if event["worker"] == worker]
        steps, seconds = np.transpose([(step, second) for step, second in seen if step < config.steps])
        speeds.append((steps[-1] - steps[0]) / (seconds[-1] - seconds[0]))
    return float(np.mean(speeds))


def synchronous_speed(config: Config, slowest: float) -> float:
    """Steps a second of each worker; a round of steps takes at least so many seconds a step as the slowest does."""
    placement, feed, model, optimizer = prepare(dataclasses.replace(config, asynchronous=None, min_step_seconds=0.0))
    program = local_steps(config.task, model, optimizer, placement, feed)
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    started: list[float] = []
    for number, batch in enumerate(rounds(feed, placement, config.steps, config.period)):
        started.append(time.perf_counter())
        first, factor = np.int32(number * config.period), np.float32(1)
        state, _ = jax.block_until_ready(program(state, shared, batch, first, factor, step_key(config.seed)))
        time.sleep(max(0.0, started[-1] + config.period * slowest - time.perf_counter()))
    return config.period * (len(started) - 2) / (started[-1] - started[1])  # The first compiles.


def joined_model(period: int, exchanges: int = 1000) -> float:
    """The speed of joined workers other than the straggler, relative to that without it, if only waiting takes time."""
    seconds = [SLOWDOWN] + [1.0] * (WORKERS - 1)
    now, total, of_others = 0.0, 0, 0
    for number in range(1, exchanges + 1):
        ends = [(now + duration, worker) for worker, duration in enumerate(seconds)]
        heapq.heapify(ends)
        while ends:
            now, worker = heapq.heappop(ends)
            total, of_others = total + 1, of_others + (worker > 0)
            if total < number * WORKERS * period:
                heapq.heappush(ends, (now + seconds[worker], worker))
    return of_others / (WORKERS - 1) / now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind, interleaved")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--min-step-seconds", type=float, default=0.05)
    parser.add_argument("--period", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.steps < 4 * arguments.period:
        parser.error(f"--steps must be at least four periods, {4 * arguments.period}, got {arguments.steps}.")
    simulate_devices(WORKERS)
    base = dataclasses.replace(
        PRESETS["digits"],
        groups=1,
        workers=WORKERS,
        steps=arguments.steps,
        period=arguments.period,
        eval_every=arguments.steps,
        min_step_seconds=arguments.min_step_seconds,
        asynchronous="posted",
    )
    speeds: dict[str, dict[str, list[float]]] = {
        way: {"without": [], "with": []} for way in ("synchronous", "joined", "posted")
    }
    for _ in range(arguments.rounds):
        for way, of_way in speeds.items():
            for case, slowdown in (("without", 1.0), ("with", SLOWDOWN)):
                if way == "synchronous":
                    speed = synchronous_speed(base, slowdown * base.min_step_seconds)
                else:
                    config: Any = {"asynchronous": way, "slowdowns": (slowdown,)}
                    speed = asynchronous_speed(dataclasses.replace(base, **config))
                of_way[case].append(speed)
    predicted = {"synchronous": 1 / SLOWDOWN, "joined": joined_model(arguments.period), "posted": 1.0}
    print("| exchange | steps/s of the others without | with the straggler | ratio, each round | predicted |")
    print("|---|---|---|---|---|")
    summary = {}
    for way, of_way in speeds.items():
        ratios = np.divide(of_way["with"], of_way["without"])
        medians = [float(np.median(of_way[case])) for case in ("without", "with")]
        ratio = f"{np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
        print(f"| {way} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio} | {predicted[way]:.3f} |")
        summary[way] = {"steps per second": of_way, "ratios": ratios.tolist(), "predicted": predicted[way]}
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    settings |= {"workers": WORKERS, "slowdown": SLOWDOWN}
    content = {"settings": settings, "ways": summary, "environment": environment()}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
