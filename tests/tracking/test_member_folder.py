"""The folder of a posted run, which its processes write together."""

import dataclasses
import time

import pytest

from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.member_folder import MemberFolder
from lsgd_jax.tracking.run_folder import RunFolder, read_config, read_metrics
from tests.figures.runs import evaluation
from tests.tracking.test_tensorboard import points_in

CONFIG = PRESETS["digits"].replace(groups=1, workers=4, steps=10, asynchronous="posted")
OTHER = "can only be resumed with as many workers: 1 x 4, not 2 x 2."


def member(path, *positions, config=CONFIG, **options):
    return MemberFolder(path, config, positions, **options)


def test_each_process_begins_its_workers_and_logs_its_events(tmp_path):
    with member(tmp_path / "run", 0, 1) as first, member(tmp_path / "run", 2, 3) as second:
        for number, folder in enumerate([second, first, second]):
            folder.log("exchange", step=number, worker=number)
        assert first.begun() == second.begun()
        assert not second.is_finished
        first.finish()
        assert second.is_finished
    assert [event["step"] for event in read_metrics(tmp_path / "run", "exchange")] == [0, 1, 2]
    assert len(read_metrics(tmp_path / "run")) == 3
    with member(tmp_path / "run", 0, 1, config=CONFIG.replace(steps=11), resume=True) as longer:
        assert not longer.is_finished
    assert read_config(tmp_path / "run").steps == 11


def test_a_worker_is_waited_for_until_it_has_taken_its_steps_or_its_process_has_ended(tmp_path):
    with member(tmp_path, 0) as first:
        assert first.held_elsewhere() == first.unfinished_elsewhere() == set()
        with member(tmp_path, 1, 2) as second, member(tmp_path, 3):
            assert first.unfinished_elsewhere() == {1, 2, 3}
            assert second.held_elsewhere() == {0, 3}
            second.finish_workers()
            assert first.unfinished_elsewhere() == {3}
            assert first.held_elsewhere() == {1, 2, 3}
        assert first.unfinished_elsewhere() == set()
        longer = CONFIG.replace(steps=11)
        with member(tmp_path, 1, 2, config=longer, resume=True) as second:
            assert second.unfinished_elsewhere() == {0}
            first.finish_workers()
            assert second.unfinished_elsewhere() == {0}  # They were fewer steps.


def test_the_time_in_which_nobody_trains_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: now)
    now = 1000.0
    with member(tmp_path, 0) as first:
        assert first.begun() == 1000
        now = 1030.0
        with member(tmp_path, 1) as second:  # The run goes on.
            assert second.begun(25.0) == 1000
    now = 5000.0
    with member(tmp_path, 0, resume=True) as first, member(tmp_path, 1, resume=True) as second:
        assert second.begun(30.0) == first.begun(25.0) == 4970


def test_a_last_line_that_was_cut_is_removed(tmp_path):
    with member(tmp_path, 2, 3) as folder:
        folder.log("start", step=0)
    with (tmp_path / "events-2.jsonl").open("a") as events:
        events.write('{"event": "exchange", "st')
    with member(tmp_path, 2, 3, resume=True) as folder:
        folder.log("end", step=1)
    assert [event["event"] for event in read_metrics(tmp_path)] == ["start", "end"]


def test_event_files_have_the_events_of_all_lives(tmp_path):
    for step in (4, 8):
        with member(tmp_path, 2, resume=step == 8, tensorboard=True) as folder:
            folder.log("exchange", step=step - 1, worker=2, leader=1)
            folder.log(**evaluation(step, worker_errors=[[0.5, None]]))  # The leader could not be evaluated.
        for file in (tmp_path / "tensorboard" / "events-2").iterdir():
            file.rename(file.with_name("events.out.tfevents.1") if step == 4 else file)  # Names have seconds.
    points = points_in(tmp_path / "tensorboard" / "events-2")
    assert [step for tag, step, _ in points if tag == "test_error/center"] == [4, 8]
    assert [step for tag, step, _ in points if tag == "leader/of_all"] == [3, 7]


@pytest.mark.parametrize(
    ("positions", "options", "message"),
    [
        ((0, 1), {}, "is not empty: name another run_dir, or resume the run."),
        ((2, 3), {"config": CONFIG.replace(seed=1)}, "is not empty: name another run_dir, or resume the run."),
        ((0, 1), {"config": CONFIG.replace(seed=1), "resume": True}, "with another seed: 1, not 0."),
        ((2, 3), {"config": dataclasses.replace(CONFIG, groups=2, workers=2), "resume": True}, OTHER),
    ],
)
def test_what_is_not_the_same_run_is_refused(positions, options, message, tmp_path):
    with member(tmp_path / "run", 0, 1):
        pass
    with pytest.raises(UsageError, match=message):
        member(tmp_path / "run", *positions, **options)


def test_a_worker_has_one_process_at_a_time(tmp_path):
    with member(tmp_path, 0, 1), pytest.raises(UsageError, match=r"workers/1 is being written by .* leave this worker"):
        member(tmp_path, 1, 2, resume=True)
    with member(tmp_path, 1, 2, resume=True):
        pass


def test_the_folder_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lsgd_jax.tracking.member_folder.PATIENCE", 0.1)
    other = RunFolder(tmp_path, CONFIG.replace(asynchronous=None))
    with other, pytest.raises(UsageError, match=f"{tmp_path} is being written by "):
        member(tmp_path, 0)
    with pytest.raises(UsageError, match="is not empty"):
        member(tmp_path, 0)
