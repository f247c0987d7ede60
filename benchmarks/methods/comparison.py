"""Methods compared with clean and with corrupted workers: tuned, at several periods and numbers of workers.

    python -m benchmarks.methods.comparison                      # all of it, best on a GPU
    python -m benchmarks.methods.comparison --processes 6        # several processes share a GPU
    python -m benchmarks.methods.comparison --only tragedies     # one of the experiments
    python -m benchmarks.methods.summary                         # tables and the figure, from what is there

For every period and every number of corrupted workers, each method's learning rate and one option of its own are tuned
over nine cells, on held-out training data, with two seeds of their own. Validation also chooses the evaluated model of
each: the method's own, or its mean over the exchanges of the last tenth of the steps. The chosen cell is then trained
with 18 seeds. Each method's results at one period with so many workers are a file in results/; those that are there are
not trained again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.methods.many_runs import ManyRuns, Run
from lsgd_jax import files
from lsgd_jax.compare.comparison import TUNING_SEEDS
from lsgd_jax.compare.statistics import finite
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tuning import grid

RESULTS = Path(__file__).parent / "results"
SEEDS = range(18)
"""As many final runs as there are runs in tuning: both are the same program."""
WITH_BAD_WORKERS = ("quorum", "lsgd", "local_sgd", "diloco", "easgd", "coordinate_median", "trimmed_mean")


class Experiment(NamedTuple):
    """A task with its corrupted workers."""

    config: Config
    methods: tuple[str, ...]
    corrupted: dict[int, tuple[int, ...]]
    """Numbers of corrupted workers, by the number of all workers."""
    periods: dict[int, tuple[int, ...]]
    """Steps between exchanges, by the number of all workers; in the order in which they are trained."""


EXPERIMENTS = {
    "mnist1d": Experiment(
        PRESETS["mnist1d"].replace(dataset="mnist1d-10k", groups=1, steps=1000, corrupt_workers=1),
        WITH_BAD_WORKERS,
        {4: (0, 1, 2), 8: (0, 1, 2, 4), 16: (0, 1, 4, 8)},
        {4: (16, 4, 64), 16: (16, 4, 64), 8: (16,)},
    ),
    "tragedies": Experiment(
        PRESETS["tragedies"].replace(steps=320, corrupt_workers=1, corruption="gradient-noise"),
        tuple(METHODS),
        {4: (0, 1)},
        {4: (16, 4, 64)},
    ),
    "smallest": Experiment(
        PRESETS["mnist1d"].replace(groups=1, width=0.05, steps=20, batch_size=4, corrupt_workers=1),
        ("quorum", "lsgd"),
        {4: (0, 1)},
        {4: (4,)},
    ),
}
"""The last one is for trying whether this runs."""


class Cell(NamedTuple):
    """One method at one period with so many workers; all numbers of corrupted ones are trained together."""

    experiment: str
    method: str
    workers: int
    period: int

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join([self.experiment, self.method, str(self.workers), str(self.period)])


def cells(names: list[str]) -> Iterator[Cell]:
    """All cells, in the order in which they are trained; a method without a period has one per number of workers."""
    for name in names:
        experiment = EXPERIMENTS[name]
        rounds = max(map(len, experiment.periods.values()))
        for i in range(rounds):
            for workers, periods in experiment.periods.items():
                for method in experiment.methods if i < len(periods) else ():
                    if i == 0 or METHODS[method].exchanges == "period":
                        yield Cell(name, method, workers, periods[i])


def measure(cell: Cell) -> dict[str, Any]:
    """Tune a method and train it with all seeds, for each number of corrupted workers."""
    started, experiment = time.time(), EXPERIMENTS[cell.experiment]
    corrupted = experiment.corrupted[cell.workers]
    config = experiment.config.replace(workers=cell.workers, method=cell.method)
    if METHODS[cell.method].exchanges == "period":
        config = config.replace(period=cell.period)
    program, candidates = ManyRuns(config, config.task.data()), [config.replace(**values) for values in grid(config)]

    def run(candidate: Config, bad: int, seed: int) -> Run:
        return Run(seed, candidate.replace(corrupt_workers=bad))

    tuned = [run(each, bad, seed) for bad in corrupted for each in candidates for seed in TUNING_SEEDS]
    shape = len(corrupted), len(candidates), len(TUNING_SEEDS)
    errors = {kind: of.reshape(shape).mean(-1) for kind, of in program.errors(tuned, validation=True).items()}
    of_kinds = np.stack([errors[kind] for kind in program.kinds], -1)  # [corrupted, cells, kinds]
    scores = np.nan_to_num(of_kinds, nan=np.inf)
    best = [np.unravel_index(of.argmin(), of.shape) for of in scores]
    chosen = [candidates[i] for i, _ in best]
    final = [run(each, bad, seed) for bad, each in zip(corrupted, chosen, strict=True) for seed in SEEDS]
    finals = {kind: of.reshape(len(corrupted), -1) for kind, of in program.errors(final, validation=False).items()}
    found = []
    for i, bad in enumerate(corrupted):
        kind, values = program.kinds[best[i][1]], {name: chosen[i].effective[name] for name in grid(config)[0]}
        found.append(
            {
                "corrupted": bad,
                "chosen": values | {"evaluated_model": kind},
                "validation": finite(scores[i].min()),
                "finals": [finite(x) for x in finals[kind][i]],
                "finals of all": {kind: [finite(x) for x in of[i]] for kind, of in finals.items()},
                "tried": [[finite(x) for x in of] for of in scores[i]],
            }
        )
    tried = [{name: each.effective[name] for name in grid(config)[0]} for each in candidates]
    seeds = {"seeds": list(SEEDS), "tuning_seeds": TUNING_SEEDS}
    about = {"seconds": round(time.time() - started, 1), "environment": environment()}
    return {**cell._asdict(), "kinds": program.kinds, "grid": tried, **seeds, "results": found, **about}


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=["tragedies", "mnist1d"], help="experiments")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the work")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.processes > 1:
        command = [sys.executable, "-m", "benchmarks.methods.comparison", "--only", *arguments.only]
        command += ["--out", str(arguments.out)]
        shared = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # Else the first takes most of a GPU's memory.
        others = [subprocess.Popen(command, env=shared) for _ in range(arguments.processes)]
        codes = [other.wait() for other in others]
        sys.exit(int(any(codes)))
    for cell in cells(arguments.only):
        path, claim = (arguments.out / f"{cell.name}{suffix}" for suffix in (".json", ".claim"))
        if path.exists():
            continue
        claim.mkdir(exist_ok=True)
        try:
            with files.lock(claim, "let it train this cell"):  # It ends with the process.
                if not path.exists():
                    found = measure(cell)
                    files.write(path, json.dumps(found, indent=1) + "\n")
                    print(f"{cell.name}: {found['seconds']:.0f} s", flush=True)
                shutil.rmtree(claim)
        except UsageError as error:
            print(error, flush=True)


if __name__ == "__main__":
    main()
