"""Orders of events that a machine may come up with, made up from seeds, without threads."""

import jax
import numpy as np
import pytest

from lsgd_jax.asynchronous import Centered, Joined, Level, Posted, StepReport
from lsgd_jax.asynchronous.board import Board
from lsgd_jax.distributed import StepCount
from lsgd_jax.methods import METHODS
from tests.asynchronous.schedule import drive, scripted, zero


def turns_of(rng):
    """Speeds and pauses: some workers get many turns in a row."""
    while True:
        of_one = rng.random()
        for _ in range(rng.integers(1, 6)):
            yield of_one if rng.random() < 0.5 else rng.random()


def test_joined_workers_never_wait_for_ever():
    """In 1,000 orders, with uneven numbers of steps, workers without any, and exchanges that only the end makes due."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        steps = rng.integers(0, 12, rng.integers(1, 7))
        between = len(steps) * rng.integers(1, 5)
        most = sum(steps) // between
        beyond = rng.integers(0, 2)  # As if the data of some had ended before their steps.
        workers = [scripted(i, count) for i, count in enumerate(steps)]
        count, met = StepCount(), []

        def meet(number, count=count, met=met):
            met.append((number, count.total))

        joined = Joined(count, meet, own_workers=len(steps), steps_between=between, most=most + beyond)
        drive(workers, joined, turns_of(rng))
        assert [worker.step for worker in workers] == list(steps)
        # Nobody goes on once the count has been reached.
        assert met == [(k, min(k * between, sum(steps))) for k in range(1, most + beyond + 1)]


def test_posted_workers_never_follow_who_is_not_finite_or_too_old():
    stale = 0
    for seed in range(250):
        rng = np.random.default_rng(seed)
        group, groups, period = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 4)
        size, staleness = group * groups, int(rng.integers(0, 4))
        steps = rng.integers(0, 10, size)
        scores = rng.normal(size=(size, 10)).astype(np.float32)
        finite = rng.random((size, 10)) < 0.7
        scores[rng.random((size, 10)) < 0.2] = np.nan
        nan = rng.integers(size)
        finite[nan] = False
        workers = [
            scripted(i, steps[i], lambda step, i=i: StepReport(scores[i, step], scores[i, step], finite[i, step]))
            for i in range(size)
        ]
        events = []
        levels = [Level(int(group), int(size * period), 0.5), Level(int(size), int(2 * size * period), 0.5)]
        board = Posted(
            levels[:groups],
            Board(),
            workers=int(size),
            staleness=staleness,
            log=lambda name, events=events, **values: events.append(values),
        )
        drive(workers, board, turns_of(rng))
        assert [worker.step for worker in workers] == list(steps)
        for event in events:
            for name in ("local_", ""):
                if name + "leader" not in event:
                    continue
                assert 0 <= event[name + "staleness"] <= staleness
                stale = max(stale, event[name + "staleness"])
                if event[name + "leader"] >= 0:
                    first = event["worker"] // group * group if name else 0
                    assert event[name + "leader"] + first != nan
    assert stale == 3


def test_a_leader_is_the_best_whom_a_worker_can_see():
    """Worker 1 posts after every other step; worker 2 is the best at first, and then not finite."""
    losses = np.array([[3, 3, 3, 3], [2, 1, 0, 0], [1, np.nan, np.nan, np.nan]], np.float32)
    workers = [
        scripted(i, 4, lambda step, of=of: StepReport(of[step], of[step], np.isfinite(of[step])))
        for i, of in enumerate(losses)
    ]
    for i, worker in enumerate(workers):
        worker.move(jax.device_put(np.full((1, 1), 10.0 * i, np.float32)))
    events = []
    board = Posted(
        [Level(3, 3, 0.5)], Board(), workers=3, staleness=1, log=lambda name, **values: events.append(values)
    )
    for _ in range(3):  # First, nobody has posted but worker 0 itself; then worker 1 has, and then made a step more.
        for worker in workers:
            worker.take_step()
            board.after_step(worker)
        list(board.exchange(workers[0]))
    assert [(event["leader"], event["staleness"], event["distance"]) for event in events] == [
        (0, 0, 0.0),
        (1, 0, 10.0),
        (1, 1, 5.0),
    ]
    assert workers[0].model.params.item() == 7.5


def test_a_worker_who_has_missed_exchanges_is_pulled_once():
    workers = [scripted(0, 9, lambda step: StepReport(1.0, 1.0, True)), scripted(1, 9)]
    workers[0].move(jax.device_put(np.full((1, 1), 8.0, np.float32)))
    events = []
    board = Posted([Level(2, 2, 0.5)], Board(), workers=2, log=lambda name, **values: events.append(values))
    for _ in range(7):
        workers[1].take_step()
        board.after_step(workers[1])
    assert len(list(board.exchange(workers[0]))) == 1
    assert list(board.exchange(workers[0])) == []
    assert workers[0].model.params.item() == 4.0


@pytest.mark.parametrize("method", ["easgd", "downpour"])
def test_workers_meet_the_center_as_the_paper_says(method):
    """A NumPy oracle of each worker's clock, in 20 orders."""
    moves = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    meet = METHODS[method].meeting({"period": 2, "pull": 0.25, "center_pull": 0.375}, 3)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        workers = [scripted(i, rng.integers(1, 10), moves=moves[i]) for i in range(3)]
        met = []
        centered = Centered(
            Board(), zero(), meet, workers=3, period=2, log=lambda name, met=met, **values: met.append(values["worker"])
        )
        drive(workers, centered, turns_of(rng))
        x, steps, last_center, center = np.zeros(3), np.zeros(3, int), np.zeros(3), 0.0
        for i in met:
            x[i] += moves[i, steps[i] : steps[i] + 2].sum()
            steps[i] += 2
            if method == "easgd":
                apart = x[i] - center
                x[i], center = x[i] - 0.25 * apart, center + 0.125 * apart
            else:
                center += x[i] - last_center[i]
                x[i] = last_center[i] = center
        np.testing.assert_allclose(centered.center, [[center]], rtol=1e-5, atol=1e-6)
        assert [met.count(i) for i in range(3)] == [worker.steps // 2 for worker in workers]
