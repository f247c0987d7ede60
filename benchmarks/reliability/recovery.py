"""From a killed process to the first new step: where the time goes until a run is back.

    python -m benchmarks.reliability.recovery

Two processes train the embedded example under a launcher that may restart them, as in

    lsgd launch --processes 2 --restarts 1 -- train mnist1d --run-dir RUN

One of them is killed. What is told apart: until the launcher has noticed and ended the other one (detection); until
both are back with data and model, mostly imports (restart); reading the checkpoint (restoring); tracing and compiling
the step (compiling); and until the first new step is in the metrics (stepping).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO
from unittest import mock

import numpy as np

from lsgd_jax import cli
from lsgd_jax.distributed import process_index
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tracking.progress import RunProgress

RESULTS = Path(__file__).parent / "results" / "recovery.json"
LAUNCH = (
    "import sys; from lsgd_jax.distributed.launch import launch;"
    " sys.exit(launch(sys.argv[1:], processes=2, restarts=1))"
)
TRAIN = [sys.executable, "-m", "benchmarks.reliability.recovery", "train", "mnist1d", "--run-dir"]
ENDS = {"detection": "was killed by SIGKILL", "restart": "restoring", "restoring": "compiling", "compiling": "training"}
"""The parts, in order, and what is printed at the end of each."""


def train() -> int:
    """`lsgd train`, whose first process prints what it is doing."""

    def show(progress: RunProgress, status: str) -> None:
        if process_index() == 0:
            print(status, file=sys.stderr, flush=True)

    with mock.patch.object(RunProgress, "status", show):
        return cli.main(sys.argv[1:])


def wait_for(text: str, lines: IO[str]) -> float:
    """Until a line with the text is printed; returns when."""
    for line in lines:
        if text in line:
            return time.perf_counter()
    raise RuntimeError(f"the run has ended without {text!r}")


def recovery(run: Path) -> dict[str, float]:
    """Seconds of each part, for one process that is killed."""
    command = [sys.executable, "-c", LAUNCH, *TRAIN, str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as launcher:
        assert launcher.stderr is not None
        wait_for("step 300/", launcher.stderr)
        [_, second] = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(second), signal.SIGKILL)
        times, metrics = [time.perf_counter()], run / "metrics.jsonl"
        for end in ENDS.values():
            times.append(wait_for(end, launcher.stderr))
            if end == "compiling":
                length = metrics.stat().st_size
        while metrics.stat().st_size == length:
            time.sleep(0.001)
        times.append(time.perf_counter())
        launcher.kill()
    return dict(zip([*ENDS, "stepping"], np.diff(times).tolist(), strict=True))


def main() -> None:
    """Kill, time, print the shares and keep them with the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how often a process is killed")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        seconds = [recovery(Path(folder) / str(i)) for i in range(rounds)]
    by_part = {part: np.array([of_one[part] for of_one in seconds]) for part in seconds[0]}
    total = sum(by_part.values())
    shares = {part: np.quantile(of_part / total, [0.5, 0, 1]).tolist() for part, of_part in by_part.items()}
    for part, (median, least, most) in shares.items():
        print(f"{part:12} {median:6.1%}  [{least:.1%}, {most:.1%}]")
    content = {
        "rounds": rounds,
        "shares of the time, medians and ranges": shares,
        "seconds": {part: of_part.tolist() for part, of_part in by_part.items()},
        "environment": environment(),
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(train())
    main()
