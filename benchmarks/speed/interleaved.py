"""Timing programs against each other on a noisy machine: interleaved, as ratios, with a control."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results"


def time_interleaved(programs: dict[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Run every program once a round, in a new order each round; returns seconds [rounds] by program.

    Args:
      programs: each runs to the end of its work before it returns.
      rounds: how often each is timed, after one run that is not.
      seed: of the orders.
    """
    for program in programs.values():
        program()
    rng, names = np.random.default_rng(seed), list(programs)
    seconds: dict[str, np.ndarray] = {name: np.empty(rounds) for name in names}
    for i in range(rounds):
        for name in rng.permutation(names):
            start = time.perf_counter()
            programs[name]()
            seconds[name][i] = time.perf_counter() - start
    return seconds


def ratio(seconds: np.ndarray, base: np.ndarray, seed: int = 0) -> dict[str, float]:
    """The ratio of two programs' median times, with a 95 % bootstrap interval over rounds."""
    rng = np.random.default_rng(seed)
    rounds = rng.integers(len(base), size=(2000, len(base)))
    resampled = np.median(seconds[rounds], axis=1) / np.median(base[rounds], axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"ratio": float(np.median(seconds) / np.median(base)), "low": float(low), "high": float(high)}


def milliseconds(seconds: np.ndarray, seed: int = 0) -> dict[str, float]:
    """The median time of a program, with a 95 % bootstrap interval over rounds."""
    rounds = np.random.default_rng(seed).integers(len(seconds), size=(2000, len(seconds)))
    low, high = np.quantile(np.median(seconds[rounds], axis=1), [0.025, 0.975])
    return {"median": 1e3 * float(np.median(seconds)), "low": 1e3 * float(low), "high": 1e3 * float(high)}


def report(name: str, results: dict[str, dict[str, float]], settings: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print the ratios and keep them, with the environment, in a folder."""
    for comparison, result in results.items():
        print(f"{comparison:60} {result['ratio']:.3f}  [{result['low']:.3f}, {result['high']:.3f}]")
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"settings": settings, "ratios of medians, 95 % intervals": results, "environment": environment()}
    path.write_text(json.dumps(content, indent=2) + "\n")
