"""Workers at their own speed in two processes."""

import math
import sys

import jax
import numpy as np

from lsgd_jax.config import Config
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train.compile_ahead import parameter_shapes
from tests.distributed.test_processes import LSGD, launch, run

TRAIN = ["train", "digits", "--groups", "1", "--workers", "2", "--width", "0.25", "--steps", "12", "--eval-every", "8"]


def test_joined_workers_of_two_processes(tmp_path):
    """The count is of both."""
    train = [*TRAIN, "--asynchronous", "joined", "--min-step-seconds", "0.02", "--slowdowns", "3", "--run-dir", "run"]
    done = run(*LSGD, "launch", "--processes", "2", "--", *train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    done = launch(2, sys.executable, "-c", FAILING, *train, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()  # The other process may have seen the connection break before it was stopped.
    assert "[1] lsgd: worker 1 failed after 5 steps and has ended the run (RuntimeError: no more)." in lines
    assert lines[-1].startswith("lsgd: process ")
    assert lines[-1].endswith(" ended with code 1; the others were stopped.")


LISTENING = """
import sys
from lsgd_jax import cli
from lsgd_jax.asynchronous import board
from tests.distributed import listening

close = board.SharedBoard.close

def closing(shared):
    print("on loopback alone:", listening.only_loopback())
    close(shared)

board.SharedBoard.close = closing
sys.exit(cli.main(sys.argv[1:]))
"""


def test_posted_workers_of_two_processes(tmp_path):
    """Each is pulled to the other across processes, over loopback; the first process logs what all have done."""
    train = [*TRAIN, "--asynchronous", "posted", "--min-step-seconds", "0.02", "--slowdowns", "3", "--run-dir", "run"]
    done = launch(2, sys.executable, "-c", LISTENING, *train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {f"[{process}] on loopback alone: True" for process in range(2)} <= set(done.stdout.splitlines())
    exchanges, evaluations = (read_metrics(tmp_path / "run", event) for event in ("exchange", "evaluation"))
    assert {event["worker"] for event in exchanges} == {0, 1}
    assert all(event["staleness"] == 0 for event in exchanges)
    taken = [event for event in exchanges if event["leader"] not in (-1, event["worker"])]
    assert any(event["distance"] > 0 for event in taken)
    assert [entry["worker_steps"] for entry in evaluations][-1] == [[12, 12]]
    arrays = jax.tree.leaves(parameter_shapes(Config.load(tmp_path / "run")))
    size = sum(4 * math.prod(x.shape) for x in arrays)
    assert evaluations[-1]["bytes_sent"] == len(taken) * size / 2


def test_a_center_is_met_in_one_process(tmp_path):
    train = [*TRAIN, "--method", "easgd", "--asynchronous", "posted", "--run-dir", "run"]
    done = run(*LSGD, "launch", "--processes", "2", "--", *train, cwd=tmp_path)
    message = "workers meet the center of easgd in one process, but this is one of several: use lsgd."
    assert (done.returncode, done.stderr) == (2, f"[0] lsgd: {message}\n")
    assert not (tmp_path / "run").exists()
