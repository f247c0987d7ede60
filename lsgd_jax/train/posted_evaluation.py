"""Evaluation of posted workers, wherever they are, without any of them waiting for it."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lsgd_jax.asynchronous import Board, Model, Worker
from lsgd_jax.asynchronous.board import Gone
from lsgd_jax.config import Config
from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, STACKED, place
from lsgd_jax.exchange import broadcast_from
from lsgd_jax.methods import METHODS
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.recorder import AsynchronousRecorder
from lsgd_jax.train.setup import step_key
from lsgd_jax.train.step import TrainState


class Evaluations:
    """Evaluates all workers in a thread of its own: those of this process as they are, others as they have posted.

    A worker whose parameters can't be fetched is left out of the evaluated model, and its measure is NaN.
    """

    def __init__(
        self,
        config: Config,
        model: nnx.Module,
        feed: Feed,
        board: Board,
        workers: Sequence[Worker],
        recorder: AsynchronousRecorder,
        *,
        shared: Any,
        center: Callable[[], optax.Params] | None,
        bytes_sent: Callable[[], float],
    ) -> None:
        """Evaluate nothing yet.

        Args:
          config: of the run.
          model: of the workers.
          feed: of the data.
          board: of all workers.
          workers: of this process.
          recorder: of the run.
          shared: the feed's arrays on the devices, if all workers are here; else None.
          center: the center variable of the method, if it has one.
          bytes_sent: per worker so far.
        """
        self._config, self._board, self._workers, self._recorder = config, board, workers, recorder
        self._feed, self._center, self._bytes_sent = feed, center, bytes_sent
        self._size = config.groups * config.workers
        self._placement = place(config.groups, config.workers, jax.local_devices())
        self._evaluate = evaluation(
            config.task,
            model,
            METHODS[config.method].center if center is None else _given_center,
            self._placement,
            feed.of_workers(range(self._size)),
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(step_key(config.seed), config.steps),  # No step's.
        )
        self._shared = shared
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._running: Future[float] | None = None
        self._due = self._due_now()

    def _due_now(self) -> int:
        count = sum(self._board.read()[1].values())
        return min(count, self._size * self._config.steps - 1) // (self._size * self._config.eval_every)

    def if_due(self, *, here: bool) -> None:
        """Start an evaluation if one is due and none is under way.

        Args:
          here: whether it is this process that evaluates.
        """
        self._raise_problem()
        due = self._due_now()
        if due > self._due and self._running is None:
            self._due = due
            if here:
                self._running = self._thread.submit(self._run, self._recorder.clock.seconds())

    def at_end(self) -> Future[float]:
        """Evaluate all workers when they have finished: the headline measure of the evaluated model."""
        return self._thread.submit(self._run, self._recorder.clock.seconds())

    def close(self) -> None:
        """Wait for an evaluation that is under way."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def _raise_problem(self) -> None:
        if self._running is not None and self._running.done():
            self.close()

    def _run(self, seconds: float) -> float:
        if self._shared is None:
            self._shared = self._placement.put(self._feed.shared, SHARED)
        own = {worker.position: (worker.step, worker.score, worker.model) for worker in self._workers}
        posts, counts = self._board.read()
        steps, losses = np.zeros(self._size, int), np.full(self._size, np.nan)
        models: list[Model | None] = [None] * self._size
        for i in range(self._size):
            steps[i] = counts.get(i, 0)
            if i in own:
                steps[i], losses[i], models[i] = own[i]
            elif i in posts:
                losses[i] = posts[i].score
                models[i] = self._fetched(i)
        missing = np.array([model is None for model in models])
        absent = self._in_place_of_absent(next(iter(own.values()))[2])
        rows = [jax.tree.map(np.asarray, absent if model is None else model) for model in models]
        stacked = self._placement.put(jax.tree.map(lambda *xs: np.concatenate(xs)[:, 0], *rows), STACKED)
        center: Any = ()
        if self._center is not None:
            every = jax.tree.map(
                lambda x: np.broadcast_to(np.asarray(x)[0], (self._size, *x.shape[2:])), self._center()
            )
            center = self._placement.put(every, STACKED)
        result = self._evaluate(TrainState(stacked.params, stacked.statistics, center), self._shared)
        shape = self._placement.shape
        result.workers[missing.reshape(shape)] = math.nan
        self._recorder.record_evaluation(
            result,
            seconds=seconds,
            worker_steps=steps.reshape(shape),
            train_losses=np.where(np.isfinite(losses), losses, np.nan).reshape(shape),
            bytes_sent=self._bytes_sent(),
        )
        return result.center[self._config.task.headline.name]

    def _in_place_of_absent(self, present: Model) -> Model:
        """What stands for a worker who is not there: NaN, unless its statistics evaluate a share of the test data."""
        absent = jax.tree.map(_nothing_like, present)
        own = self._config.batch_statistics == "own"
        return absent._replace(statistics=present.statistics) if own else absent

    def _fetched(self, position: int) -> Model | None:
        try:
            post = self._board.read()[0][position]
            return self._board.take(position, post, jax.local_devices()[0])[0]
        except (Gone, KeyError):
            return None


def _given_center(params: optax.Params, center: optax.Params, axis_name: Any) -> optax.Params:
    """The center variable, which every worker's exchange state is."""
    return broadcast_from(center, 0, axis_name, method="all_reduce")


def _nothing_like(x: jax.Array) -> np.ndarray:
    """What stands for the array of a worker who is not there: whatever can be NaN is."""
    return np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype)
