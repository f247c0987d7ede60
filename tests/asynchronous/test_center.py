"""A center that workers of several processes meet: each end here is one process's, with its own board and port."""

import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from lsgd_jax.asynchronous import Board, Centered, Model
from lsgd_jax.asynchronous.gossip import GossipBoard
from lsgd_jax.methods import METHODS
from tests.asynchronous.schedule import scripted, zero
from tests.asynchronous.test_gossip import until

SECRET = bytes(32)


@pytest.fixture
def process(tmp_path):
    """Begins a process with one worker: its board, its exchanges and the worker."""
    boards = []

    def begin(position, moves, method):
        boards.append(GossipBoard(tmp_path, [position], Model(zero(), ()), secret=SECRET))
        meet = METHODS[method].meeting({"pull": 0.25, "center_pull": 0.5}, 2)
        worker = scripted(position, 100, moves=moves)
        exchanges = Centered(boards[-1], zero(), meet, workers=2, period=2)
        exchanges.compile(worker)  # As before training: who asks waits a second for the answer.
        return boards[-1], exchanges, worker

    yield begin
    for board in boards:
        board.close()


def step(worker, exchanges, times):
    for _ in range(times):
        worker.take_step()
        exchanges.after_step(worker)


def value(x):
    return float(np.asarray(x).item())


def meet_elsewhere(worker, exchanges, *, steps_meanwhile):
    """Ask for a meeting, take steps while it is under way, and be moved."""
    assert list(exchanges.exchange(worker)) == []
    [calling] = exchanges._calling.values()
    step(worker, exchanges, steps_meanwhile)
    until(calling.done)
    list(exchanges.exchange(worker))


@pytest.mark.parametrize("method", ["easgd", "downpour"])
def test_workers_go_on_while_they_meet_the_center_and_its_heir_goes_on_with_it(method, process):
    first_board, first, one = process(0, np.zeros(100, np.float32), method)
    second_board, second, other = process(1, np.ones(100, np.float32), method)
    list(second.exchange(other))  # Nothing is due yet.
    step(other, second, 2)
    until(lambda: second_board.oldest() == first_board.address)
    meet_elsewhere(other, second, steps_meanwhile=1)
    center = {"easgd": 0.5 / 2 * 2.0, "downpour": 2.0}[method]
    moved = {"easgd": 2.0 - 0.25 * 2.0, "downpour": 2.0}[method]
    assert (value(first.center), value(other.model.params)) == (center, moved + 1.0)
    assert value(second.center) == center  # Its copy.

    step(one, first, 1)
    list(first.exchange(one))  # It has the center itself.
    first_board.close()
    until(lambda: second_board.oldest() is None)
    step(other, second, 1)
    [_] = second.exchange(other)
    x = moved + 2.0
    expected = {"easgd": center + 0.5 / 2 * (x - center), "downpour": center + 2.0}[method]
    assert value(second.center) == pytest.approx(expected)


def test_a_meeting_with_a_process_that_has_ended_is_due_again(process):
    first_board, _, _ = process(0, np.zeros(100, np.float32), "easgd")
    second_board, second, other = process(1, np.ones(100, np.float32), "easgd")
    list(second.exchange(other))
    step(other, second, 2)
    until(lambda: second_board.oldest() == first_board.address)
    first_board.close()
    end = time.monotonic() + 60
    while second.taken[1] == 0:  # With this process, once it has the center.
        list(second.exchange(other))
        assert time.monotonic() < end
        time.sleep(0.01)
    assert value(other.model.params) == 2.0 - 0.25 * 2.0
    assert jax.tree.leaves(second._calling) == []


class Answers(Board):
    """A board whose calls are answered when, and in the order in which, the test says so."""

    def __init__(self):
        super().__init__()
        self.owner, self.answers = "owner:1", [Future() for _ in range(4)]

    def oldest(self):
        return self.owner

    def call(self, address, tree):
        worker = int(np.asarray(tree[0]).item())
        return self.answers[worker].result(timeout=60)


def test_no_answer_replaces_a_newer_copy_of_the_center_or_one_of_another_owner():
    board = Answers()
    exchanges = Centered(
        board, zero(), METHODS["easgd"].meeting({"pull": 0.25, "center_pull": 0.5}, 4), workers=4, period=1
    )
    workers = [scripted(i, 100, moves=np.full(100, i, np.float32)) for i in range(4)]
    for worker in workers:
        list(exchanges.exchange(worker))
        step(worker, exchanges, 1)
        assert list(exchanges.exchange(worker)) == []

    def answer(i, number):
        """With a center of its number; the worker itself is moved by all that has come."""
        board.answers[i].set_result((zero(), np.full_like(zero(), number), np.int32(number)))
        until(exchanges._calling[i].done)
        [_] = exchanges.exchange(workers[i])
        return value(exchanges.center)

    assert [answer(1, 2), answer(0, 1)] == [2, 2]
    board.owner = None  # This process.
    assert answer(2, 3) == 2
    board.owner = "owner:2"
    assert answer(3, 4) == 2  # Of the first one.
