"""Workers at their own speed in two processes."""

import numpy as np

from lsgd_jax.run_folder import read_metrics
from tests.multiprocess.test_processes import LSGD, run

TRAIN = ["train", "digits", "--groups", "1", "--workers", "2", "--width", "0.25", "--steps", "12", "--eval-every", "8"]


def test_joined_workers_of_two_processes(tmp_path):
    """The count is of both."""
    train = [*TRAIN, "--asynchronous", "joined", "--step-seconds", "0.02", "--slowdowns", "3", "--run-dir", "run"]
    done = run(*LSGD, "launch", "--processes", "2", "--", *train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    exchanges, evaluations = (read_metrics(tmp_path / "run", event) for event in ("exchange", "evaluation"))
    assert [event["step"] for event in exchanges] == [4, 8, 12]
    assert all(np.sum(event["worker_steps"]) >= 2 * event["step"] for event in exchanges)
    assert [entry["worker_steps"] for entry in evaluations][-1] == [[12, 12]]
    assert None not in evaluations[0]["train_losses"][0]


def test_posted_is_for_one_process(tmp_path):
    train = [*TRAIN, "--asynchronous", "posted", "--run-dir", "run"]
    done = run(*LSGD, "launch", "--processes", "2", "--", *train, cwd=tmp_path)
    message = "posted is for the workers of one process, but this is one of several: use joined."
    assert (done.returncode, done.stderr) == (2, f"[0] lsgd: {message}\n")
