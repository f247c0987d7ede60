"""What the recorder writes and shows, of metrics made up by hand."""

import dataclasses

import numpy as np
import pytest

from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train import recorder
from lsgd_jax.train.evaluate import Evaluation
from lsgd_jax.train.progress import Progress
from lsgd_jax.train.step import Leaders, StepMetrics

CONFIG = dataclasses.replace(PRESETS["digits"], groups=1, workers=2, period=4, steps=40, eval_every=20)
PARAMS = {"w": np.zeros(3, np.float32)}
RESULT = Evaluation({"error": 0.25, "loss": 1.5}, np.array([[0.25, 0.5]]))


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        yield folder


def display(folder, *, lines=False):
    return RunProgress(CONFIG.steps, log=folder.log, lines=lines)


def metrics(loss, *, failed=(False, False), leader=0, revived=(False, False)):
    leaders = Leaders(
        score=np.array([loss], np.float32),
        revived=np.array([revived]),
        positions=np.full((1, 2, 1), leader),
        distances=np.array([[[0.0], [1.0]]]),
        rate_factor=None,
    )
    return StepMetrics(np.array([loss], np.float32), np.array([failed]), leaders)


def test_metrics_are_recorded_behind_the_computation(folder, capsys):
    """And all of them, once, before an evaluation is."""
    progress = Progress((1, 2), 1, 2)
    recording = recorder.SynchronousRecorder(CONFIG, folder, display(folder, lines=True), PARAMS, progress)
    for step in (2, 4, 6, 8):
        of_step = metrics((step, 1.0), failed=(step in (4, 6), False), leader=step // 8, revived=(step == 8, False))
        recording.record(step, of_step, np.float32(0.1))
        assert len(progress.losses) == max(0, step // 2 - recorder.BEHIND)
    assert progress.failed_since == {"0": 4}
    assert progress.scores == [[np.inf, 1.0]]
    recording.catch_up()
    assert len(progress.losses) == 4
    assert progress.scores == [[8.0, 1.0]]
    assert progress.failed_since == {}
    progress.step, progress.seconds = 8, 2.0
    recording.record_evaluation(RESULT)
    assert progress.losses == []
    assert progress.error == 0.25
    leaders = {"leader": 0, "distances": [[0.0, 1.0]]}
    assert read_metrics(folder.path) == [
        {"event": "exchange", "step": 4, "scores": [[4.0, 1.0]], **leaders},
        {"event": "failure", "step": 4, "workers": [0]},
        {"event": "exchange", "step": 8, "scores": [[8.0, 1.0]], **leaders, "leader": 1},
        {"event": "revival", "step": 8, "workers": [0]},
        {
            "event": "evaluation",
            "step": 8,
            "seconds": 2.0,
            "bytes_sent": recorder.bytes_sent(CONFIG, PARAMS, 8),
            "learning_rate_factor": pytest.approx(0.1),
            "train_losses": [[5.0, 1.0]],
            "center_error": 0.25,
            "center_loss": 1.5,
            "worker_errors": [[0.25, 0.5]],
        },
    ]
    shown = "step 8/40  loss 3.0000  test error 25.00%  leader 1  4 steps/s"
    assert shown in capsys.readouterr().err
