"""Exchanges of asynchronous workers: joined, posted, or with a center variable."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from lsgd_jax.asynchronous.board import Board, Gone, Post, ranked
from lsgd_jax.asynchronous.workers import Worker
from lsgd_jax.distributed import StepCount
from lsgd_jax.exchange import NOBODY
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


class _Followed(NamedTuple):
    """Whom a worker follows at one level."""

    name: str
    """What the level's values in an event start with: "local_", or nothing for all workers."""
    pull: float
    leader: int
    """Its position; `NOBODY` if nobody could be elected."""
    post: Post | None
    """That its model is of."""
    model: Any
    """On the follower's device; None if it is not pulled: it leads, or nobody does."""


class Posted:
    """A board on which workers post themselves and from which each fetches its leader when an exchange is due for it.

    However many exchanges have become due during a worker's step, it is pulled once: repeated pulls towards the same
    post would amount to a stronger pull. A leader in another process is fetched by a thread of its own: the worker goes
    on and is pulled at its next boundary after the parameters have come. If they don't, the next best is fetched.

    A worker posts before it is pulled, so that a life and a number of steps tell which parameters a post has: those
    after so many steps, before any pull at that step.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        board: Board,
        *,
        workers: int,
        staleness: int = 0,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Start before the first exchange.

        Args:
          levels: local exchanges first.
          board: of all workers; it also counts their steps.
          workers: their number.
          staleness: local steps that a worker may be ahead of its post: it posts every staleness + 1 steps.
          log: takes the name of an event and its values.
        """
        self._levels, self._board, self._workers = levels, board, workers
        self._staleness, self._log = staleness, log
        self._exchanges = [self._due(board.read()[1])] * workers
        self._fetching: dict[int, Future[list[_Followed]]] = {}
        self._fetchers = ThreadPoolExecutor(workers, "fetch")  # A thread for each worker who fetches.
        self.taken = [0] * workers
        """How often each worker has fetched a leader's parameters."""

    def compile(self, worker: Worker) -> None:
        """Compile pulls towards one and two leaders."""
        x, pull = worker.model.params, np.float32(0)
        for i in range(len(self._levels)):
            jax.block_until_ready(pulled_towards(x, (x,) * (i + 1), (pull,) * (i + 1), np.int32(0)))

    def after_step(self, worker: Worker) -> None:
        """Post the worker if that is due, and count the step."""
        self._write(worker, posting=worker.step % (self._staleness + 1) == 0)

    def exchange(self, worker: Worker) -> Iterator[None]:
        """Pull a worker towards the best of its group and then towards the best of all, as these are due."""
        fetching = self._fetching.get(worker.position)
        if fetching is not None:
            if fetching.done():
                del self._fetching[worker.position]
                self._pull(worker, fetching.result(), self._board.read()[1])
                yield None
            return
        done, due = self._exchanges[worker.position], self._due(self._board.read()[1])
        if due == done:
            return
        self._exchanges[worker.position] = due
        self._write(worker, posting=True)  # It stands for election as it is now.
        posts, steps = self._board.read()
        rankings: list[tuple[Level, list[int]]] = []
        for level, now, before in zip(self._levels, due, done, strict=True):
            if now != before:
                first = worker.position - worker.position % level.workers  # Of the group, or of all.
                group = range(first, first + level.workers)
                rankings.append((level, ranked({i: posts[i] for i in group if i in posts})))
        follow = partial(self._follow, worker.position, _device(worker), rankings, posts)
        best = [ranking[0] for _, ranking in rankings if ranking]
        if all(i == worker.position or posts[i].params is not None for i in best):
            self._pull(worker, follow(), steps)
            yield None
        else:
            self._fetching[worker.position] = self._fetchers.submit(follow)

    def _due(self, steps: Mapping[int, int]) -> list[int]:
        """How many exchanges of each level are due after these steps of all workers."""
        total = sum(steps.values())
        return [total // level.steps_between for level in self._levels]

    def _follow(
        self,
        position: int,
        device: jax.Device,
        rankings: Sequence[tuple[Level, list[int]]],
        posts: Mapping[int, Post],
    ) -> list[_Followed]:
        """Whom a worker follows: at each level the best who can be had."""
        found = []
        for level, ranking in rankings:
            name = "local_" if level.workers < self._workers else ""
            followed = _Followed(name, level.pull, NOBODY, None, None)
            for candidate in ranking:
                if candidate == position:
                    followed = followed._replace(leader=position, post=posts[position])
                    break
                with suppress(Gone):
                    model, post = self._board.take(candidate, posts[candidate], device)
                    if post.eligible:
                        followed = followed._replace(leader=candidate, post=post, model=model)
                        break
            found.append(followed)
        return found

    def _pull(self, worker: Worker, followed: Sequence[_Followed], steps: Mapping[int, int]) -> None:
        """Pull a worker to those that it follows, in turn; `steps` of all workers tell how stale their posts are."""
        values: dict[str, Any] = {}
        for name, _, leader, post, _ in followed:
            first = worker.position - worker.position % self._levels[0].workers if name else 0
            index = leader if leader == NOBODY else leader - first
            values |= {f"{name}leader": index, f"{name}staleness": 0, f"{name}distance": 0.0}
            if post is not None:
                values |= {f"{name}leader_life": post.life, f"{name}leader_step": post.step}
                values[f"{name}staleness"] = max(0, steps[leader] - post.step)
        pulls = [(each.name, each.model.params, np.float32(each.pull)) for each in followed if each.model is not None]
        if pulls:
            names, leaders, strengths = zip(*pulls, strict=True)
            params, distances = pulled_towards(worker.model.params, leaders, strengths, np.int32(worker.step))
            worker.move(params)
            values |= {f"{name}distance": float(apart) for name, apart in zip(names, distances, strict=True)}
            self.taken[worker.position] += len(pulls)
        self._log(
            "exchange",
            worker=worker.position,
            life=self._board.life,
            worker_step=worker.step,
            count=sum(steps.values()),
            **values,
        )

    def _write(self, worker: Worker, *, posting: bool) -> None:
        eligible = worker.finite and worker.step >= worker.eligible_from
        post = Post(self._board.life, worker.step, worker.score, eligible, worker.model) if posting else None
        self._board.write(worker.position, worker.step, post)


@jax.jit
def pulled_towards(
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
    """A center variable that workers meet one at a time, each every `period` of its own steps.

    It is that of the process that has been in the run for the longest time. Workers of other processes meet it there,
    by a thread of their own: they go on and are moved, when the answer has come, by as much as the meeting has moved
    them. With each answer comes a copy of the center, from which the next process goes on when that one has ended. A
    meeting that fails is due again; if only its answer was lost, the center has met the worker twice.
    """

    def __init__(
        self,
        board: Board,
        start: optax.Params,
        meet: Callable[[optax.Params, optax.Params, optax.Params], tuple[optax.Params, optax.Params]],
        *,
        workers: int,
        period: int,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Start before the first meeting.

        Args:
          board: of all workers; it counts their steps.
          start: the center at the start: the parameters of all workers then, or a copy from before.
          meet: from a worker's parameters, the center and the worker's parameters after its last meeting (in DOWNPOUR
            the center of then), all on its device, to the worker's new parameters and the new center.
          workers: their number.
          period: local steps from one meeting of a worker to its next.
          log: takes the name of an event and its values.
        """
        self.center = start
        """The center, or the last copy of it."""
        self._board, self._period, self._log = board, period, log
        self._meet = jax.jit(meet)
        self._lock = threading.Lock()
        self._meetings = 0
        """Meetings here, by which copies of this center are numbered."""
        self._copies: dict[str, int] = {}
        """Number of the newest copy of the center from each process: answers may come in any order."""
        self._last_params: dict[int, optax.Params] = {}
        """Parameters of each worker after its last meeting."""
        self._met: dict[int, int] = {}
        """Meetings that have been due for each worker."""
        self._calling: dict[int, Future[tuple[optax.Params, optax.Params] | None]] = {}
        self._callers = ThreadPoolExecutor(workers, "meet")  # A thread for each worker who meets elsewhere.
        self.taken = [0] * workers
        """How often each worker's parameters or the center have been sent for it."""
        self._device = _device_of(start)
        board.serve(self._answer, (start, start, _number(0)))

    def compile(self, worker: Worker) -> None:
        """Compile the meeting."""
        x, device = worker.model.params, _device(worker)
        center = jax.device_put(self.center, device)
        jax.block_until_ready((self._meet(x, center, x), _moved(x, x, x)))

    def after_step(self, worker: Worker) -> None:
        """Post the worker, for those who evaluate it, and count the step."""
        post = Post(self._board.life, worker.step, worker.score, worker.finite, worker.model)
        self._board.write(worker.position, worker.step, post)

    def exchange(self, worker: Worker) -> Iterator[None]:
        """Meet the center if that is due."""
        i, x = worker.position, worker.model.params
        last, due = self._last_params.setdefault(i, x), worker.step // self._period
        if (calling := self._calling.get(i)) is not None:
            if calling.done():
                del self._calling[i]
                if (met := calling.result()) is not None:
                    self._met[i] = due
                    self._end_meeting(worker, *met, sent=4)
                    yield None
        elif due != self._met.setdefault(i, due):
            if (owner := self._board.oldest()) is not None:
                self._calling[i] = self._callers.submit(self._call, owner, x, last)
            else:
                self._met[i] = due
                self._end_meeting(worker, x, self._meet_here(x, last, _device(worker))[0], sent=2)
                yield None

    def _end_meeting(self, worker: Worker, before: optax.Params, after: optax.Params, *, sent: int) -> None:
        """Move a worker as a meeting has moved the parameters that it had then."""
        i, x = worker.position, worker.model.params
        worker.move(after if x is before else _moved(x, before, after))
        self._last_params[i] = after
        self.taken[i] += sent
        total = sum(self._board.read()[1].values())
        self._log("exchange", worker=i, life=self._board.life, worker_step=worker.step, count=total)

    def _meet_here(self, x: Any, last: Any, device: jax.Device) -> tuple[optax.Params, optax.Params, np.ndarray]:
        """A worker's new parameters, the new center and its number."""
        with self._lock:
            x, center, last = jax.device_put((x, self.center, last), device)
            params, self.center = jax.block_until_ready(self._meet(x, center, last))
            self._meetings += 1
            return params, self.center, _number(self._meetings)

    def _call(self, owner: str, x: optax.Params, last: optax.Params) -> tuple[optax.Params, optax.Params] | None:
        """A worker's parameters before and after a meeting in another process; None if it is gone."""
        try:
            params, center, number = self._board.call(owner, (x, last, _number(0)))
        except Gone:
            return None
        with self._lock:
            if self._board.oldest() == owner and number > self._copies.get(owner, 0):
                self.center, self._copies[owner] = jax.device_put(center, self._device), int(number)
        return x, jax.device_put(params, _device_of(x))

    def _answer(self, sent: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Let a worker of another process meet the center, which is here."""
        if self._board.oldest() is not None:
            raise ValueError("the center is in another process")
        x, last, _ = sent  # What is sent is shaped like the answer.
        return self._meet_here(x, last, self._device)


def _number(count: int) -> np.ndarray:
    """The number of a copy of the center, as it is sent."""
    return np.array(count, np.int32)


@jax.jit
def _moved(x: optax.Params, before: optax.Params, after: optax.Params) -> optax.Params:
    """Parameters moved as others have been."""
    return jax.tree.map(lambda x, before, after: x + (after - before), x, before, after)


def _device(worker: Worker) -> jax.Device:
    return _device_of(worker.model.params)


def _device_of(params: optax.Params) -> jax.Device:
    [device] = jax.tree.leaves(params)[0].devices()
    return device
