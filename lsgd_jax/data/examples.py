"""Examples of a task: arrays in memory, or streams that are read as they are needed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from lsgd_jax.errors import UsageError


class Data(NamedTuple):
    """Training and test examples.

    Each of the two is an array or a tree of arrays, examples first, or a `Stream`. Training arrays lie in the memory of
    every device for the whole run.
    """

    train: Any
    test: Any


class Stream:
    """Examples that are read on the host as they are needed, for more of them than device memory holds.

    A subclass has `__len__` and `read`. It is pickled for the processes that read ahead, `--data-processes`.
    """

    def __len__(self) -> int:
        """Return the number of examples."""
        raise NotImplementedError

    def read(self, indices: Int[np.ndarray, " examples"]) -> Any:
        """Return some examples, as an array or a tree of arrays, examples first."""
        raise NotImplementedError

    def sample(self, indices: Int[np.ndarray, " examples"], rngs: Iterator[np.random.Generator]) -> Any:
        """Return some training examples, augmented at random; by default they are those of `read`.

        Args:
          indices: of the examples.
          rngs: one generator per example, seeded with the run's seed, the step, the worker and the place in its batch.
        """
        del rngs
        return self.read(indices)


class Part(Stream):
    """Some of the examples of a stream."""

    def __init__(self, whole: Stream, indices: Int[np.ndarray, " examples"]) -> None:
        """Read the examples of `whole` with these indices."""
        self._whole, self._indices = whole, indices

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._indices)

    def read(self, indices: Int[np.ndarray, " examples"]) -> Any:
        """Return some examples."""
        return self._whole.read(self._indices[indices])

    def sample(self, indices: Int[np.ndarray, " examples"], rngs: Iterator[np.random.Generator]) -> Any:
        """Return some training examples, augmented."""
        return self._whole.sample(self._indices[indices], rngs)


class BlankStream(Stream):
    """A stream of zeros that take no memory."""

    def __init__(self, examples: int, like: Any) -> None:
        """Make examples of the shapes and dtypes of `like`, a tree."""
        self._examples, self._like = examples, like

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._examples

    def read(self, indices: Int[np.ndarray, " examples"]) -> Any:
        """Return zeros."""
        return blank(len(indices), self._like)


def blank(examples: int, like: Any) -> Any:
    """Return examples of the shapes and dtypes of a tree: zeros that take no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), (examples, *x.shape)), like)


def count(examples: Any) -> int:
    """Return the number of examples in a tree of arrays or a stream.

    Raises:
      UsageError: if there are none, or the arrays differ in it.
    """
    if isinstance(examples, Stream):
        counts = {len(examples)}
    else:
        counts = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(examples)}
    if len(counts) != 1 or 0 in counts:
        raise UsageError(f"examples must be arrays with one number of examples, at least 1, got {sorted(counts)}.")
    return counts.pop()


def take(examples: Any, indices: Int[np.ndarray, " examples"]) -> Any:
    """Return some examples of a tree of arrays or of a stream."""
    if isinstance(examples, Stream):
        return examples.read(indices)
    return jax.tree.map(lambda x: x[indices], examples)


def hold_out(data: Data, share: float, *, in_order: bool = False) -> Data:
    """Replace the test examples by a fixed share of the training examples, which training then leaves out.

    Args:
      data: training and test examples.
      share: of the training examples.
      in_order: whether the others stay in their order; otherwise they are shuffled.

    Raises:
      UsageError: if that leaves no example for training or for testing.
    """
    held, kept = held_and_kept(count(data.train), share)
    kept = np.sort(kept) if in_order else kept
    if isinstance(data.train, Stream):
        return Data(Part(data.train, kept), Part(data.train, held))
    return Data(take(data.train, kept), take(data.train, held))


def held_and_kept(examples: int, share: float) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " kept"]]:
    """Split example indices deterministically into a held-out share and the rest.

    Raises:
      UsageError: if either part is empty.
    """
    if not 0 < round(share * examples) < examples:
        raise UsageError(f"validation holds out none or all of {examples} examples, got {share}.")
    held, kept = np.split(np.random.default_rng(0).permutation(examples), [round(share * examples)])
    return held, kept
