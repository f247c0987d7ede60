"""A process of a posted run: what its workers start from, and whom it evaluates, with boards of the test's own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from lsgd_jax.asynchronous import Board, Gone, Model, Post, Worker
from lsgd_jax.distributed import place
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Classification
from lsgd_jax.tracking.member_folder import MemberFolder
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import posted, saved_worker, setup
from lsgd_jax.train.posted_evaluation import Evaluations
from lsgd_jax.train.saved_worker import SavedWorker, checksum
from lsgd_jax.train.step import TrainState
from lsgd_jax.trained import load_trained

CONFIG = PRESETS["digits"].replace(groups=1, workers=2, width=0.25, window=5, asynchronous="posted")


class Others(Board):
    """A board on which worker 1 is another process's."""

    def __init__(self, life):
        super().__init__(life)
        self.gone = False

    def take(self, position, post, device):
        if self.gone:
            raise Gone
        return super().take(position, post, device)


@pytest.fixture(scope="module")
def member(tmp_path_factory):
    """A process with worker 0, before it has begun anything but its first life."""
    with MemberFolder(tmp_path_factory.mktemp("runs") / "run", CONFIG, range(2)) as folder:
        display = RunProgress(CONFIG.steps, log=folder.log, lines=False)
        made = place(1, 2, jax.devices()), setup.make_feed(CONFIG), setup.make_model(CONFIG)
        yield posted._Member(CONFIG, range(2), *made, folder, display, resume=True, host="127.0.0.1")


def changed(tree, value):
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), tree)


@pytest.mark.parametrize(
    ("saved_score", "leader_score", "eligible", "gone", "origin"),
    [
        (None, None, True, False, None),
        (0.5, None, True, False, "saved"),
        (0.5, 0.6, True, False, "saved"),
        (0.5, 0.4, True, False, "leader"),
        (None, 0.4, True, False, "leader"),
        (0.5, 0.4, False, False, "saved"),
        (0.5, 0.4, True, True, "saved"),
        (None, 0.4, True, True, None),
    ],
)
def test_the_better_of_what_was_saved_and_of_the_leader(saved_score, leader_score, eligible, gone, origin, member):
    """The leader only if it can be had; the steps are those that others know of."""
    trainers, path = member.trainers, member.folder.state_of(0)
    common = trainers.starts[0].state
    member.board = board = Others(2)
    board.gone = gone
    board.write(0, 40, None)
    if leader_score is not None:
        model = Model(*changed((common.params, common.statistics), 3.0))
        board.write(1, 60, Post(4, 58, leader_score, eligible, model))
    path.unlink(missing_ok=True)
    if saved_score is not None:
        saved_worker.save(path, SavedWorker(1, 38, False, 41, saved_score, changed(common, 2)))
    (start, _), (told, _) = member._starts(trainers)
    assert start.step == 40
    assert jax.tree.leaves(start.state.params)[0].devices() == {jax.devices()[0]}
    if origin == "saved":
        assert told == {"saved": 38, "life": 1, "pulled": False}
        assert (start.score, start.eligible_from) == (0.5, 43)  # Three losses were missing in its window.
        assert checksum(start.state) == checksum(changed(common, 2))
    elif origin == "leader":
        assert told == {"worker": 1, "life": 4, "step": 58}
        assert (start.score, start.eligible_from) == (np.inf, 45)
        assert checksum(start.state.params) == checksum(changed(common.params, 3.0))
        fresh = TrainState(*common[:2], trainers.optimizer.init(jax.tree.map(lambda x: x[0, 0], common.params)))
        assert checksum(start.state.optimizer) == checksum(fresh.optimizer)
    else:
        assert told is None
        assert checksum(start.state.params) == checksum(common.params)


def test_what_can_not_be_read_is_set_aside(member, monkeypatch):
    told = []
    monkeypatch.setattr(member.display, "message", told.append)
    path = member.folder.state_of(0)
    path.write_bytes(b"no state")
    member.board = Others(2)
    (start, _), (origin, _) = member._starts(member.trainers)
    assert (start.step, origin) == (0, None)
    assert path.with_name("unreadable-state.npz").read_bytes() == b"no state"
    assert told[0].endswith("can't be read (File is not a zip file): worker 0 starts from the leader, or anew")


@pytest.mark.parametrize("unanswered", [True, False])
@pytest.mark.parametrize("held", [{1}, set()])
@pytest.mark.parametrize("reached", [{1}, set()])
def test_who_is_answered_by_nobody_is_told_of_host(unanswered, held, reached, member, monkeypatch):
    told = []
    monkeypatch.setattr(member.display, "message", told.append)
    monkeypatch.setattr(member, "positions", [0])
    monkeypatch.setattr(member.folder, "held_elsewhere", lambda: held)
    member.board = Others(1)
    member.board.unanswered = unanswered
    monkeypatch.setattr(member.board, "living", lambda: {0} | reached)
    member._warn_if_unanswered()
    assert len(told) == (unanswered and bool(held) and not reached)
    assert all("--host" in sentence for sentence in told)


