"""What saving costs: training with a checkpoint at every evaluation beside training without, as ratios of times.

    python -m benchmarks.reliability.saving

Two runs: the embedded example, `lsgd train mnist1d` with fewer steps; and a network of many arrays with 16 workers, two
on each of 8 simulated devices. Each is trained with checkpoints, without, and without once more, which is the control.
The time is that of the training loop with its evaluations, until the last checkpoint is written; compilation is left
out.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from lsgd_jax.config import Config
from lsgd_jax.distributed import simulate_devices
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Classification
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.train import train_and_evaluate

RUNS = {
    "mnist1d": dataclasses.replace(PRESETS["mnist1d"], steps=1000),
    "resnet20, 16 workers": Config(
        task=Classification(dataset="mnist5k", model="resnet20", width=0.25),
        steps=16,
        eval_every=8,
        learning_rate=0.02,
        batch_size=4,
        statistics_batches=4,
        groups=4,
    ),
}
DEVICES = 8


class Training:
    """A program that trains and notes how long its loop took."""

    def __init__(self, config: Config) -> None:
        self._config, self.seconds = config, list[float]()

    def __call__(self) -> None:
        """Train in a folder that is thrown away."""
        started = 0.0

        def show(progress: RunProgress, status: str) -> None:
            nonlocal started
            if status == "training":
                started = time.perf_counter()

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(RunProgress, "status", show):
            train_and_evaluate(self._config, Path(folder) / "run", lines=False)
            self.seconds.append(time.perf_counter() - started)


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="times that everything is timed, the network a third")
    rounds = parser.parse_args().rounds
    simulate_devices(DEVICES)
    results: dict[str, dict[str, float]] = {}
    settings: dict[str, Any] = {"devices": DEVICES}
    with tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)  # What is not timed need not be done each time.
        for (name, config), times in zip(RUNS.items(), (rounds, -(-rounds // 3)), strict=True):
            without = dataclasses.replace(config, checkpoint_every=0)
            programs = {"saving": Training(config), "control": Training(without), "without": Training(without)}
            time_interleaved(dict(programs), times)
            seconds = {kind: np.array(program.seconds[1:]) for kind, program in programs.items()}
            for kind in ("control", "saving"):
                results[f"{name}: {kind} / without"] = ratio(seconds[kind], seconds["without"])
            settings[name] = {
                "rounds": times,
                "steps": config.steps,
                "steps between checkpoints": config.checkpoint_period,
            }
    report("saving", results, settings, Path(__file__).parent / "results")


if __name__ == "__main__":
    main()
