"""The tests that are about devices, on this one: mappings, exchanges, compression, networks, checkpoints, resuming.

With one GPU all workers are vmapped; tests of a mesh of several devices are skipped. What fails is run again with
deterministic kernels, which tells what only wants them.
"""

import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax

from benchmarks.gpu.part import Record

TESTS = (
    "tests/test_leader.py",
    "tests/exchange",
    "tests/methods",
    "tests/models",
    "tests/train/test_loop.py",
    "tests/reliability/test_resume.py",
    "tests/test_trained.py",
)
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def measure(record: Record, small: bool) -> None:
    """Run the tests."""
    tests, processes = (["tests/exchange/test_election.py"], 1) if small else (list(TESTS), 10)
    result = run(tests, processes, seconds=600 if small else 110)
    record.keep("tests", result)
    if result["failed"] and jax.default_backend() == "gpu":
        again = run(list(result["failed"])[:40], processes, seconds=45, flags=DETERMINISTIC)
        record.keep(f"failed tests with {DETERMINISTIC}", again)


def run(arguments: list[str], processes: int, seconds: int, flags: str = "") -> dict[str, Any]:
    """What pytest says of some tests, in the end or when the time is up."""
    without = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # The plugin warns of xdist, where it is installed.
    command = [sys.executable, "-m", "pytest", "-v", *without, "-n", str(processes), *arguments]
    environment = os.environ | {"COLUMNS": "400"} | ({"XLA_FLAGS": flags} if flags else {})
    finished = True
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, "--dist", "worksteal"], env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            finished = False
            process.kill()  # Its workers end with it.
            process.wait()
        said.seek(0)
        output = said.read()
    lines = re.findall(r"^\[gw\d+\] \[ *\d+%\] (\w+) (.*?) *$", output, re.MULTILINE)
    outcomes = {test: outcome for outcome, test in lines}
    why = dict(re.findall(r"^(?:FAILED|ERROR) (.*?) - (.*)$", output, re.MULTILINE))
    if not outcomes:
        raise RuntimeError(f"pytest ended with {process.returncode}: {output[-600:]}")
    counts = {outcome: list(outcomes.values()).count(outcome) for outcome in sorted(set(outcomes.values()))}
    failed = {test: why.get(test, "")[:300] for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")}
    return {"command": " ".join(["pytest", *arguments]), "finished": finished} | counts | {"failed": failed}
