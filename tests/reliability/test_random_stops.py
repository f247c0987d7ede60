"""Every kind of run, stopped by signals at random moments."""

import os
import random
import signal
import time

import pytest

from lsgd_jax.tracking.run_folder import read_metrics
from tests.reliability import commands, faults
from tests.reliability.runs import assert_same
from tests.reliability.test_processes import IMAGENET

STOPS = 20 if faults.SOAK else 1
SAVED = ["--steps", "400", "--eval-every", "200", "--checkpoint-every", "100"]
ENDLESS = ["--steps", "1000000", "--eval-every", "200"]
LAUNCH = ["launch", "--processes", "2"]
KINDS = {
    "saved": [*commands.TRAIN, *SAVED, "--resume"],
    "not saved": [*commands.TRAIN, *ENDLESS, "--checkpoint-every", "0"],
    "posted": [*commands.TRAIN, *ENDLESS, "--asynchronous", "posted"],
    "joined": [*LAUNCH, "--", *commands.TRAIN, *ENDLESS, "--asynchronous", "joined"],
    "launched": [*LAUNCH, "--", *commands.TRAIN, *SAVED, "--resume"],
    "launched with restarts": [*LAUNCH, "--restarts", "2", "--", *commands.TRAIN, *SAVED, "--resume"],
    "that decodes images": [*IMAGENET, "DATA", "--data-processes", "2", "--checkpoint-every", "100000"],
}
LONGEST = 6.0 if faults.SOAK else 4.0
"""Seconds after which a run is stopped that has not ended."""


def stopped(arguments, cwd, rng):
    """Stop a command at a random moment; returns its exit code, 0 if it was over before."""
    number, delay = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]), LONGEST * rng.random() ** 2
    with commands.started(*arguments, cwd=cwd) as command:
        faults.until(lambda: command.over or command.takes_signals())
        end = time.monotonic() + delay
        while time.monotonic() < end and not command.over:
            time.sleep(0.01)
        if not command.over:
            os.kill(command.pid, number)
        code, errors = command.end()
        shown = f"{number.name} after {delay:.2f} s of {' '.join(arguments)}: exit code {code}\n" + "\n".join(errors)
        said = [line for line in errors if "lsgd: " in line]
        assert code in (0, 128 + number), shown
        assert not any("Traceback" in line for line in errors), shown
        assert len(said) == (1 if code else 0), shown
        # A launcher stops its processes by SIGTERM.
        names = {number.name, "SIGTERM" if arguments[0] == "launch" else number.name}
        assert code == 0 or any(f"lsgd: stopped by {name}" in said[0] for name in names), shown
        commands.assert_no_process_in(cwd)
    return code


@pytest.mark.parametrize("kind", KINDS if faults.SOAK else ["saved"])
def test_a_stop_at_a_random_moment_loses_nothing(kind, tmp_path, request, record_property):
    """A run that is saved ends with the metrics and the bits of one that was not stopped."""
    arguments, rng, stops = list(KINDS[kind]), random.Random(kind), 0
    if "DATA" in arguments:
        arguments[arguments.index("DATA")] = str(request.getfixturevalue("prepared")[0])
    if "--resume" not in arguments:
        for stops in range(STOPS):
            assert stopped([*arguments, "--run-dir", f"run-{stops}"], tmp_path, rng) != 0
            if list((tmp_path / f"run-{stops}").glob("*.jsonl")):
                read_metrics(tmp_path / f"run-{stops}")
        record_property(f"stops at random moments: {kind}", STOPS)
        return
    code, errors = commands.done(*arguments, "--run-dir", "whole", cwd=tmp_path)
    assert code == 0, errors
    runs = 0
    while stops < STOPS:
        if stopped([*arguments, "--run-dir", f"run-{runs}"], tmp_path, rng):
            stops += 1
        else:
            assert_same(tmp_path / f"run-{runs}", tmp_path / "whole", 400)
            runs += 1
    code, errors = commands.done(*arguments, "--run-dir", f"run-{runs}", cwd=tmp_path)
    assert code == 0, errors
    assert_same(tmp_path / f"run-{runs}", tmp_path / "whole", 400)
    record_property(f"stops at random moments: {kind}", stops)
