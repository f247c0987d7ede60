"""Workers at their own speed in two processes."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from lsgd_jax.config import Config
from lsgd_jax.distributed.launch import launch
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate
from tests.distributed.test_processes import alive, wait_until
from tests.reliability import commands, faults

TRAIN = ["train", "digits", "--groups", "1", "--workers", "2", "--width", "0.25", "--steps", "12", "--eval-every", "8"]


def test_joined_workers_of_two_processes(tmp_path):
    """The count is of both."""
    train = [*TRAIN, "--asynchronous", "joined", "--min-step-seconds", "0.02", "--slowdowns", "3", "--run-dir", "run"]
    code, errors = commands.done("launch", "--processes", "2", "--", *train, cwd=tmp_path)
    assert code == 0, errors
    exchanges, evaluations = (read_metrics(tmp_path / "run", event) for event in ("exchange", "evaluation"))
    assert [event["step"] for event in exchanges] == [4, 8, 12]
    assert all(np.sum(event["worker_steps"]) >= 2 * event["step"] for event in exchanges)
    assert [entry["worker_steps"] for entry in evaluations][-1] == [[12, 12]]
    assert None not in evaluations[0]["train_losses"][0]


FAILING = """
import sys
from lsgd_jax import asynchronous, cli, distributed

take_step = asynchronous.Worker.take_step

def failing(worker):
    take_step(worker)
    if (distributed.process_index(), worker.step) == (1, 5):
        raise RuntimeError("no more")

asynchronous.Worker.take_step = failing
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_worker_that_fails_ends_all_processes(tmp_path):
    train = [*TRAIN, "--asynchronous", "joined", "--run-dir", "run"]
    code, lines = commands.called(launch, [sys.executable, "-c", FAILING, *train], 2, cwd=tmp_path)
    assert code == 1
    # The other process may have seen the connection break before it was stopped.
    assert "[1] lsgd: worker 1 failed after 5 steps and has ended the run (RuntimeError: no more)." in lines
    assert lines[-1].startswith("lsgd: process ")
    assert lines[-1].endswith(" ended with code 1; the others were stopped.")


@pytest.fixture
def processes(tmp_path):
    """Starts commands in the folder of the test; what is left of them in the end is killed."""
    (folder := tmp_path / "processes").mkdir()
    with contextlib.ExitStack() as started:
        yield lambda *command: started.enter_context(
            commands.started(*command, cwd=folder, output=f"output-{command[0]}")
        )


def last_life(run, worker):
    """The events of a worker's last life."""
    events = read_metrics(run) if list(run.glob("events-*")) else []
    of_worker = [event for event in events if event.get("worker") == worker and "seen_by" not in event]
    life = max((event["life"] for event in of_worker), default=0)
    return life, [event for event in of_worker if event["life"] == life]


def pulled(run, worker, life):
    """Whether a worker has been pulled to the other one in a life."""
    at, events = last_life(run, worker)
    return at == life and any(event.get("leader") == 1 - worker for event in events)


def process_of(launcher, number):
    [pid] = [
        pid
        for pid in faults.children(launcher.pid)
        if f"\0LSGD_PROCESS={number}\0" in Path(f"/proc/{pid}/environ").read_text()
    ]
    return pid


def test_processes_leave_join_die_and_come_back(processes, lsgd, tmp_path):
    """Nobody waits for anybody, and when all have left, one process goes on with what was saved."""
    run = tmp_path / "processes" / "run"
    train = ["train", "digits", "--groups", "1", "--workers", "2", "--width", "0.25", "--steps", "1000000"]
    train += ["--asynchronous", "posted", "--min-step-seconds", "0.01", "--checkpoint-every", "10", "--run-dir", "run"]
    launcher = processes("launch", "--processes", "2", "--", *train)
    wait_until(lambda: pulled(run, 0, 1) or pulled(run, 1, 1), 120)
    wait_until(lambda: all((run / "workers" / str(i) / "state.npz").exists() for i in range(2)), 60)

    leaving = process_of(launcher, 1)
    os.kill(leaving, signal.SIGTERM)
    wait_until(lambda: not alive(leaving), 60)  # Its place is vacant then, somewhat after the entry of its end.
    left = last_life(run, 1)[1][-1]
    assert left["why"] == "left"
    joined = processes("join", "run")
    wait_until(lambda: last_life(run, 1)[0] == 2, 120)
    [start, *_] = last_life(run, 1)[1]
    assert (start["event"], start["step"]) == ("start", left["step"])
    assert start["from"].items() >= {"life": 1}.items()  # Worker 0, or what it saved itself if that was better.
    wait_until(lambda: pulled(run, 0, 1) or pulled(run, 1, 2), 120)

    os.kill(process_of(launcher, 0), signal.SIGKILL)
    wait_until(lambda: last_life(run, 0)[0] == 2, 120)
    [start, *_] = last_life(run, 0)[1]
    exchanges = [event for event in read_metrics(run, "exchange") if (event["worker"], event["life"]) == (0, 1)]
    assert start["step"] > exchanges[-1]["worker_step"] - 200  # As far as the others had heard of its predecessor.
    # It may have been taken for dead before, too, if it was held up for a second.
    assert {event["life"] for event in read_metrics(run, "dead") if event["worker"] == 0} == {1}
    wait_until(lambda: len(last_life(run, 0)[1]) > 1, 60)  # From when it trains, it says that it leaves.

    os.kill(launcher.pid, signal.SIGINT)
    assert launcher.end()[0] == 130
    assert not joined.over
    os.kill(joined.pid, signal.SIGINT)
    assert joined.end()[0] == 130
    ends = read_metrics(run, "end")
    assert [event["why"] for event in ends] == ["left"] * 3
    steps = [last_life(run, worker)[1][-1]["step"] for worker in range(2)]

    code, printed, _ = lsgd("replay", str(run))
    assert code == 0, printed
    assert " of 4 lives: all distances and " in printed

    config = Config.load(run).replace(steps=max(steps) + 10)
    assert 0 <= train_and_evaluate(config, run, resume=True, lines=False) < 0.5
    starts = [last_life(run, worker)[1][0] for worker in range(2)]
    assert [start["from"]["saved"] for start in starts] == steps
    [evaluation] = read_metrics(run, "evaluation")[-1:]
    assert evaluation["worker_steps"] == [[config.steps] * 2]
    stopped = starts[0]["time"] - ends[-1]["time"]
    begun = min(event["time"] for event in read_metrics(run, "start"))
    # A clock starts shortly before the entry that says so: half of the time without training is more than that.
    assert evaluation["seconds"] < evaluation["time"] - begun - stopped / 2
