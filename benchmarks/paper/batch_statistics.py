"""Whose batch statistics the center should be tested with: all policies on the same trained workers.

    python -m benchmarks.paper.batch_statistics

ResNet20 of half its width on 5,000 images of MNIST, 4 workers, LSGD and EASGD, 3 seeds. Policies differ in tests alone:
each run is trained once and its center tested with every policy at several steps. Workers' own models are tested, too.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED, simulate_devices
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.environment import environment
from lsgd_jax.train import setup
from lsgd_jax.train.evaluate import BatchStatistics, evaluation
from lsgd_jax.train.step import init_state, local_steps

POLICIES: tuple[BatchStatistics, ...] = ("own", "mean", "leader", "reestimate")
STEPS = (25, 50, 100, 200, 400)
SEEDS = (0, 1, 2)
CONFIG = PRESETS["cnn7-mnist5k-4"].replace(model="resnet20", width=0.5, learning_rate_drops=(), steps=STEPS[-1])


def errors(config: Config) -> dict[str, list[float]]:
    """The test error of the center by policy, and the workers' mean, at every step in `STEPS`."""
    placement, feed, model, optimizer = setup.prepare(config)
    program = local_steps(config.task, model, optimizer, placement, feed)
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    key = setup.step_key(config.seed)
    policies = [policy for policy in POLICIES if policy != "leader" or config.method == "lsgd"]
    evaluations = {
        policy: evaluation(
            config.task,
            model,
            METHODS[config.method].center,
            placement,
            feed,
            batch_statistics=policy,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(key, config.steps),
        )
        for policy in policies
    }
    found: dict[str, list[float]] = {name: [] for name in [*policies, "workers"]}
    for step, batch in enumerate(setup.rounds(feed, placement, config.steps, 1)):
        state, _ = program(state, shared, batch, np.int32(step), np.float32(1), key)
        placement.wait_for(state)
        if step + 1 in STEPS:
            results = {policy: evaluate(state, shared) for policy, evaluate in evaluations.items()}
            for policy, result in results.items():
                found[policy].append(result.center["error"])
            found["workers"].append(float(results["own"].workers.mean()))
    return found


def main() -> None:
    """Train, print the table and keep it."""
    simulate_devices(CONFIG.groups * CONFIG.workers)
    results = {
        method: [errors(dataclasses.replace(CONFIG, method=method, seed=seed)) for seed in SEEDS]
        for method in ("lsgd", "easgd")
    }
    lines = [
        "| method | tested | " + " | ".join(f"step {step}" for step in STEPS) + " |",
        "|---" * (2 + len(STEPS)) + "|",
    ]
    for method, runs in results.items():
        for tested in runs[0]:
            percent = 100 * np.array([run[tested] for run in runs])
            cells = [
                f"{mean:.2f} ± {std:.2f}" for mean, std in zip(percent.mean(0), percent.std(0, ddof=1), strict=True)
            ]
            lines.append(f"| {method} | {tested} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    print(table, end="")
    out = Path(__file__).parent / "results" / "batch_statistics"
    out.mkdir(exist_ok=True)
    (out / "errors.md").write_text(table)
    content = {"config": CONFIG.effective, "steps": STEPS, "errors": results, "environment": environment()}
    (out / "errors.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
