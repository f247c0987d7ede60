"""Asynchronous workers, their actions, and the threads that drive them."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import optax
from jaxtyping import Array, Bool, Float

from lsgd_jax.errors import RunFailed, UsageError

GRACE = 10.0
"""Seconds in which the other workers may end their current step when one has failed; then the run ends without them."""
NOTICE = 0.1
"""Seconds within which a waiting worker notices that another has failed."""


class Model(NamedTuple):
    """What others may see of a worker: arrays on its device, with the axes [group, worker] of size 1, never donated."""

    params: optax.Params
    statistics: Any
    """Running statistics of batch normalization."""


class StepReport(NamedTuple):
    """The metrics of a local step."""

    loss: Float[Array, ""]
    score: Float[Array, ""]
    """Mean of the worker's last losses, by which leaders are elected."""
    finite: Bool[Array, ""]
    """Whether all parameters are finite after the step."""


class Worker:
    """A worker that takes local steps at its own speed."""

    def __init__(
        self,
        position: int,
        steps: int,
        model: Model,
        optimizer: optax.OptState,
        take_step: Callable[[int, Model, optax.OptState], tuple[Model, optax.OptState, StepReport]],
        *,
        first: int = 0,
        min_seconds: float = 0.0,
    ) -> None:
        """Start before its next step.

        Args:
          position: global index of the worker.
          steps: local steps to take, in all its lives.
          model: at the start.
          optimizer: its state at the start.
          take_step: takes a local step, from the number of steps before it, the model and the optimizer state, which
            may be donated.
          first: steps that it has taken in earlier lives.
          min_seconds: minimum duration of a step; the worker sleeps for the rest.
        """
        self.position, self.steps, self.model, self.optimizer = position, steps, model, optimizer
        """The optimizer state is for the worker's own thread: its next step may donate it."""
        self.step = first
        """Local steps taken, in all its lives."""
        self.eligible_from = 0
        """Steps after which it may lead: those after which the window of losses of a replacement is full."""
        self.score, self.finite = math.inf, True
        self._losses: list[float] = []
        self._take_step, self._min_seconds = take_step, min_seconds

    @property
    def finished(self) -> bool:
        """Whether it has taken all its steps."""
        return self.step >= self.steps

    def take_step(self) -> None:
        """Take a local step and wait until it is computed."""
        end = time.perf_counter() + self._min_seconds
        model, self.optimizer, report = self._take_step(self.step, self.model, self.optimizer)
        loss, score, finite = jax.device_get(report)
        self.model, self.score, self.finite = model, float(score), bool(finite)
        self._losses.append(float(loss))
        self.step += 1
        time.sleep(max(0.0, end - time.perf_counter()))

    def mean_loss(self) -> float:
        """Mean training loss of the steps since the last call; NaN if there are none."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def move(self, params: optax.Params) -> None:
        """Replace the parameters."""
        self.model = self.model._replace(params=params)


class Exchanges(Protocol):
    """How workers exchange."""

    def compile(self, worker: Worker) -> None:
        """Compile the exchange's programs for the worker's device, so that no exchange waits for the compiler."""
        ...

    def after_step(self, worker: Worker) -> None:
        """Count a step that a worker has taken, and publish what other workers need."""
        ...

    def exchange(self, worker: Worker) -> Iterator[threading.Event | None]:
        """Exchange if an exchange is due for a worker between its steps: a generator, like `life`."""
        ...


def life(worker: Worker, exchanges: Exchanges) -> Iterator[threading.Event | None]:
    """A worker's actions, one per turn: an exchange if one is due, otherwise a local step.

    Yields:
      What the worker waits for, or None if it can take its next turn.
    """
    while True:
        yield from exchanges.exchange(worker)
        if worker.finished:
            return
        worker.take_step()
        exchanges.after_step(worker)
        yield None


class Threads:
    """A context in which every worker runs in its own thread; if one fails, all end."""

    def __init__(self, workers: Sequence[Worker], exchanges: Exchanges) -> None:
        """Make the threads.

        Args:
          workers: of this process.
          exchanges: shared by all workers.
        """
        self._failure: tuple[Worker, BaseException] | None = None
        self._failed = threading.Event()
        self._workers = workers
        self._threads = [
            threading.Thread(target=self._drive, args=(worker, life(worker, exchanges)), daemon=True)
            for worker in workers
        ]

    def __enter__(self) -> "Threads":
        """Start the threads."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End all threads; those that do not end in time end with the program."""
        self._failed.set()  # Whatever has ended this context.
        end = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def running(self) -> list[Worker]:
        """The workers whose threads have not ended: their states may be donated to a step at any time."""
        return [worker for worker, thread in zip(self._workers, self._threads, strict=True) if thread.is_alive()]

    def have_ended(self, seconds: float) -> bool:
        """Wait until all workers have finished, at most this many seconds; returns whether they have.

        Raises:
          UsageError: if a worker has raised one, as when its events can't be written.
          RunFailed: if a worker has failed in another way.
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
