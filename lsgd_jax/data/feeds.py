"""How examples get to the workers' devices: all at once, or batch by batch while the workers train."""

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
    """What training needs to know of the data."""

    classes: int
    shape: tuple[int, ...]
    """Of one example as the network sees it."""
    shared: Any
    """Arrays that are to lie on every device all the time, the same for all workers."""
    test_count: int
    """Test examples."""

    def batches(self, first: int, end: int) -> Iterator[Any]:
        """What this process's workers get from one step to before another: trees of arrays, the worker axis first."""
        ...

    def of_workers(self, rows: Sequence[int]) -> "Feed":
        """The same data for the workers at these positions alone; its batches may be drawn by a thread of its own."""
        ...

    def after(self, earlier: Sequence[Stretch]) -> "Feed":
        """The same data once other workers have taken the first steps; see `BatchIndices.after`."""
        ...

    def epochs(self, step: int) -> float:
        """Epochs that the workers have gone through before a step."""
        ...

    def training(
        self, shared: Any, batch: Any, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """One worker's examples and labels, from `shared` and its part of a batch; jittable.

        Args:
          shared: on this device.
          batch: this worker's, without a worker axis.
          key: for what is random in the examples; another one for every worker and step.
        """
        ...

    def test_chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All test examples in chunks of that size; the last is filled up with examples whose label is -1."""
        ...

    def testing(self, x: Array) -> Float[Array, "batch ..."]:
        """Test examples as the network sees them; jittable."""
        ...


class InMemory:
    """A `Feed` whose training data lie on every device; a batch is the indices of its examples."""

    def __init__(self, data: Dataset, batches: BatchIndices, rows: Sequence[int] | None = None) -> None:
        """Feed the data.

        Args:
          data: all of them.
          batches: of all workers.
          rows: the workers whose batches are wanted; by default all.
        """
        self._data, self._batches = data, batches
        self._rows = slice(None) if rows is None else list(rows)
        self.classes, self.test_count = data.classes, len(data.test_y)
        self.shape = jax.eval_shape(self.testing, data.test_x[:1]).shape[1:]
        # Examples as rows: TPUs pad the last two axes, of images by much, in a copy of all data every round.
        self.shared = data.train_x.reshape(len(data.train_x), -1), data.train_y

    def batches(self, first: int, end: int) -> Iterator[Int[np.ndarray, "workers batch"]]:
        """The indices."""
        return (self._batches(step)[self._rows] for step in range(first, end))

    def of_workers(self, rows: Sequence[int]) -> "InMemory":
        """The same data for some workers."""
        feed = copy.copy(self)
        feed._rows, feed._batches = list(rows), copy.copy(self._batches)
        return feed

    def after(self, earlier: Sequence[Stretch]) -> "InMemory":
        """The same data, going on."""
        feed = copy.copy(self)
        feed._batches = self._batches.after(earlier)
        return feed

    def epochs(self, step: int) -> float:
        """Of the indices."""
        return self._batches.epochs(step)

    def training(
        self, shared: tuple[Array, Array], batch: Int[Array, " batch"], key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """The examples, augmented where the data set has it."""
        rows, y = (array[batch] for array in shared)
        x = rows.reshape(len(rows), *self._data.train_x.shape[1:])
        preprocessing = self._data.preprocessing
        return (x if preprocessing is None else preprocessing.training(x, key)), y

    def test_chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The test data, cut."""
        for start in range(0, self.test_count, size):
            x, y = self._data.test_x[start : start + size], self._data.test_y[start : start + size]
            yield padded(x, size, 0), padded(y, size, -1)

    def testing(self, x: Array) -> Float[Array, "batch ..."]:
        """Normalised and cropped where the data set has it."""
        preprocessing = self._data.preprocessing
        return x if preprocessing is None else preprocessing.testing(x)


class Streamed:
    """A `Feed` of ImageNet, whose images are decoded while the workers train; a batch is 8-bit images and labels."""

    def __init__(
        self,
        data_dir: Path | str | None,
        *,
        workers: int,
        batch_size: int,
        sampling: Literal["shards", "independent"],
        seed: int,
        held_out: float,
        rows: Sequence[int] | None = None,
        image_size: int,
        processes: int,
    ) -> None:
        """Open the data.

        Args:
          data_dir: where they are prepared.
          workers: in all groups together.
          batch_size: examples a worker takes a step.
          sampling: "shards" or "independent", as for `BatchIndices`.
          seed: of the order, the crops and the flips.
          held_out: the share of the training data that is used for testing, if it is not 0.
          rows: the workers whose batches are wanted; by default all.
          image_size: the side of the square images.
          processes: that decode images.

        Raises:
          UsageError: if the data are not prepared, or too few for one step.
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
        """Images and labels."""
        return self._stream.batches(first, end, self._processes)

    def of_workers(self, rows: Sequence[int]) -> "Streamed":
        """The same data for some workers, with as many processes again."""
        feed = copy.copy(self)
        feed._stream = self._stream.of_workers(rows)
        return feed

    def after(self, earlier: Sequence[Stretch]) -> "Streamed":
        """The same data, going on."""
        feed = copy.copy(self)
        feed._stream = self._stream.after(earlier)
        return feed

    def epochs(self, step: int) -> float:
        """Of the stream."""
        return self._stream.epochs(step)

    def training(
        self, shared: tuple, batch: tuple[Array, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
        """The images, normalised; they come cropped and mirrored."""
        x, y = batch
        return IMAGENET.training(x, key), y

    def test_chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The validation images."""
        return self._test.chunks(size, self._processes)

    def testing(self, x: Array) -> Float[Array, "batch ..."]:
        """The images, normalised."""
        return IMAGENET.testing(x)


def padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    """An array filled up to a length along its first axis."""
    return np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)
