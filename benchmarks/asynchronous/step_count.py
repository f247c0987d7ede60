"""What counting a step among 4 processes costs, beside a training step of CNN7 at batch 128.

    python -m benchmarks.asynchronous.step_count

All four processes count without pause, which is more than workers ever do; then the step is timed alone.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.speed.input import BATCH, step_program
from lsgd_jax import distributed
from lsgd_jax.distributed.launch import launch
from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results" / "step_count.json"
PROCESSES = 4


def count(times: int, out: Path) -> None:
    """Write what each count has taken in this process."""
    distributed.initialize()
    distributed.from_process_zero(0.0)  # All are there.
    steps, ends = distributed.StepCount(), [time.perf_counter()]
    for _ in range(times):
        steps.add()
        ends.append(time.perf_counter())
    (out / f"{distributed.process_index()}.json").write_text(json.dumps(np.diff(ends).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, default=2000, help="in each process")
    parser.add_argument("--rounds", type=int, default=30, help="times that the step is timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # Of the processes that this one starts.
    arguments = parser.parse_args()
    if arguments.into is not None:
        count(arguments.counts, arguments.into)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.asynchronous.step_count", "--into", folder]
        code = launch([*command, "--counts", str(arguments.counts)], PROCESSES)
        if code:
            sys.exit(code)
        of_count = np.concatenate([json.loads(path.read_text()) for path in Path(folder).iterdir()])
    step, of_step = step_program(), []
    step()
    for _ in range(arguments.rounds):
        begun = time.perf_counter()
        step()
        of_step.append(time.perf_counter() - begun)
    seconds = {"a count": float(np.median(of_count)), "a count, 95 of 100": float(np.quantile(of_count, 0.95))}
    seconds |= {"a step of CNN7": float(np.median(of_step))}
    share = seconds["a count"] / seconds["a step of CNN7"]
    print("| what | milliseconds |")
    print("|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1000 * value:.3f} |")
    print(f"\nA count is {share:.2%} of a step.")
    settings = {"processes": PROCESSES, "batch": BATCH, "counts": arguments.counts, "rounds": arguments.rounds}
    content = {"settings": settings, "seconds": seconds, "count / step": share, "environment": environment()}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
