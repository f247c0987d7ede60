"""Evaluation of the workers and of the model that a method reports, the *evaluated model*."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, STACKED, Placement, gathered, over_chips
from lsgd_jax.exchange import broadcast_from, mean, worker_count, worker_index
from lsgd_jax.methods import mean_of_workers
from lsgd_jax.task import Task
from lsgd_jax.train.step import TrainState, in_mode, leaders_in

BatchStatistics: TypeAlias = Literal["own", "mean", "leader", "reestimate"]
CHUNK = 512
"""Test examples per program, about: each worker runs its share of them through the evaluated model, and all through its
own."""


class Evaluation(NamedTuple):
    """Measures of the task, means over the test examples."""

    center: dict[str, float]
    """All measures of the evaluated model, by name."""
    workers: Float[np.ndarray, "group worker"]
    """Headline measure of each worker."""


def evaluation(
    task: Task,
    model: nnx.Module,
    center: Callable[[optax.Params, Any, Any], optax.Params],
    placement: Placement,
    feed: Feed,
    *,
    batch_statistics: BatchStatistics,
    statistics_batches: int,
    key: PRNGKeyArray,
) -> Callable[[TrainState, Any], Evaluation]:
    """The function that evaluates a state: from the state and the feed's arrays on the devices to an `Evaluation`.

    Workers are evaluated with their own batch-norm statistics. The evaluated model's parameters belong to no worker, so
    a policy says which batch-norm statistics go with them:

    - "own": each worker evaluates its share of the test data with its own statistics;
    - "mean": the mean over the workers whose statistics are all finite;
    - "leader": those of the last global leader, which needs a method with leaders;
    - "reestimate": estimated with the evaluated model in a pass over training batches, as the mean over batches and
      workers of the batches' means and variances. The choice of the paper's authors.

    Models without batch normalization have no statistics, and the policy does nothing.

    Args:
      task: of the workers; its measures are what is evaluated.
      model: of the workers.
      center: from params, optimizer state and axes to the evaluated model.
      placement: of the workers.
      feed: provides the test examples, and the first training batches for "reestimate".
      batch_statistics: the policy.
      statistics_batches: training batches per worker in the pass of "reestimate".
      key: random key of the training examples in that pass.
    """
    axes, workers = placement.axes, int(np.prod(placement.shape))
    graphdef = nnx.graphdef(in_mode(model, training=False))
    if not jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
        batch_statistics = "own"  # There are none.
    statistics_graphdef = nnx.graphdef(_showing_statistics_of_a_batch(model))

    def center_of(state: TrainState) -> tuple[optax.Params, nnx.State]:
        params, statistics = center(state.params, state.optimizer, axes), state.statistics
        if batch_statistics == "mean":
            statistics = mean_of_workers(statistics, None, axes)
        if batch_statistics == "leader":
            leaders = leaders_in(state.optimizer)
            if leaders is None:
                raise ValueError('the policy "leader" for batch statistics needs a method with leaders.')
            # Before the first exchange there is no leader, and all workers have the same statistics.
            statistics = broadcast_from(statistics, jnp.maximum(leaders.positions[-1], 0), axes, method="all_reduce")
        return params, statistics

    def statistics_of(
        params: optax.Params, statistics: nnx.State, shared: Any, batch: Any, key: PRNGKeyArray
    ) -> tuple[nnx.State]:
        examples = over_chips(feed.training(shared, batch))
        statistics = jax.tree.map(jnp.zeros_like, statistics)  # A NaN would outlive a momentum of 0.

        def seen(params: optax.Params) -> nnx.State:
            network = nnx.merge(statistics_graphdef, params, statistics, copy=True)
            task.loss(network, examples, jax.random.fold_in(key, worker_index(axes)))
            return nnx.state(network, nnx.BatchStat)

        return (mean(seen(gathered(params)), axes),)

    def measured(
        params: optax.Params, statistics: nnx.State, chunk: tuple[Any, Bool[Array, " examples"]]
    ) -> tuple[list[str], Float[Array, " measures"]]:
        """The names of the measures, the headline first, and their sums over the examples that are no padding."""

        def measures(params: optax.Params, examples: Any) -> dict[str, Array]:
            return task.measures(nnx.merge(graphdef, params, statistics, copy=True), examples)

        examples, real = over_chips(chunk)
        found = measures(gathered(params), examples)
        names = sorted(found, key=lambda name: (name != task.headline.name, name))
        values = jnp.stack([found[name].astype(jnp.float32) for name in names])
        return names, jnp.where(real[None], values, 0).sum(1)

    def test(
        state: TrainState,
        center_params: optax.Params,
        center_statistics: nnx.State,
        chunk: tuple[Any, Bool[Array, " examples"]],
    ) -> tuple[dict[str, Array], Array]:
        _, own = measured(state.params, state.statistics, chunk)
        share = len(chunk[1]) // worker_count(axes)
        of_own = partial(lax.dynamic_slice_in_dim, start_index=worker_index(axes) * share, slice_size=share)
        names, of_center = measured(center_params, center_statistics, jax.tree.map(of_own, chunk))
        return dict(zip(names, lax.psum(of_center, axes), strict=True)), own[0]

    over_workers = placement.over_workers
    shardings = None
    if placement.chips > 1 and placement.shard_specs is not None:
        shardings = jax.tree.map(placement.sharding, placement.shard_specs(nnx.state(model, nnx.Param)))
    find_center = jax.jit(over_workers(center_of, (STACKED,), (SHARED, STACKED)), out_shardings=(shardings, None))
    statistics_program = jax.jit(over_workers(statistics_of, (SHARED, STACKED, SHARED, STACKED, SHARED), (STACKED,)))
    test_program = jax.jit(
        over_workers(test, (STACKED, SHARED, STACKED, SHARED), (SHARED, STACKED)),
        out_shardings=placement.sharding(SHARED),  # For every process.
    )

    def batches() -> Iterator[Any]:
        for batch in feed.batches(0, statistics_batches):
            yield placement.put(batch, placement.batches(of_steps=False))

    def evaluate(state: TrainState, shared: Any) -> Evaluation:
        params, statistics = find_center(state)
        placement.wait_for(params)
        if batch_statistics == "reestimate":
            total = jax.tree.map(jnp.zeros_like, statistics)
            for i, batch in enumerate(batches()):
                (seen,) = statistics_program(params, statistics, shared, batch, jax.random.fold_in(key, i))
                placement.wait_for(seen)
                total = jax.tree.map(jnp.add, total, seen)
            statistics = jax.tree.map(lambda x: x / statistics_batches, total)
        devices = workers * placement.chips
        size = -(-min(CHUNK, feed.test_count) // devices) * devices
        of_center: dict[str, float] = {}
        of_workers = np.zeros(placement.shape)
        for chunk in feed.test_chunks(size):
            results = test_program(state, params, statistics, placement.put(chunk, SHARED))
            placement.wait_for(results)
            sums, of_each = jax.device_get(results)
            of_center = {name: of_center.get(name, 0.0) + float(value) for name, value in sums.items()}
            of_workers += of_each
        means = {name: value / feed.test_count for name, value in of_center.items()}
        return Evaluation(means, of_workers / feed.test_count)

    return evaluate


def _showing_statistics_of_a_batch(model: nnx.Module) -> nnx.Module:
    """A copy in training mode whose running statistics after a call are those of that batch alone."""
    model = in_mode(model, training=True)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    return model
