"""Event files for TensorBoard, of runs that are trained and of made-up ones."""

import dataclasses
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lsgd_jax import train
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.tracking.tensorboard import EventFile
from tests.figures.runs import SMALL, evaluation


def events_in(file):
    """What an event file holds: records of a length, its checksum, an event and its checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


def points_in(folder):
    """What TensorBoard shows of a folder, [(tag, step, value)]: a start makes it forget all points from its step on."""
    points = []
    for file in sorted(folder.iterdir()):
        version, *events = events_in(file)
        assert version.file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[1] < event.step]
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return points


def test_event_files_hold_the_metrics(trained):
    found = {}
    for tag, step, value in points_in(trained / "tensorboard"):
        found.setdefault(tag, []).append((step, value))
    evaluations, exchanges = read_metrics(trained, "evaluation"), read_metrics(trained, "exchange")

    def expect(tag, of):
        assert found[tag] == [(step, pytest.approx(value)) for step, value in of], tag

    expect("test_error/center", [(entry["step"], entry["center_error"]) for entry in evaluations])
    expect("bytes_sent_by_a_worker", [(entry["step"], entry["bytes_sent"]) for entry in evaluations])
    expect("test_error/worker_3", [(entry["step"], entry["worker_errors"][1][1]) for entry in evaluations])
    expect("leader/of_all", [(entry["step"], entry["leader"]) for entry in exchanges if "leader" in entry])
    last = evaluations[-1]
    leader = [entry["leader"] for entry in exchanges if "leader" in entry and entry["step"] <= last["step"]][-1]
    errors = np.ravel(last["worker_errors"])
    assert found["test_error/leader"][-1] == (last["step"], pytest.approx(errors[leader]))
    assert len(found["training_loss/mean"]) == len(evaluations)
    if Config.load(trained).asynchronous:
        apart = [(entry["step"], entry["local_distance"]) for entry in exchanges if entry["worker"] == 2]
        expect("distance_to_local_leader/worker_2", apart)
    else:
        expect("score/worker_2", [(entry["step"], entry["scores"][1][0]) for entry in exchanges])
        expect("leader/of_group_1", [(entry["step"], entry["local_leaders"][1]) for entry in exchanges])


def log_evaluations(folder, *steps):
    for step in steps:
        folder.log(**evaluation(step, center_error=step / 100))


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_run_that_goes_on_has_each_point_once(from_the_start, tmp_path):
    """Also if it had no event files before."""
    config = dataclasses.replace(SMALL, checkpoint_every=None)
    with RunFolder(tmp_path / "run", config, tensorboard=from_the_start) as folder:
        log_evaluations(folder, 4, 8)
        length = folder.length()
        log_evaluations(folder, 12, 16)
    for file in (tmp_path / "run" / "tensorboard").glob("*"):
        file.rename(file.with_name("events.out.tfevents.1"))  # Long ago: names have seconds.
    assert (tmp_path / "run" / "tensorboard").exists() == from_the_start
    with RunFolder(tmp_path / "run", config, resume=True, tensorboard=True) as folder:
        folder.resume(length)
        log_evaluations(folder, 12)
    steps = [(step, pytest.approx(step / 100)) for step in (4, 8, 12)]
    assert [
        point[1:] for point in points_in(tmp_path / "run" / "tensorboard") if point[0] == "test_error/center"
    ] == steps


def test_an_event_file_that_cannot_be_ended_is_one_sentence(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventFile, "close", full)
    with (
        pytest.raises(UsageError, match=r"the run folder .* can't be written \(No space left on device\)\.$"),
        RunFolder(tmp_path / "run", SMALL, tensorboard=True),
    ):
        pass


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"tensorboard needs tensorboardX: pip install tensorboardX\."):
        train.train_and_evaluate(SMALL, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
