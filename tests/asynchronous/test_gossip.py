"""Boards of several processes: each end here is one process's, with its own thread, port and view."""

import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsgd_jax.asynchronous import gossip
from lsgd_jax.asynchronous.board import Gone, Post
from lsgd_jax.asynchronous.gossip import GossipBoard
from lsgd_jax.errors import UsageError

SECRET = bytes(32)
HANG = 60
"""Seconds after which a test fails that waits for what should take one."""


def params(value):
    return {"b": jnp.full((1, 1), value, jnp.bfloat16), "w": jnp.full((1, 1, 3), value, jnp.float32)}


def until(condition):
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


@pytest.fixture
def join(tmp_path):
    """Begins boards in one folder; all are closed in the end."""
    boards = []

    def join(*positions, secret=SECRET, **options):
        boards.append(GossipBoard(tmp_path, positions, params(0.0), secret=secret, **options))
        return boards[-1]

    yield join
    for board in boards:
        board.close()


def living(board):
    return {position for member in board.members() for position in member.positions}


def test_all_see_all_posts_and_take_the_newest_parameters(join):
    first = join(0, 1)
    assert (first.read(), first.steps, first.life) == (({}, {0: 0, 1: 0}), {0: 0, 1: 0}, 1)
    second = join(2)
    first.write(1, 4, Post(1, 4, 0.1 + 0.2, True, params(1.5)))
    first.write(0, 2, Post(1, 2, float("nan"), False, params(0.0)))
    first.write(1, 5, None)  # A step without a post.
    until(lambda: second.read()[1].get(1) == 5)
    posts, steps = second.read()
    assert posts == {0: Post(1, 2, float("inf"), False, None), 1: Post(1, 4, 0.1 + 0.2, True, None)}
    assert steps == {0: 2, 1: 5, 2: 0}
    first.write(1, 6, Post(1, 6, 0.2, True, params(2.5)))
    device = jax.devices()[1]
    taken, post = second.take(1, posts[1], device)
    assert post == Post(1, 6, 0.2, True, None)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), taken, params(2.5))
    assert taken["w"].devices() == {device}
    with pytest.raises(Gone, match=r"^worker 2: it has not posted any$"):
        first.take(2, posts[1], device)


def test_who_dies_is_seen_dead_and_who_replaces_it_goes_on_in_a_new_life(join):
    boards = [join(0), join(1), join(2)]
    boards[1].write(1, 7, Post(1, 7, 1.0, True, params(1.0)))
    until(lambda: all(1 in board.read()[0] for board in boards))
    assert [member.positions for member in boards[2].members()] == [(0,), (1,), (2,)]
    post = boards[0].read()[0][1]
    boards[1].close()
    until(lambda: living(boards[0]) == living(boards[2]) == {0, 2})
    assert boards[0].read() == ({}, {0: 0, 1: 7, 2: 0})  # What it has done counts for ever.
    with pytest.raises(Gone):
        boards[0].take(1, post, jax.devices()[0])
    replacement = join(1)
    assert (replacement.life, replacement.steps) == (2, {1: 7})
    until(lambda: all(len(living(board)) == 3 for board in (boards[0], boards[2], replacement)))
    assert [member.positions for member in boards[0].members()] == [(0,), (2,), (1,)]


def test_who_was_stopped_is_seen_dead_and_ends_when_it_was_replaced(join):
    events = []
    first, stopped = join(0, log=lambda name, **values: events.append((name, values))), join(1)
    until(lambda: living(first) == {0, 1})
    wake = threading.Event()
    stopped._endpoint._loop.call_soon_threadsafe(
        wake.wait, 4 * HANG
    )  # The kernel still accepts connections, as for SIGSTOP.
    until(lambda: living(first) == {0})
    until(lambda: events[-1][0] == "dead")
    replacement = join(1)
    until(lambda: living(first) == {0, 1})
    assert not stopped.replaced
    wake.set()
    until(lambda: stopped.replaced)
    assert not replacement.replaced
    until(lambda: len(events) == 3)
    told = [(name, values["worker"], values["life"], values["seen_by"]) for name, values in events]
    assert told == [("alive", 1, 1, 0), ("dead", 1, 1, 0), ("alive", 1, 2, 0)]


def test_a_member_serves_a_function_of_arrays(join):
    first, second = join(0), join(1)
    address = second.members()[0].address
    assert address == first.address
    with pytest.raises(Gone):  # Nothing is served there yet.
        second.call(address, params(1.0))
    first.serve(lambda tree: jax.tree.map(lambda x: x + 1, tree), params(0.0))
    for board in (first, second):
        result = board.call(address, params(1.5))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), result, params(2.5))
    with pytest.raises(Gone):  # Of other sizes.
        second.call(address, params(1.5) | {"b": jnp.zeros((1, 1))})


def test_who_can_not_reach_each_other_do_not_follow_each_other(join):
    """Two of three are cut off from each other: they hear of each other by the third, but can't fetch parameters."""
    cut = set()
    boards = [join(i, faults=lambda address: "drop" if address in cut else 0.01) for i in range(2)]
    join(2)
    boards[1].write(1, 1, Post(1, 1, 1.0, True, params(1.0)))
    until(lambda: 1 in boards[0].read()[0])
    post = boards[0].read()[0][1]
    cut |= {board.address for board in boards}
    with pytest.raises(Gone, match=r"^worker 1: TimeoutError$"):
        boards[0].take(1, post, jax.devices()[0])
    assert 1 not in boards[0].read()[0]
    boards[1].write(1, 2, None)
    until(lambda: boards[0].read()[1][1] == 2)  # By the third.
    assert 1 not in boards[0].read()[0]
    cut.clear()
    until(lambda: 1 in boards[0].read()[0])


def test_who_could_not_be_reached_at_the_start_is_found_later(join, monkeypatch):
    monkeypatch.setattr(gossip, "SEARCH", 2)
    cut = {"all"}
    boards = [join(i, faults=lambda _: "drop" if cut else 0.0) for i in range(2)]
    assert [living(board) for board in boards] == [{0}, {1}]
    assert [board.unanswered for board in boards] == [False, True]
    cut.clear()
    until(lambda: all(living(board) == {0, 1} for board in boards))
    assert not join(2).unanswered


def test_a_log_that_can_not_be_written_is_told(join):
    def log(*_, **__):
        raise UsageError("the disk is full")

    board = join(0, log=log)
    join(1)
    with pytest.raises(UsageError, match="the disk is full"):
        until(lambda: board.read() is None)


def test_who_comes_later_is_younger_whatever_its_clock_tells(join, monkeypatch):
    boards = []
    for position, clock in enumerate([2e9, 1e9, 1.5e9]):
        monkeypatch.setattr(gossip, "time", SimpleNamespace(time=lambda clock=clock: clock))
        boards.append(join(position))
        until(lambda: all(len(living(board)) == len(boards) for board in boards))
    assert [[member.positions for member in board.members()] for board in boards] == [[(0,), (1,), (2,)]] * 3
