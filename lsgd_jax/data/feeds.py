"""Feeds of training data: in device memory from the start, or streamed batch by batch."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lsgd_jax.data.preprocessing import IMAGENET
from lsgd_jax.data.sources import Dataset
from lsgd_jax.data.streams import BatchIndices, Stretch


class Feed(Protocol):
    """Interface between training and the data."""

    classes: int
    shape: tuple[int, ...]
    """Shape of an example as the network sees it."""
    shared: Any
    """Arrays replicated on every device for the whole run, the same for all workers."""
    test_count: int
    """Number of test examples."""

    def batches(self, first: int, end: int) -> Iterator[Any]:
        """Yield the batches of this process's workers for steps [first, end), worker axis first."""
        ...

    def of_workers(self, rows: Sequence[int]) -> "Feed":
        """Return a feed for the workers with these indices only; another thread may take its batches."""
        ...

    def after(self, earlier: Sequence[Stretch]) -> "Feed":
        """Return a feed that continues after the steps of earlier workers; see `BatchIndices.after`."""
        ...

    def epochs(self, step: int) -> float:
        """Return the number of epochs completed before a step."""
        ...

    def training(
        self, shared: Any, batch: Any, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """Return one worker's training examples and labels from `shared` and its batch; jittable.

        Args:
          shared: the copy of `shared` on this device.
          batch: this worker's batch, without a worker axis.
          key: random key for augmentation, different for every worker and step.
        """
        ...

    def test_chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all test examples in chunks of one size; the last is padded with examples labeled -1."""
        ...

    def testing(self, x: Array) -> Float[Array, "batch ..."]:
        """Return test examples as the network sees them; jittable."""
        ...


class InMemory:
    """Feed whose training data are replicated on every device; a batch is an array of example indices."""

    def __init__(self, data: Dataset, batches: BatchIndices, rows: Sequence[int] | None = None) -> None:
        """Create a feed of a data set.

        Args:
          data: the data set.
          batches: indices of the batches of all workers.
          rows: indices of the workers to feed; by default all.
        """
        self._data, self._batches = data, batches
        self._rows = slice(None) if rows is None else list(rows)
        self.classes, self.test_count = data.classes, len(data.test_y)
        self.shape = jax.eval_shape(self.testing, data.test_x[:1]).shape[1:]
        # Examples as rows: TPUs pad the last two axes (of images by a lot) and would copy all data in every round.
        self.shared = data.train_x.reshape(len(data.train_x), -1), data.train_y

    def batches(self, first: int, end: int) -> Iterator[Int[np.ndarray, "workers batch"]]:
        """Yield the indices of the examples."""
        return (self._batches(step)[self._rows] for step in range(first, end))

    def of_workers(self, rows: Sequence[int]) -> "InMemory":
        """Return a feed for some of the workers."""
        feed = copy.copy(self)
        feed._rows, feed._batches = list(rows), copy.copy(self._batches)
        return feed

    def after(self, earlier: Sequence[Stretch]) -> "InMemory":
        """Return a feed that continues after earlier workers."""
        feed = copy.copy(self)
        feed._batches = self._batches.after(earlier)
        return feed

    def epochs(self, step: int) -> float:
        """Return the number of epochs completed before a step."""
        return self._batches.epochs(step)

    def training(
        self, shared: tuple[Array, Array], batch: Int[Array, " batch"], key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """Return the examples, augmented if the data set defines augmentation."""
        rows, y = (array[batch] for array in shared)
        x = rows.reshape(len(rows), *self._data.train_x.shape[1:])
        preprocessing = self._data.preprocessing
        return (x if preprocessing is None else preprocessing.training(x, key)), y

    def test_chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the test data in padded chunks."""
        for start in range(0, self.test_count, size):
            x, y = self._data.test_x[start : start + size], self._data.test_y[start : start + size]
            yield padded(x, size, 0), padded(y, size, -1)

    def testing(self, x: Array) -> Float[Array, "batch ..."]:
        """Return the examples, normalized and cropped if the data set defines it."""
        preprocessing = self._data.preprocessing
        return x if preprocessing is None else preprocessing.testing(x)


class Streamed:
    """Feed of ImageNet that decodes images during training; a batch is 8-bit images and labels."""

    def __init__(
        self,
        data_dir: Path | str | None,
        *,
        workers: int,
        batch_size: int,
        sampling: Literal["shards", "independent", "partitions"],
        seed: int,
        held_out: float,
        rows: Sequence[int] | None = None,
        image_size: int,
        processes: int,
    ) -> None:
        """Open the data set.

        Args:
          data_dir: folder of prepared data sets.
          workers: number of workers in all groups.
          batch_size: examples per worker per step.
          sampling: "shards", "independent" or "partitions"; see `BatchIndices`.
          seed: random seed of order, crops and flips.
          held_out: share of the training data to test on; 0: test on the validation images.
          rows: indices of the workers to feed; by default all.
          image_size: side of the square images in pixels.
          processes: number of processes that decode images.

        Raises:
          UsageError: if the data set is not prepared, or has too few examples for one step.
        """
        from lsgd_jax.data.imagenet import ImageNetStream, ImageNetTest

        self._stream = ImageNetStream(
            data_dir,
            workers=workers,
            batch_size=batch_size,
            sampling=sampling,
            seed=seed,
            held_out=held_out,
            rows=rows,
            image_size=image_size,
        )
        self._test = ImageNetTest(data_dir, held_out=held_out, image_size=image_size)
        self._processes = processes
        self.classes = 1000
        self.shape: tuple[int, ...] = (image_size, image_size, 3)
        self.test_count = self._test.examples
        self.shared = ()

    def batches(self, first: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield 8-bit images and labels."""
        return self._stream.batches(first, end, self._processes)

    def of_workers(self, rows: Sequence[int]) -> "Streamed":
        """Return a feed for some of the workers, with as many decoding processes of its own."""
        feed = copy.copy(self)
        feed._stream = self._stream.of_workers(rows)
        return feed

    def after(self, earlier: Sequence[Stretch]) -> "Streamed":
        """Return a feed that continues after earlier workers."""
        feed = copy.copy(self)
        feed._stream = self._stream.after(earlier)
        return feed

    def epochs(self, step: int) -> float:
        """Return the number of epochs completed before a step."""
        return self._stream.epochs(step)

    def training(
        self, shared: tuple, batch: tuple[Array, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """Return the images, normalized; they arrive cropped and flipped."""
        x, y = batch
        return IMAGENET.training(x, key), y

    def test_chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the validation or held-out images in padded chunks."""
        return self._test.chunks(size, self._processes)

    def testing(self, x: Array) -> Float[Array, "batch ..."]:
        """Return the images, normalized."""
        return IMAGENET.testing(x)


def padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    """Pad an array to a length along its first axis."""
    return np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)