def test_the_run_does_not_end_before_an_unreachable_worker(member, monkeypatch):
    """Worker 1 is another process's that nothing was heard of since its step 7, though its folder is locked."""
    told, elsewhere = [], {1}
    monkeypatch.setattr(member.display, "message", told.append)
    monkeypatch.setattr(member.folder, "unfinished_elsewhere", lambda: elsewhere)
    member.board = board = Others(1)
    monkeypatch.setattr(board, "living", lambda: {0})
    board.write(0, CONFIG.steps, None)
    board.write(1, 7, None)
    assert not member._have_finished()
    assert not member._have_finished()
    assert told == ["the run ends when worker 1 has taken its steps: its process can't be reached"]
    elsewhere.clear()
    assert member._have_finished()


def test_who_can_not_be_fetched_is_left_out_of_the_evaluation(member):
    """Worker 1 is another process's; its parameters are 0, so that it and the mean differ from worker 0."""
    [own, _], board = member.workers, Others(1)
    board.write(0, own.step, None)
    board.write(1, 7, Post(1, 7, 0.25, True, Model(*changed(own.model, 0.0))))
    evaluations = Evaluations(
        CONFIG,
        setup.make_model(CONFIG),
        setup.make_feed(CONFIG, rows=[0]),
        board,
        [own],
        member.recorder,
        shared=None,
        center=None,
        bytes_sent=lambda: 12.0,
    )
    for board.gone in (True, False):
        measured = evaluations.at_end().result()
        entry = read_metrics(member.folder.path, "evaluation")[-1]
        assert entry["center_error"] == measured
        assert (entry["worker_steps"], entry["count"], entry["bytes_sent"]) == ([[0, 7]], 7, 12.0)
        assert entry["train_losses"] == [[None, 0.25]]
        [[of_own, of_other]] = entry["worker_errors"]
        if board.gone:
            assert (of_own, of_other) == (measured, None)
            alone = entry["center_loss"]
        else:
            assert of_other > 0.8
            assert entry["center_loss"] != alone


class Network(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.line = nnx.BatchNorm(64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.line(self.norm(x.reshape(len(x), -1)))


@dataclasses.dataclass(frozen=True)
class Normed(Classification):
    has_batch_norm = True

    def network(self, rngs):
        return Network(rngs)


def test_the_share_of_who_can_not_be_fetched_is_evaluated_with_statistics_of_who_is_there(member):
    config = CONFIG.replace(task=Normed(dataset="digits", model="mlp"), batch_statistics="own")
    model = setup.make_model(config)
    states = (nnx.state(model, kind) for kind in (nnx.Param, nnx.BatchStat))
    own = Worker(0, 1, Model(*jax.tree.map(lambda x: x[None, None], tuple(states))), None, lambda *_: None)
    feed, board = setup.make_feed(config, rows=[0]), Others(1)
    options = {"shared": None, "center": None, "bytes_sent": lambda: 0.0}
    measured = Evaluations(config, model, feed, board, [own], member.recorder, **options).at_end().result()
    entry = read_metrics(member.folder.path, "evaluation")[-1]
    assert entry["worker_errors"] == [[measured, None]]
    assert np.isfinite(entry["center_loss"])


def test_what_was_saved_is_loaded(member):
    common = member.trainers.starts[0].state
    path = member.folder.path
    for position, (step, value, score) in enumerate([(30, 1.0, 0.5), (41, 2.0, 0.25)]):
        member.folder.state_of(position).unlink(missing_ok=True)
        with pytest.raises(UsageError, match=f"^worker {position} of the run in {path} has not been saved yet"):
            load_trained(path)
        state = changed(common, value)
        saved_worker.save(member.folder.state_of(position), SavedWorker(1, step, False, 0, score, state))
    found = load_trained(path)
    assert (found.step, found.best) == (35, 1)
    for network, value in [(found.center, 1.5), (found.workers[0], 1.0), (found.workers[1], 2.0)]:
        assert {float(x) for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)) for x in np.ravel(leaf)} == {value}
    with pytest.raises(
        UsageError, match=r"^posted workers keep only what they have saved last: load it without a step\."
    ):
        load_trained(path, 30)


def test_who_comes_when_the_run_has_just_finished_takes_no_step(member, monkeypatch):
    told = []
    monkeypatch.setattr(member.display, "message", told.append)
    monkeypatch.setattr(type(member.folder), "is_finished", True)
    steps = [worker.step for worker in member.workers]
    assert member.train() is None
    assert [worker.step for worker in member.workers] == steps
    assert told == ["the run has taken its steps while this process compiled"]
