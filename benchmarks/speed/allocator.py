"""What training gains on a CPU from the memory allocator that `lsgd` sets up.

    python -m benchmarks.speed.allocator

Each run is a `lsgd train` in a process of its own; what counts is its training time, without start, compilation and
evaluation. In every round each preset is trained with memory that is kept, once more as a control, and with glibc's own
settings (LSGD_KEEP_MEMORY=0).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.speed.interleaved import ratio, report
from lsgd_jax.cli.allocator import KEEP_MEMORY
from lsgd_jax.tracking.run_folder import read_metrics

PRESETS = {
    "CNN7": "cnn7-mnist5k-4 --width 1 --batch-size 64 --steps 40 --eval-every 40",
    "CNN7 at a quarter of its width": "cnn7-mnist5k-4 --steps 400 --eval-every 400",
    "1-D convolutional network": "mnist1d --groups 1 --steps 1600 --eval-every 1600",
    "transformer": "tragedies --steps 160 --eval-every 160",
}
ALLOCATORS = {"glibc's own": "0", "kept": "1", "control": "1"}


def seconds_of(preset: str, keep: str, cache: str) -> float:
    """Train a preset; returns its seconds of training."""
    environment = os.environ | {KEEP_MEMORY: keep, "JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--checkpoint-every", "0", "--run-dir", f"{folder}/run"]
        command = [sys.executable, "-m", "lsgd_jax", "train", *preset.split(), *options]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return read_metrics(Path(folder) / "run", "evaluation")[-1]["seconds"]


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="times that every program is timed")
    rounds = parser.parse_args().rounds
    rng, results = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as cache:
        for name, preset in PRESETS.items():
            seconds: dict[str, list[float]] = {allocator: [] for allocator in ALLOCATORS}
            for _ in range(rounds):
                for allocator in rng.permutation(list(ALLOCATORS)):
                    seconds[allocator].append(seconds_of(preset, ALLOCATORS[allocator], cache))
            for measured in ("control", "glibc's own"):
                results[f"{name}: {measured} / kept"] = ratio(np.array(seconds[measured]), np.array(seconds["kept"]))
    report("allocator", results, {"rounds": rounds, "presets": PRESETS})


if __name__ == "__main__":
    main()
