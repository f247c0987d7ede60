"""Workers of a posted run, saved in files of their own."""

import errno
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from lsgd_jax.asynchronous import Model, Worker
from lsgd_jax.errors import UsageError
from lsgd_jax.train import saved_worker
from lsgd_jax.train.saved_worker import Saved, SavedWorker, checksum
from lsgd_jax.train.step import TrainState


def state(value=1.0):
    params = {"b": np.full((1, 1), value, jnp.bfloat16), "w": np.full((1, 1, 3), value, np.float32)}
    return TrainState(params, {}, {"count": np.full((1, 1), 7, np.int32)})


SAVED = SavedWorker(2, 30, True, 12, 0.5, state(), 61.5)


def test_what_was_saved_comes_back_to_the_bit(tmp_path):
    assert saved_worker.restore(tmp_path / "state.npz", state()) is None
    saved_worker.save(tmp_path / "state.npz", SAVED)
    found = saved_worker.restore(tmp_path / "state.npz", state(0.0))
    assert found._replace(state=None) == SAVED._replace(state=None)
    assert checksum(found.state) == checksum(SAVED.state) != checksum(state(2.0))


def test_the_longest_time_of_training_is_that_of_the_run(tmp_path):
    paths = [tmp_path / f"{number}.npz" for number in range(4)]
    for path, seconds in zip(paths, [2.5, 61.5], strict=False):
        saved_worker.save(path, SAVED._replace(seconds=seconds))
    paths[2].write_bytes(b"no zip")
    assert saved_worker.trained_seconds(paths) == 61.5
    assert saved_worker.trained_seconds(paths[2:]) == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(np.float32(1).tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "like"),
    [
        (cut, state()),
        (flip, state()),
        (lambda path: path.write_bytes(b"no zip"), state()),
        (lambda path: None, state()._replace(optimizer={})),
    ],
)
def test_a_damaged_file_or_one_of_another_run_is_one_sentence(damage, like, tmp_path):
    saved_worker.save(tmp_path / "state.npz", SAVED)
    damage(tmp_path / "state.npz")
    with pytest.raises(UsageError, match=r"^the worker saved in \S*state.npz can't be read \(.+\)$"):
        saved_worker.restore(tmp_path / "state.npz", like)


class Nothing:
    def after_step(self, worker):
        pass


def test_a_full_disk_is_a_warning_and_the_next_save_is_tried(tmp_path, monkeypatch):
    checksums, warnings = [], []
    saved = Saved(
        Nothing(),
        lambda position: tmp_path / f"{position}.npz",
        every=2,
        life=3,
        seconds=lambda: 4.5,
        log=lambda **values: checksums.append(values),
        warn=warnings.append,
    )
    worker = Worker(1, 10, Model(*state()[:2]), state().optimizer, lambda *_: None)
    write = saved_worker.save

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for worker.step in range(1, 5):
        monkeypatch.setattr(saved_worker, "save", full if worker.step == 2 else write)
        saved.after_step(worker)
        [each.result() for each in saved._writing.values()]
    saved.close()
    assert warnings == ["worker 1 can't be saved (No space left on device); what was saved before is kept"]
    found = saved_worker.restore(tmp_path / "1.npz", state())
    assert (found.life, found.step, found.pulled, found.seconds) == (3, 4, False, 4.5)
    of_all = {"worker": 1, "life": 3, "sha256": checksum(state().params), "pulled": False}
    assert checksums == [of_all | {"step": 2}, of_all | {"step": 4}]


def test_no_step_waits_for_a_checksum_and_a_log_that_can_not_be_written_is_told(tmp_path, monkeypatch):
    go_on, steps = threading.Event(), []

    def log(step, **_):
        steps.append(step)
        if step == 3:
            raise UsageError("the disk is full")

    monkeypatch.setattr(saved_worker, "checksum", lambda _: str(go_on.wait(10)))
    paths = {"path": lambda _: tmp_path / "state.npz", "every": 1, "life": 1}
    saved = Saved(Nothing(), **paths, seconds=lambda: 0.0, log=log, warn=pytest.fail)
    worker = Worker(0, 10, Model(*state()[:2]), state().optimizer, lambda *_: None)
    for worker.step in (1, 2):  # The second one is not saved.
        saved.after_step(worker)
    assert steps == []
    go_on.set()
    saved._writing[0].result()
    worker.step = 3
    saved.after_step(worker)
    with pytest.raises(UsageError, match="the disk is full"):
        saved.at_end(worker)
    saved.close()
    assert steps == [1, 3]
