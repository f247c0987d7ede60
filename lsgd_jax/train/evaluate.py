"""Evaluation of the workers and of the model that a method reports, the *evaluated model*."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, STACKED, Placement, fully_sharded, over_chips
from lsgd_jax.exchange import broadcast_from, mean, worker_count, worker_index
from lsgd_jax.methods import mean_of_workers
from lsgd_jax.train.step import TrainState, in_mode, leaders_in

BatchStatistics: TypeAlias = Literal["own", "mean", "leader", "reestimate"]
CHUNK = 512
"""Test examples per program, about: each worker runs its share of them through the evaluated model, and all through its
own."""


class Evaluation(NamedTuple):
    """Errors and loss on the test data; an error is the fraction of wrong examples, in [0, 1]."""

    center_error: float
    """Test error of the evaluated model. An example with a logit that is not finite counts as wrong."""
    center_loss: float
    """Test loss of the evaluated model."""
    worker_errors: Float[np.ndarray, "group worker"]


def evaluation(
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
        data_key, dropout_key = jax.random.split(jax.random.fold_in(key, worker_index(axes)))
        x, _ = over_chips(feed.training(shared, batch, data_key))
        statistics = jax.tree.map(jnp.zeros_like, statistics)  # A NaN would outlive a momentum of 0.

        def seen(params: optax.Params) -> nnx.State:
            network = nnx.merge(statistics_graphdef, params, statistics, copy=True)
            network(x, rngs=nnx.Rngs(dropout=dropout_key))
            return nnx.state(network, nnx.BatchStat)

        return (mean(fully_sharded(seen)(params), axes),)

    def wrong_and_loss(params: optax.Params, statistics: nnx.State, x: Array, y: Array) -> Float[Array, " 2"]:
        def logits_of(params: optax.Params, x: Array) -> Array:
            return nnx.merge(graphdef, params, statistics, copy=True)(feed.testing(x))

        x, y = over_chips((x, y))
        logits = fully_sharded(logits_of)(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        wrong = (jnp.argmax(logits, -1) != y) | ~jnp.isfinite(logits).all(-1)
        return jnp.where((y >= 0)[None], jnp.stack([wrong, losses]), 0).sum(1)

    def test(
        state: TrainState, center_params: optax.Params, center_statistics: nnx.State, x: Array, y: Array
    ) -> tuple[Array, Array]:
        own = wrong_and_loss(state.params, state.statistics, x, y)
        share = len(y) // worker_count(axes)
        own_share = (lax.dynamic_slice_in_dim(a, worker_index(axes) * share, share) for a in (x, y))
        of_center = lax.psum(wrong_and_loss(center_params, center_statistics, *own_share), axes)
        return of_center, own[0]

    over_workers = placement.over_workers
    shardings = None
    if placement.chips > 1 and placement.shard_specs is not None:
        shardings = jax.tree.map(placement.sharding, placement.shard_specs(nnx.state(model, nnx.Param)))
    find_center = jax.jit(over_workers(center_of, (STACKED,), (SHARED, STACKED)), out_shardings=(shardings, None))
    statistics_program = jax.jit(over_workers(statistics_of, (SHARED, STACKED, SHARED, STACKED, SHARED), (STACKED,)))
    test_program = jax.jit(
        over_workers(test, (STACKED, SHARED, STACKED, SHARED, SHARED), (SHARED, STACKED)),
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
        of_center, of_workers = np.zeros(2), np.zeros(placement.shape)
        for chunk in feed.test_chunks(size):
            results = test_program(state, params, statistics, *placement.put(chunk, SHARED))
            placement.wait_for(results)
            of_center += jax.device_get(results[0])
            of_workers += jax.device_get(results[1])
        error, loss = of_center / feed.test_count
        return Evaluation(float(error), float(loss), of_workers / feed.test_count)

    return evaluate


def _showing_statistics_of_a_batch(model: nnx.Module) -> nnx.Module:
    """A copy in training mode whose running statistics after a call are those of that batch alone."""
    model = in_mode(model, training=True)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    return model
