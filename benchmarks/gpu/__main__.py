"""The GPU check: what the package does and costs on one NVIDIA GPU, in 9.5 minutes at most and without a network.

    python -m benchmarks.gpu                                    # all parts, for a GPU
    python -m benchmarks.gpu --size small                       # as little as it takes, also on a CPU
    python -m benchmarks.gpu --parts exchange,steps

Every part runs in processes of its own, in time limits, and keeps each result in a file of its name as soon as it is
there; what fails or takes too long is named in run.json and README.md, and the others go on.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.summary import write_summary

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
LIMITS = {
    "device": 50,
    "exchange": 90,
    "input": 40,
    "workers": 150,
    "tests": 170,
    "comparisons": 170,
    "compiled": 170,
    "steps": 110,
}
"""Seconds that each process of a part may take in the full size, when nothing else runs."""
SLOWER = 8
"""How much longer they may take in the small size, on a CPU that is shared."""
NETWORKS = ("CNN7", "ResNet20", "Transformer", "ResNet50")
STAGES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("device",),),
    (("exchange",),),
    (("input",),),
    (("workers",),),
    # Nothing is timed here: tests, training, and what PyTorch compiles for the steps.
    (("tests",), ("comparisons",), *(("compiled", network) for network in NETWORKS)),
    *((("steps", network),) for network in NETWORKS),
)
"""Processes, each a part and what of it; those of a stage run at the same time."""
VARIABLES = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # PyTorch and other processes use the card, too.
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONUNBUFFERED": "1",
}


def main() -> int:
    """Run the chosen parts; returns 1 if a process failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(LIMITS), help="comma-separated: %(default)s")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--minutes", type=float, help="after these all ends; default: 9.5 for full, 60 for small")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    minutes = arguments.minutes or (9.5 if arguments.size == "full" else 60)
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(LIMITS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}.")
    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    for part in parts:
        (results / f"{part}.json").unlink(missing_ok=True)
    run = Run(results, arguments.size, parts, end=time.monotonic() + 60 * minutes)
    for stage in STAGES:
        chosen = [process for process in stage if process[0] in parts]
        with ThreadPoolExecutor(len(stage)) as pool:
            try:
                list(pool.map(run.process, chosen))
            except KeyboardInterrupt:
                run.stop()
                raise
    write_summary(results)
    print(f"see {arguments.results}")
    return int(any(outcome["problem"] for outcome in run.outcomes.values()))


class Run:
    """Runs processes and keeps how they ended."""

    def __init__(self, results: Path, size: str, parts: list[str], end: float) -> None:
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._earlier: dict[str, dict[str, Any]] = {}
        if (kept := results / "run.json").exists():
            processes = json.loads(kept.read_text())["processes"]
            self._earlier = {name: of for name, of in processes.items() if name.split()[0] not in parts}
        self._results, self._size, self._end = results, size, end
        self._start, self._lock = time.monotonic(), threading.Lock()
        self._groups: set[int] = set()

    def stop(self) -> None:
        """End all processes, and start no other."""
        self._end = 0.0
        for group in list(self._groups):
            os.killpg(group, signal.SIGKILL)

    def process(self, process: tuple[str, ...]) -> None:
        """Run a process to its end, or until its time is up."""
        part, *details = process
        name, limit = " ".join(process), float(LIMITS[part])
        limit = min(limit if self._size == "full" else SLOWER * limit, self._end - time.monotonic())
        if limit <= 0:
            self._keep(name, 0.0, "not started: the time was up", [])
            return
        self._say(name, f"at most {limit:.0f} s")
        start = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu.part", part, *details]
        command += ["--size", self._size, "--results", os.path.relpath(self._results, ROOT)]
        # A session of its own, so that with it ends whatever it has started.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | VARIABLES,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert child.stdout is not None
        assert child.stderr is not None
        last: deque[str] = deque(maxlen=25)
        readers = [
            threading.Thread(target=self._relay, args=(name, child.stdout), daemon=True),
            threading.Thread(target=lambda errors: last.extend(errors), args=(child.stderr,), daemon=True),
        ]
        for reader in readers:
            reader.start()
        self._groups.add(child.pid)
        problem = ""
        try:
            if code := child.wait(limit):
                problem = f"exit code {code}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        self._groups.discard(child.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for reader, pipe in zip(readers, (child.stdout, child.stderr), strict=True):
            reader.join(5)
            pipe.close()
        self._keep(name, time.monotonic() - start, problem, list(last) if problem else [])

    def _relay(self, name: str, output: TextIO) -> None:
        for line in output:
            self._say(name, line.rstrip())

    def _say(self, name: str, text: str) -> None:
        print(f"[{time.monotonic() - self._start:4.0f} s] {name}: {text}", flush=True)

    def _keep(self, name: str, seconds: float, problem: str, last: list[str]) -> None:
        """Write how a process ended, with what it said last if it was not well."""
        self._say(name, problem or "done")
        for line in last:
            print(f"    {line.rstrip()}", flush=True)
        with self._lock:
            self.outcomes[name] = {
                "seconds": round(seconds, 1),
                "problem": problem,
                "last line": last[-1].strip() if last else "",
            }
            content = {"size": self._size, "processes": self._earlier | self.outcomes}
            (self._results / "run.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
