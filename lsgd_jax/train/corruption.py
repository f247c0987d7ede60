"""Corrupted workers, for experiments: what is wrong with their labels, gradients or data, in all methods alike."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, Data, Stream
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import AxisName, when, worker_count, worker_index
from lsgd_jax.exchange.trees import select
from lsgd_jax.train.evaluated_model import Around

NOISE = 5.0
"""Standard deviation of the noise in gradients, relative to the root mean square of each array."""
STALE = 16
"""Steps for which a stale gradient is taken."""
SHARES = 5
"""Into how many parts the examples are cut by their labels; each corrupted worker sees one."""


class Corruption(NamedTuple):
    """What is wrong with the last workers within a step."""

    workers: int
    """How many are corrupted."""
    examples: Callable[[Any, PRNGKeyArray], Any] | None
    """From a corrupted worker's batch to what it sees in its place."""
    gradients: Callable[[Any, PRNGKeyArray], Any] | None
    """From a corrupted worker's gradients to what it takes for them."""

    def of_examples(self, examples: Any, key: PRNGKeyArray, axis_name: AxisName) -> Any:
        """What this worker sees."""
        if self.examples is None:
            return examples
        return select(is_corrupt(self.workers, axis_name), self.examples(examples, key), examples)

    def of_gradients(self, gradients: Any, key: PRNGKeyArray, axis_name: AxisName) -> Any:
        """What this worker takes for its gradients."""
        if self.gradients is None:
            return gradients
        return select(is_corrupt(self.workers, axis_name), self.gradients(gradients, key), gradients)


def corruption_of(config: Config) -> Corruption | None:
    """What is wrong within the steps of a run; None if nothing is."""
    if config.corrupt_workers == 0:
        return None
    examples = config.task.with_random_targets if config.corruption == "labels" else None
    gradients = _noisy if config.corruption == "gradient-noise" else None
    return Corruption(config.corrupt_workers, examples, gradients) if examples or gradients else None


def is_corrupt(workers: int, axis_name: AxisName) -> Bool[Array, ""]:
    """Whether the calling worker is one of the last ones, of which so many are corrupted."""
    return worker_index(axis_name) >= worker_count(axis_name) - workers


def _noisy(gradients: Any, key: PRNGKeyArray) -> Any:
    leaves, structure = jax.tree.flatten(gradients)
    keys = jax.random.split(key, max(len(leaves), 1))

    def noisy(x: Array, key: PRNGKeyArray) -> Array:
        size = jnp.sqrt(jnp.mean(jnp.abs(x) ** 2)) if x.size else jnp.zeros((), x.dtype)
        return x + (NOISE * size * jax.random.normal(key, x.shape)).astype(x.dtype)

    return jax.tree.unflatten(structure, [noisy(x, key) for x, key in zip(leaves, keys, strict=True)])


def with_stale_gradients(
    workers: int, optimizer: optax.GradientTransformationExtraArgs, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """A method of whose workers the last ones take one gradient for several steps.

    Args:
      workers: how many of them.
      optimizer: the method around a worker's optimizer; `update` is told the `step`.
      axis_name: all axes on which workers lie.
    """

    def init(params: optax.Params) -> Around:
        return Around(optimizer.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: Around, params: optax.Params | None = None, *, step: Any, **extra_args: Any
    ) -> tuple[optax.Updates, Around]:
        kept = when(
            step % STALE == 0,
            lambda kept: jax.tree.map(lambda g, k: g.astype(k.dtype), updates, kept),
            state.own,
            axis_name,
        )
        taken = select(is_corrupt(workers, axis_name), kept, updates)
        taken, inner = optimizer.update(taken, state.method, params, step=step, **extra_args)
        return taken, Around(inner, kept)

    return optax.GradientTransformationExtraArgs(init, update)


class SkewedIndices:
    """The indices of batches, in which the last workers have only examples of the lowest labels, the next ones, ..."""

    def __init__(self, indices: BatchIndices, parts: list[Int[np.ndarray, " examples"]], workers: int) -> None:
        """Take these indices for the clean workers.

        Args:
          indices: of all workers.
          parts: for each of the last workers, the examples that it sees.
          workers: in all groups.
        """
        self._indices, self._parts, self._first = indices, parts, workers - len(parts)

    def __call__(self, step: int) -> Int[np.ndarray, "workers batch"]:
        """Return the indices at a step, counted from 0; worker axis first."""
        found = self._indices(step).copy()
        for i, part in enumerate(self._parts):
            rng = np.random.default_rng([self._indices.seed, step, self._first + i])
            found[self._first + i] = rng.choice(part, found.shape[1])
        return found

    def after(self, earlier: Any) -> "SkewedIndices":
        """Return the batches after the steps of earlier workers, as `BatchIndices` has it."""
        skewed = copy.copy(self)
        skewed._indices = self._indices.after(earlier)
        return skewed

    def __getattr__(self, name: str) -> Any:
        """Return what is that of the clean workers."""
        if name == "_indices":  # Not there yet, where this is copied or unpickled.
            raise AttributeError(name)
        return getattr(self._indices, name)


def skewed(indices: BatchIndices, data: Data, config: Config, examples: int) -> Any:
    """The indices of batches, skewed for the corrupted workers of a run that is to have skewed shards.

    Args:
      indices: of all workers.
      data: of the run.
      config: of the run.
      examples: how many of the training examples are trained on, the first ones.

    Raises:
      UsageError: if the training examples are no arrays in memory of which the last one has whole numbers for labels.
    """
    if not config.corrupt_workers or config.corruption != "skewed-shard":
        return indices
    leaves = [] if isinstance(data.train, Stream) else jax.tree.leaves(data.train)
    labels = leaves[-1] if leaves else None
    if labels is None or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError("skewed-shard needs examples in memory with one whole number each for a label.")
    by_label = np.array_split(np.argsort(labels[:examples], kind="stable").astype(np.int32), SHARES)
    parts = [by_label[i % SHARES] for i in range(config.corrupt_workers)]
    return SkewedIndices(indices, parts, config.groups * config.workers)
