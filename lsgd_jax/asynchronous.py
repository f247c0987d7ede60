"""Asynchronous training: every worker at its own speed, as Algorithm 1 of the paper has it.

A worker takes jitted local steps on a device of its own, driven by a thread of its own, and counts each in one count of
all workers' steps. With n workers in all groups together, an exchange falls due when that count reaches the next
multiple of n * period, a global one at the multiples of n * global_period: the faster workers have taken more of those
steps than the slower. Data, learning rates and scores go by each worker's own steps. There are three ways to exchange:

- `Joined`: all meet in one collective exchange, each when it has finished the step at hand. Everybody waits for the
  slowest to end its step.
- `Posted`: each posts its score and a reference to its parameters on a board; where an exchange is due, a worker is
  pulled, at its own next boundary between steps, towards the best that is posted. Nobody waits.
- `Centred`: each worker meets a centre variable after every `period` of its own steps: EASGD and DOWNPOUR as their
  papers have them.

What a worker does is a generator, `life`, that gives up its turn at every boundary between two actions: `Threads` lets
all run as they come, and a test can give them turns in an order of its own.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from lsgd_jax.board import Board, Post
from lsgd_jax.distributed import StepCount
from lsgd_jax.errors import RunFailed, UsageError
from lsgd_jax.exchange import NOBODY, elect
from lsgd_jax.exchange.trees import distance
from lsgd_jax.link import pulled

GRACE = 10.0
"""Seconds that the other workers have to end the step at hand when one has failed, before the run ends without them."""
NOTICE = 0.1
"""Seconds in which a waiting worker notices that another has failed."""


class Model(NamedTuple):
    """What others may see of a worker: arrays on its device with the axes [group, worker] of size 1, never donated."""

    params: optax.Params
    statistics: Any
    """Running statistics of batch normalisation."""


class Told(NamedTuple):
    """What a local step tells."""

    loss: Float[Array, ""]
    score: Float[Array, ""]
    """The mean of the worker's last losses, by which leaders are elected."""
    finite: Bool[Array, ""]
    """Whether all parameters are finite after the step."""


class Worker:
    """A worker, which takes its local steps at its own speed."""

    def __init__(
        self,
        position: int,
        steps: int,
        model: Model,
        optimizer: optax.OptState,
        take_step: Callable[[int, Model, optax.OptState], tuple[Model, optax.OptState, Told]],
        *,
        least_seconds: float = 0.0,
    ) -> None:
        """Set out.

        Args:
          position: among all workers.
          steps: its own number of steps, after which it has finished.
          model: at the start.
          optimizer: the state that the steps take and give.
          take_step: a local step, from the number of those before it, the model and the optimiser's state, which may
            be donated.
          least_seconds: that a step takes: the rest is slept.
        """
        self.position, self.steps, self.model = position, steps, model
        self.step = 0
        """Local steps taken."""
        self.stepped_at = 0.0
        """When the last was, on `time.perf_counter`'s clock."""
        self.score, self.finite = math.inf, True
        self._losses: list[float] = []
        self._optimizer, self._take_step, self._least_seconds = optimizer, take_step, least_seconds

    @property
    def finished(self) -> bool:
        """Whether it has taken all its steps."""
        return self.step >= self.steps

    def take_step(self) -> None:
        """Take a local step, and wait for its end."""
        end = time.perf_counter() + self._least_seconds
        model, self._optimizer, told = self._take_step(self.step, self.model, self._optimizer)
        loss, score, finite = jax.device_get(told)
        self.model, self.score, self.finite = model, float(score), bool(finite)
        self._losses.append(float(loss))
        self.step += 1
        time.sleep(max(0.0, end - time.perf_counter()))
        self.stepped_at = time.perf_counter()

    def mean_loss(self) -> float:
        """The mean training loss since this was last asked; NaN if there has been no step."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def move(self, params: optax.Params) -> None:
        """Go to another point."""
        self.model = self.model._replace(params=params)


class Exchanges(Protocol):
    """How workers exchange."""

    def compile(self, worker: Worker) -> None:
        """Compile what exchanges run on the worker's device, so that none has to wait for it."""
        ...

    def after_step(self, worker: Worker) -> None:
        """Count the step that a worker has taken, and let others know what they need."""
        ...

    def exchange(self, worker: Worker) -> Iterator[threading.Event | None]:
        """Exchange if it is due for a worker at a boundary between its steps: a generator, as `life` is."""
        ...


def life(worker: Worker, exchanges: Exchanges) -> Iterator[threading.Event | None]:
    """What a worker does, one action a turn: an exchange if one is due for it, otherwise a local step.

    Yields:
      What the worker waits for, or None if it can go on.
    """
    while True:
        yield from exchanges.exchange(worker)
        if worker.finished:
            return
        worker.take_step()
        exchanges.after_step(worker)
        yield None


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


class Threads:
    """A context in which every worker's life runs in a thread of its own; if one fails, all end."""

    def __init__(self, workers: Sequence[Worker], exchanges: Exchanges) -> None:
        """Start nothing yet.

        Args:
          workers: of this process.
          exchanges: of all of them.
        """
        self._failure: tuple[Worker, BaseException] | None = None
        self._failed = threading.Event()
        self._threads = [
            threading.Thread(target=self._drive, args=(worker, life(worker, exchanges)), daemon=True)
            for worker in workers
        ]

    def __enter__(self) -> "Threads":
        """Start."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all; those that have not ended in time are left to end with the program."""
        self._failed.set()  # Whatever it was that ended this context.
        end = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def have_ended(self, seconds: float) -> bool:
        """Wait until all workers have finished or so many seconds have gone; tell whether they have.

        Raises:
          UsageError: if a worker has raised one, as when what it logs can't be written.
          RunFailed: if a worker has failed otherwise.
        """
        end = time.monotonic() + seconds
        while self._failure is None and (alive := [thread for thread in self._threads if thread.is_alive()]):
            if time.monotonic() >= end:
                return False
            alive[0].join(min(NOTICE, max(0.0, end - time.monotonic())))
        if self._failure is not None:
            worker, error = self._failure
            if isinstance(error, UsageError):
                raise error
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RunFailed(
                f"worker {worker.position} failed after {worker.step} steps and has ended the run ({why})."
            ) from error
        return True

    def _drive(self, worker: Worker, its_life: Iterator[threading.Event | None]) -> None:
        try:
            for event in its_life:
                while event is not None and not event.wait(NOTICE) and not self._failed.is_set():
                    pass
                if self._failed.is_set():
                    return
        except BaseException as error:
            self._failure = self._failure or (worker, error)
            self._failed.set()
