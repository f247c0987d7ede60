"""Feeds of training data: in device memory from the start, or streamed batch by batch."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from lsgd_jax.data.examples import Data, Stream, count, take
from lsgd_jax.data.streams import BatchIndices, Stretch


class Feed:
    """Interface between training and the data; `feed_of` makes one."""

    shared: Any
    """Arrays replicated on every device for the whole run, the same for all workers."""

    def __init__(self, data: Data, indices: BatchIndices, rows: Sequence[int], processes: int = 0) -> None:
        """Create a feed.

        Args:
          data: training and test examples.
          indices: indices of the batches of all workers.
          rows: indices of the workers to feed.
          processes: number of processes that read streams ahead.
        """
        self._data, self._indices, self._rows, self._processes = data, indices, list(rows), processes
        self.test_count = count(data.test)
        """Number of test examples."""
        self.example, self.test_example = map(_example_of, data)
        """Shapes and dtypes of one training and of one test example."""

    def batches(self, first: int, end: int) -> Iterator[Any]:
        """Yield the batches of this process's workers for steps [first, end), worker axis first."""
        raise NotImplementedError

    @property
    def batch(self) -> Any:
        """Shapes and dtypes of one worker's batch."""
        raise NotImplementedError

    def training(self, shared: Any, batch: Any) -> Any:
        """Return one worker's training examples from `shared` and its batch; jittable.

        Args:
          shared: the copy of `shared` on this device.
          batch: this worker's batch, without a worker axis.
        """
        raise NotImplementedError

    def of_workers(self, rows: Sequence[int]) -> Self:
        """Return a feed for the workers with these indices only; another thread may take its batches."""
        feed = copy.copy(self)
        feed._rows, feed._indices = list(rows), copy.copy(self._indices)
        return feed

    def after(self, earlier: Sequence[Stretch]) -> Self:
        """Return a feed that continues after the steps of earlier workers; see `BatchIndices.after`."""
        feed = copy.copy(self)
        feed._indices = self._indices.after(earlier)
        return feed

    def epochs(self, step: int) -> float:
        """Return the number of epochs completed before a step."""
        return self._indices.epochs(step)

    def test_chunks(self, size: int) -> Iterator[tuple[Any, Bool[np.ndarray, " size"]]]:
        """Yield all test examples in chunks of one size, and which of them are examples; others are padding."""
        chunks = _Chunks(self._data.test, size)
        numbers = range(-(-self.test_count // size))
        return _ahead(chunks, numbers, self._processes) if isinstance(self._data.test, Stream) else map(chunks, numbers)


class InMemory(Feed):
    """Feed whose training data are replicated on every device; a batch is an array of example indices."""

    def __init__(self, data: Data, indices: BatchIndices, rows: Sequence[int], processes: int = 0) -> None:
        """Create a feed."""
        super().__init__(data, indices, rows, processes)
        # Examples as rows: TPUs pad the last two axes (of images by a lot) and would copy all data in every round.
        self.shared = jax.tree.map(lambda x: x.reshape(len(x), -1) if x.ndim > 1 else x, _as_on_device(data.train))

    def batches(self, first: int, end: int) -> Iterator[Int[np.ndarray, "workers batch"]]:
        """Yield the indices of the examples."""
        return (self._indices(step)[self._rows] for step in range(first, end))

    @property
    def batch(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the indices."""
        return jax.ShapeDtypeStruct((self._indices.batch_size,), np.int32)

    def training(self, shared: Any, batch: Int[Array, " batch"]) -> Any:
        """Return the examples."""
        rows = jax.tree.map(lambda x: x[batch], shared)
        return jax.tree.map(lambda x, like: x.reshape(len(batch), *like.shape), rows, self.example)


class Streamed(Feed):
    """Feed that reads examples during training; a batch is the examples themselves."""

    shared = ()

    def batches(self, first: int, end: int) -> Iterator[Any]:
        """Yield the examples."""
        return _ahead(_Batches(self._data.train, self._indices, self._rows), range(first, end), self._processes)

    @property
    def batch(self) -> Any:
        """Shapes and dtypes of the examples."""
        return batch_of(self.example, self._indices.batch_size)

    def training(self, shared: tuple, batch: Any) -> Any:
        """Return the examples."""
        return batch


def batch_of(example: Any, size: int) -> Any:
    """Return the shapes and dtypes of several examples from those of one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), example)


def feed_of(data: Data, indices: BatchIndices, rows: Sequence[int], processes: int = 0) -> Feed:
    """Return the feed of data in memory or of a stream; for the arguments see `Feed`."""
    return (Streamed if isinstance(data.train, Stream) else InMemory)(data, indices, rows, processes)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Reads the batches of some workers from a stream."""

    stream: Stream
    indices: BatchIndices
    rows: list[int]

    def __call__(self, step: int) -> Any:
        """Return the batches at a step, worker axis first."""
        indices, seed = self.indices(step), self.indices.seed
        by_worker = []
        for worker in self.rows:
            rngs = (np.random.default_rng([seed, step, worker, place]) for place in range(indices.shape[1]))
            by_worker.append(self.stream.sample(indices[worker], rngs))
        return jax.tree.map(lambda *xs: np.stack(xs), *map(_as_on_device, by_worker))


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Reads examples in chunks of one size."""

    examples: Any
    size: int

    def __call__(self, number: int) -> tuple[Any, Bool[np.ndarray, " size"]]:
        """Return a chunk, padded with zeros, and which of it are examples."""
        indices = np.arange(number * self.size, min((number + 1) * self.size, count(self.examples)))
        rest = self.size - len(indices)
        examples = _as_on_device(take(self.examples, indices))
        padded = jax.tree.map(lambda x: np.pad(x, [(0, rest), *[(0, 0)] * (x.ndim - 1)]), examples)
        return padded, np.arange(self.size) < len(indices)


def _ahead(read: Callable[[int], Any], numbers: range, processes: int) -> Iterator[Any]:
    from lsgd_jax.data.reading import read_ahead  # Grain takes a while to import.

    return read_ahead(read, numbers, processes)


def _example_of(examples: Any) -> Any:
    """Shapes and dtypes of one example."""
    first = _as_on_device(take(examples, np.arange(1)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)


def _as_on_device(tree: Any) -> Any:
    """Arrays on the host, in the dtypes that they have on a device: without 64 bits unless JAX has them."""
    return jax.tree.map(lambda x: np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)), tree)
