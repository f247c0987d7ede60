"""Which examples each worker sees at each step: a pure function of the seed and the step."""

from typing import Literal

import numpy as np
from jaxtyping import Int32

from lsgd_jax.errors import UsageError


class BatchIndices:
    """The indices of the training examples that all workers take at a step.

    Nothing but the step has to be known to go on from anywhere.

    - "shards": every epoch is shuffled anew and dealt out to the workers in disjoint shards. An epoch is
      examples / (workers * batch size) steps, rounded down; what is left over waits for another epoch.
    - "independent": every worker goes through all the data in orders of its own.

    Example:
      >>> batches = BatchIndices(examples=8, workers=2, batch_size=2, sampling="shards", seed=0)
      >>> epoch = np.concatenate([batches(0), batches(1)], axis=1)
      >>> print(np.sort(epoch.reshape(-1)))
      [0 1 2 3 4 5 6 7]
    """

    def __init__(
        self, *, examples: int, workers: int, batch_size: int, sampling: Literal["shards", "independent"], seed: int
    ) -> None:
        """Set out the epochs.

        Args:
          examples: in the training data.
          workers: in all groups together.
          batch_size: examples a worker takes a step.
          sampling: "shards" or "independent".
          seed: of the shuffles.

        Raises:
          UsageError: if the data are too few for one step.
        """
        needed = batch_size * (workers if sampling == "shards" else 1)
        if needed > examples:
            raise UsageError(
                f"a step of {workers} workers with a batch_size of {batch_size} takes {needed} examples,"
                f" but there are {examples}: lower one of them."
            )
        self.steps_per_epoch = examples // needed
        self._examples, self._workers, self._batch_size = examples, workers, batch_size
        self._sampling, self._seed = sampling, seed
        self._epoch, self._batches = -1, np.empty(0, np.int32)

    def __call__(self, step: int) -> Int32[np.ndarray, "workers batch_size"]:
        """The indices at a step, counted from 0; the worker axis first."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._deal(epoch)
        return self._batches[step_of_epoch]

    def _deal(self, epoch: int) -> Int32[np.ndarray, "steps workers batch_size"]:
        steps, workers, batch = self.steps_per_epoch, self._workers, self._batch_size
        if self._sampling == "shards":
            order = np.random.default_rng([self._seed, epoch]).permutation(self._examples)[: steps * workers * batch]
            return order.reshape(workers, steps, batch).swapaxes(0, 1).astype(np.int32)
        orders = [np.random.default_rng([self._seed, epoch, i]).permutation(self._examples) for i in range(workers)]
        return np.stack([o[: steps * batch].reshape(steps, batch) for o in orders], axis=1).astype(np.int32)
