"""Assigns examples to workers and steps, as a pure function of the seed, the step and the history of workers."""

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from lsgd_jax.errors import UsageError


class Stretch(NamedTuple):
    """Consecutive steps of a run with the same workers."""

    steps: int
    workers: int
    """Number of workers in all groups."""
    batch_size: int
    """Examples per worker per step."""


class BatchIndices:
    """Indices of the training examples of all workers at each step.

    - "shards": every epoch is shuffled and split into disjoint shards, one per worker. An epoch has
      examples / (workers * batch size) steps, rounded down; leftover examples wait for another epoch.
    - "independent": every worker goes through all the data in its own order.
    - "partitions": every worker keeps one of equal, contiguous parts of the data for the whole run, and shuffles it
      every epoch. Where the data are sorted, workers see different distributions. When the number of workers changes,
      they are dealt new parts and begin an epoch.

    Resuming needs only the step, unless the number of workers has changed: then pass the earlier steps to `after`. The
    epoch continues with the remaining examples in new shards, so that no example occurs twice in an epoch; once too few
    remain for a step of the present workers, the next epoch begins.

    Example:
      >>> batches = BatchIndices(examples=8, workers=2, batch_size=2, sampling="shards", seed=0)
      >>> epoch = np.concatenate([batches(0), batches(1)], axis=1)
      >>> print(np.sort(epoch.reshape(-1)))
      [0 1 2 3 4 5 6 7]

      One worker continues after a step of two workers:

      >>> alone = BatchIndices(examples=8, workers=1, batch_size=2, sampling="shards", seed=0)
      >>> alone = alone.after([Stretch(steps=1, workers=2, batch_size=2)])
      >>> print(np.sort(np.concatenate([batches(0), alone(1), alone(2)]).reshape(-1)))
      [0 1 2 3 4 5 6 7]
    """

    def __init__(
        self,
        *,
        examples: int,
        workers: int,
        batch_size: int,
        sampling: Literal["shards", "independent", "partitions"],
        seed: int,
    ) -> None:
        """Plan the epochs.

        Args:
          examples: number of training examples.
          workers: number of workers in all groups.
          batch_size: examples per worker per step.
          sampling: "shards", "independent" or "partitions".
          seed: random seed of the shuffles.

        Raises:
          UsageError: if there are too few examples for one step.
        """
        self._examples, self._workers, self.batch_size = examples, workers, batch_size
        self._sampling, self.seed = sampling, seed
        self._needed = self._needed_by(workers, batch_size)
        self.steps_per_epoch = examples // self._needed
        self._dealt_epoch, self._batches = -1, np.empty(0, np.int32)
        self._start_from([])

    def after(self, earlier: Sequence[Stretch]) -> "BatchIndices":
        """Return the batches of these workers after the steps of earlier workers.

        Args:
          earlier: the earlier steps, from the first on.

        Returns:
          The batches of all later steps.

        Raises:
          UsageError: if there are too few examples for one of the earlier steps.
        """
        batches = copy.copy(self)
        batches._dealt_epoch = -1
        batches._start_from(earlier)
        return batches

    def __call__(self, step: int) -> Int32[np.ndarray, "workers batch_size"]:
        """Return the indices at a step, counted from 0; worker axis first.

        Raises:
          ValueError: for a step of earlier workers.
        """
        epoch, epoch_step = self._position(step)
        if epoch != self._dealt_epoch:
            self._dealt_epoch, self._batches = epoch, self._deal(epoch)
        return self._batches[epoch_step]

    def epochs(self, step: int) -> float:
        """Return the number of epochs completed before a step.

        Raises:
          ValueError: for a step of earlier workers.
        """
        epoch, epoch_step = self._position(step)
        taken, steps = (self._taken, self._steps) if epoch == self._epoch else (0, self.steps_per_epoch)
        epoch_size = taken + steps * self._needed
        return (epoch * epoch_size + taken + epoch_step * self._needed) / epoch_size

    def _start_from(self, earlier: Sequence[Stretch]) -> None:
        """Find the epoch that the earlier workers have begun, and the examples that they have used of it."""
        self._first = self._epoch = self._taken = 0
        self._parts: list[Stretch] = []  # Of the current epoch.
        for stretch in earlier:
            needed = self._needed_by(stretch.workers, stretch.batch_size)
            self._first += stretch.steps
            more = stretch.steps - (self._examples - self._taken) // needed
            if more > 0:
                epochs, steps = divmod(more - 1, self._examples // needed)
                self._epoch, self._taken, self._parts = self._epoch + 1 + epochs, 0, []
                stretch = stretch._replace(steps=steps + 1)
            self._taken += stretch.steps * needed
            self._parts.append(stretch)
        if self._sampling == "partitions" and self._taken:
            self._epoch, self._taken, self._parts = self._epoch + 1, 0, []
        self._steps = (self._examples - self._taken) // self._needed  # Remaining in the epoch.

    def _needed_by(self, workers: int, batch_size: int) -> int:
        """Examples per step out of the data that workers share."""
        needed = self._shards(workers) * batch_size
        if needed > self._examples:
            raise UsageError(
                f"a step of {workers} workers with a batch_size of {batch_size} takes {needed} examples,"
                f" but there are {self._examples}: lower one of them."
            )
        return needed

    def _shards(self, workers: int) -> int:
        """Number of shards per order of the examples."""
        return 1 if self._sampling == "independent" else workers

    def _position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the step's number among the present workers' steps in it."""
        since = step - self._first
        if since < 0:
            raise ValueError(f"step {step} was taken by earlier workers, whose last is {self._first - 1}.")
        if since < self._steps:
            return self._epoch, since
        epochs, epoch_step = divmod(since - self._steps, self.steps_per_epoch)
        return self._epoch + 1 + epochs, epoch_step

    def _deal(self, epoch: int) -> Int32[np.ndarray, "steps workers batch_size"]:
        if self._sampling == "shards":
            shards = [self._dealt(self._left(epoch), self._workers, self.batch_size)]
        elif self._sampling == "independent":
            shards = [self._dealt(self._left(epoch, i), 1, self.batch_size) for i in range(self._workers)]
        else:
            size = self._examples // self._workers
            parts = [i * size + self._rng(epoch, i).permutation(size) for i in range(self._workers)]
            shards = [self._dealt(part, 1, self.batch_size) for part in parts]
        return np.concatenate(shards).swapaxes(0, 1).astype(np.int32)

    def _left(self, epoch: int, *which: int) -> np.ndarray:
        """Return an order of the examples, without those used by earlier workers."""
        order = self._rng(epoch, *which).permutation(self._examples)
        for steps, workers, batch_size in self._parts if epoch == self._epoch else []:
            shards = self._dealt(order, workers, batch_size)
            order = np.append(shards[:, steps:], order[shards.size :])
        return order

    def _rng(self, epoch: int, *which: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, *which])

    def _dealt(self, order: np.ndarray, workers: int, batch_size: int) -> np.ndarray:
        """Split an order into [shard, step, example]."""
        shards = self._shards(workers)
        steps = len(order) // (shards * batch_size)
        return order[: shards * steps * batch_size].reshape(shards, steps, batch_size)
