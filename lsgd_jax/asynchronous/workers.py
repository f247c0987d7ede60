"""A worker, what it does, and the threads that drive all of them."""

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
"""Seconds that the other workers have to end the step at hand when one has failed, before the run ends without them."""
NOTICE = 0.1
"""Seconds in which a waiting worker notices that another has failed."""


class Model(NamedTuple):
    """What others may see of a worker: arrays on its device with the axes [group, worker] of size 1, never donated."""

    params: optax.Params
    statistics: Any
    """Running statistics of batch normalisation."""


class StepReport(NamedTuple):
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
        take_step: Callable[[int, Model, optax.OptState], tuple[Model, optax.OptState, StepReport]],
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
