"""Exchanges of asynchronous workers: joined, posted, or with a center variable."""

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
from lsgd_jax.exchange.trees import distance
from lsgd_jax.link import pulled


class Joined:
    """All workers meet in every exchange, in order and equally often in all processes, so that nobody waits forever.

    A worker joins exchange number k when the steps of all workers have reached k times `steps_between`, or when it has
    taken all its steps. Since every worker eventually finishes, all workers join every exchange.
    """

    def __init__(
        self, count: StepCount, meet: Callable[[int], None], *, own_workers: int, steps_between: int, most: int
    ) -> None:
        """Start before the first exchange.

        Args:
          count: of all workers' steps.
          meet: runs the exchange with this number, from 1; called by the last of this process's workers to join, while
            all others wait.
          own_workers: workers of this process.
          steps_between: steps of all workers together from one exchange to the next.
          most: number of the last exchange, the same in all processes.
        """
        self._count, self._meet = count, meet
        self._own_workers, self._steps_between, self._most = own_workers, steps_between, most
        self._lock = threading.Lock()
        self._number, self._arrived, self._met = 1, 0, threading.Event()

    def compile(self, worker: Worker) -> None:
        """Do nothing: `meet` is compiled by whoever passes it."""

    def after_step(self, worker: Worker) -> None:
        """Count the step."""
        self._count.add()

    def exchange(self, worker: Worker) -> Iterator[threading.Event]:
        """Wait until all workers have met, for every exchange that is due."""
        # The number changes only when all workers have joined, including this one.
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
    """Which workers elect a leader, how often, and how strongly it pulls."""

    workers: int
    """Consecutive workers that elect together: all, or those of a group."""
    steps_between: int
    """Steps of all workers together from one exchange to the next."""
    pull: float


class Posted:
    """A board on which workers post themselves and from which each fetches its leader when an exchange is due for it.

    However many exchanges have become due during a worker's step, it is pulled once: repeated pulls towards the same
    post would amount to a stronger pull.
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
        """Start before the first exchange.

        Args:
          count: of all workers' steps.
          levels: local exchanges first.
          board: of all workers.
          workers: their number.
          staleness: local steps that a worker may be ahead of its post: it posts every staleness + 1 steps.
          log: takes the name of an event and its values.
        """
        self._count, self._levels, self._board, self._staleness, self._log = count, levels, board, staleness, log
        self._exchanges = [[0] * len(levels) for _ in range(workers)]
        self.taken = [0] * workers
        """How often each worker has fetched a leader's parameters."""

    def compile(self, worker: Worker) -> None:
        """Compile elections, and pulls towards one and two leaders."""
        x, pull = worker.model.params, np.float32(0)
        for i, level in enumerate(self._levels):
            self._elect(worker, [None] * level.workers)
            jax.block_until_ready(_pulled_towards(x, (x,) * (i + 1), (pull,) * (i + 1), np.int32(0)))

    def after_step(self, worker: Worker) -> None:
        """Post the worker if that is due, and count the step."""
        self._write(worker, posting=worker.step % (self._staleness + 1) == 0)
        self._count.add()

    def exchange(self, worker: Worker) -> Iterator[None]:
        """Pull a worker towards the best of its group and then towards the best of all, as these are due."""
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
            name = "local_" if level.workers < len(self._exchanges) else ""
            first = worker.position - worker.position % level.workers  # Of the group, or of all.
            leader = self._elect(worker, [posts.get(first + index) for index in range(level.workers)])
            found |= {f"{name}leader": leader, f"{name}staleness": 0, f"{name}distance": 0.0}
            if leader != NOBODY and first + leader != worker.position:
                post = posts[first + leader]
                found[f"{name}staleness"] = steps[first + leader] - post.step
                params, _ = self._board.take(first + leader, post, _device(worker))
                follows[name] = params, np.float32(level.pull)
        if follows:
            params, distances = _pulled_towards(
                worker.model.params, *zip(*follows.values(), strict=True), np.int32(worker.step)
            )
            worker.move(params)
            found |= {f"{name}distance": float(apart) for name, apart in zip(follows, distances, strict=True)}
            self.taken[worker.position] += len(follows)
        self._log("exchange", worker=worker.position, worker_step=worker.step, count=total, **found)
        yield None

    def _write(self, worker: Worker, *, posting: bool) -> None:
        post = None
        if posting:
            post = Post(self._board.life, worker.step, worker.score, worker.finite, worker.model.params)
        self._board.write(worker.position, worker.step, post)

    def _elect(self, worker: Worker, among: Sequence[Post | None]) -> int:
        scores = np.array([math.inf if post is None else post.score for post in among], np.float32)
        eligible = np.array([post is not None and post.eligible for post in among])
        return int(_elected(*jax.device_put((scores, eligible), _device(worker))))


@jax.jit
def _elected(scores: Float[Array, " workers"], eligible: Bool[Array, " workers"]) -> Int[Array, ""]:
    def position(score: Array, eligible: Array) -> Array:
        return elect(score, "worker", eligible=eligible)

    return jax.vmap(position, axis_name="worker")(scores, eligible)[0]


@jax.jit
def _pulled_towards(
    x: optax.Params, leaders: tuple[optax.Params, ...], pulls: tuple[Array, ...], step: Int[Array, ""]
) -> tuple[optax.Params, list[Array]]:
    """A worker's parameters after pulls towards the leaders in turn, and its distance to each before that pull."""
    updates, distances = jax.tree.map(jnp.zeros_like, x), []
    for leader_x, pull in zip(leaders, pulls, strict=True):
        point = optax.apply_updates(x, updates)
        distances.append(distance(point, leader_x))
        updates = pulled(updates, x, point, leader_x, pull, jnp.array(True), step)
    return optax.apply_updates(x, updates), distances


class Centered:
    """A center variable that workers meet one at a time, each every `period` of its own steps."""

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
        """Start with the center at the workers' start.

        Args:
          count: of all workers' steps.
          start: parameters of all workers at the start.
          meet: from a worker's parameters, the center and the worker's parameters after its last meeting (in DOWNPOUR
            the center of then), all on its device, to the worker's new parameters and the new center.
          workers: their number.
          period: local steps from one meeting of a worker to its next.
          log: takes the name of an event and its values.
        """
        self.center = start
        self._count, self._period, self._log = count, period, log
        self._meet = jax.jit(meet)
        self._lock = threading.Lock()
        self._last_centers = [start] * workers
        self.meetings = [0] * workers
        """How often each worker has met the center."""

    def compile(self, worker: Worker) -> None:
        """Compile the meeting."""
        center = jax.device_put(self.center, _device(worker))
        jax.block_until_ready(self._meet(worker.model.params, center, worker.model.params))

    def after_step(self, worker: Worker) -> None:
        """Count the step."""
        self._count.add()

    def exchange(self, worker: Worker) -> Iterator[None]:
        """Meet the center if that is due, under its lock."""
        i = worker.position
        if worker.step // self._period == self.meetings[i]:
            return
        self.meetings[i] += 1
        device = _device(worker)
        with self._lock:
            center, last_center = jax.device_put((self.center, self._last_centers[i]), device)
            params, self.center = jax.block_until_ready(self._meet(worker.model.params, center, last_center))
        self._last_centers[i] = params
        worker.move(params)
        self._log("exchange", worker=i, worker_step=worker.step, count=self._count.total)
        yield None


def _device(worker: Worker) -> jax.Device:
    [device] = jax.tree.leaves(worker.model.params)[0].devices()
    return device
