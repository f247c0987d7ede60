"""How workers at their own speeds exchange: joined, posted, or with a center variable."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from lsgd_jax.asynchronous.board import Board, Post
from lsgd_jax.asynchronous.workers import Worker
from lsgd_jax.distributed import StepCount
from lsgd_jax.exchange import NOBODY, elect
from lsgd_jax.leader import pulled
from lsgd_jax.trees import distance


class Joined:
    """All workers meet in each exchange, in order and as often in all processes, so that nobody waits for ever.

    A worker joins the exchange number k when the count has reached k multiples of the workers' steps in a period, or
    when it has finished and takes no more steps. As all steps are taken some day, all join every exchange.
    """

    def __init__(
        self, count: StepCount, meet: Callable[[int], None], *, own_workers: int, steps_between: int, most: int
    ) -> None:
        """Meet nobody yet.

        Args:
          count: of all workers' steps.
          meet: the exchange with this number, from 1: called by the last of this process's workers to join, while all
            others wait.
          own_workers: of this process.
          steps_between: steps of all workers together from one exchange to the next.
          most: the last exchange's number, the same in all processes.
        """
        self._count, self._meet = count, meet
        self._own_workers, self._steps_between, self._most = own_workers, steps_between, most
        self._lock = threading.Lock()
        self._number, self._arrived, self._met = 1, 0, threading.Event()

    def compile(self, worker: Worker) -> None:
        """Nothing: what `meet` runs is not known here."""

    def after_step(self, worker: Worker) -> None:
        """Count it."""
        self._count.add()

    def exchange(self, worker: Worker) -> Iterator[threading.Event]:
        """Wait until all have met, as often as it is due."""
        # The number changes only when all have joined, this worker among them.
        while self._number <= self._most and (
            worker.finished or self._count.total >= self._number * self._steps_between
        ):
            yield self._arrive()

    def _arrive(self) -> threading.Event:
        with self._lock:
            met = self._met
            self._arrived += 1
            if self._arrived == self._own_workers:
                self._meet(self._number)
                self._number, self._arrived, self._met = self._number + 1, 0, threading.Event()
                met.set()
        return met


class Level(NamedTuple):
    """Among whom a leader is elected, how often, and how strongly it pulls."""

    workers: int
    """That follow each other: all, or those of a group."""
    steps_between: int
    """Steps of all workers together from one exchange to the next."""
    pull: float


class Posted:
    """A board on which workers post themselves, and from which each takes its leader when an exchange is due for it.

    However many multiples the count has passed since a worker's last boundary, it is pulled once: more pulls towards
    one post would be a stronger pull.
    """

    def __init__(
        self,
        count: StepCount,
        levels: Sequence[Level],
        board: Board,
        *,
        workers: int,
        staleness: int = 0,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Start with what is on the board.

        Args:
          count: of all workers' steps.
          levels: those in a group first.
          board: of all workers.
          workers: how many there are.
          staleness: how many local steps a worker may be beyond its post: it posts after each staleness + 1 steps.
          log: takes the name of an event and its values.
        """
        self._count, self._levels, self._board, self._staleness, self._log = count, levels, board, staleness, log
        self._exchanges = [[0] * len(levels) for _ in range(workers)]
        self.taken = [0] * workers
        """How often each worker has taken a leader's parameters."""

    def compile(self, worker: Worker) -> None:
        """Elections, and pulls towards one leader or two."""
        x, pull = worker.model.params, np.float32(0)
        for i, level in enumerate(self._levels):
            self._elect(worker, [None] * level.workers)
            jax.block_until_ready(_drawn(x, (x,) * (i + 1), (pull,) * (i + 1), np.int32(0)))

    def after_step(self, worker: Worker) -> None:
        """Post it if it is time to, and count it."""
        self._write(worker, posting=worker.step % (self._staleness + 1) == 0)
        self._count.add()

    def exchange(self, worker: Worker) -> Iterator[None]:
        """Pull a worker towards the best of its group, then towards the best of all, as they are due."""
        total, done = self._count.total, self._exchanges[worker.position]
        due = [total // level.steps_between for level in self._levels]
        if due == done:
            return
        self._exchanges[worker.position] = due
        self._write(worker, posting=True)  # It stands for election as it is now.
        posts, steps = self._board.read()
        found: dict[str, Any] = {}
        follows: dict[str, tuple[optax.Params, np.float32]] = {}
        for i, level in enumerate(self._levels):
            if due[i] == done[i]:
                continue
            name = "local_" if level.workers < len(posts) else ""
            first = worker.position - worker.position % level.workers  # Of the group, or of all.
            leader = self._elect(worker, posts[first : first + level.workers])
            found |= {f"{name}leader": leader, f"{name}staleness": 0, f"{name}distance": 0.0}
            post = posts[first + leader]
            if leader != NOBODY and first + leader != worker.position and post is not None:
                found[f"{name}staleness"] = steps[first + leader] - post.step
                params = self._board.take(first + leader, post, _device(worker))
                follows[name] = params, np.float32(level.pull)
        if follows:
            params, distances = _drawn(worker.model.params, *zip(*follows.values(), strict=True), np.int32(worker.step))
            worker.move(params)
            found |= {f"{name}distance": float(apart) for name, apart in zip(follows, distances, strict=True)}
            self.taken[worker.position] += len(follows)
        self._log("exchange", worker=worker.position, worker_step=worker.step, count=total, **found)
        yield None

    def _write(self, worker: Worker, *, posting: bool) -> None:
        post = Post(worker.step, worker.score, worker.finite, worker.model.params) if posting else None
        self._board.write(worker.position, worker.step, post)

    def _elect(self, worker: Worker, among: Sequence[Post | None]) -> int:
        scores = np.array([math.inf if post is None else post.score for post in among], np.float32)
        eligible = np.array([post is not None and post.finite for post in among])
        return int(_elected(*jax.device_put((scores, eligible), _device(worker))))


@jax.jit
def _elected(scores: Float[Array, " workers"], eligible: Bool[Array, " workers"]) -> Int[Array, ""]:
    def position(score: Array, eligible: Array) -> Array:
        return elect(score, "worker", eligible=eligible)

    return jax.vmap(position, axis_name="worker")(scores, eligible)[0]


@jax.jit
def _drawn(
    x: optax.Params, leaders: tuple[optax.Params, ...], pulls: tuple[Array, ...], step: Int[Array, ""]
) -> tuple[optax.Params, list[Array]]:
    """The point of a worker who follows the leaders one after the other, and its distances to them before each."""
    updates, distances = jax.tree.map(jnp.zeros_like, x), []
    for leader_x, pull in zip(leaders, pulls, strict=True):
        point = optax.apply_updates(x, updates)
        distances.append(distance(point, leader_x))
        updates = pulled(updates, x, point, leader_x, pull, jnp.array(True), step)
    return optax.apply_updates(x, updates), distances


class Centred:
    """A centre variable, which the workers meet one after the other, each after every `period` of its own steps."""

    def __init__(
        self,
        count: StepCount,
        start: optax.Params,
        meet: Callable[[optax.Params, optax.Params, optax.Params], tuple[optax.Params, optax.Params]],
        *,
        workers: int,
        period: int,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Put the centre at the workers' start.

        Args:
          count: of all workers' steps.
          start: of all workers.
          meet: from a worker's point, the centre and the worker's point after its last meeting, all on its device: the
            worker's new point and the new centre.
          workers: how many there are.
          period: local steps from one meeting of a worker to its next.
          log: takes the name of an event and its values.
        """
        self.center = start
        self._count, self._period, self._log = count, period, log
        self._meet = jax.jit(meet)
        self._lock = threading.Lock()
        self._came_from = [start] * workers
        self.meetings = [0] * workers
        """Of each worker with the centre."""

    def compile(self, worker: Worker) -> None:
        """The meeting."""
        center = jax.device_put(self.center, _device(worker))
        jax.block_until_ready(self._meet(worker.model.params, center, worker.model.params))

    def after_step(self, worker: Worker) -> None:
        """Count it."""
        self._count.add()

    def exchange(self, worker: Worker) -> Iterator[None]:
        """Meet the centre if it is due, under its lock."""
        i = worker.position
        if worker.step // self._period == self.meetings[i]:
            return
        self.meetings[i] += 1
        device = _device(worker)
        with self._lock:
            center, came_from = jax.device_put((self.center, self._came_from[i]), device)
            params, self.center = jax.block_until_ready(self._meet(worker.model.params, center, came_from))
        self._came_from[i] = params
        worker.move(params)
        self._log("exchange", worker=i, worker_step=worker.step, count=self._count.total)
        yield None


def _device(worker: Worker) -> jax.Device:
    [device] = jax.tree.leaves(worker.model.params)[0].devices()
    return device
