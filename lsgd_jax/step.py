"""What is compiled: the workers' local steps with their exchanges, and the evaluation."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Float, Int

from lsgd_jax.data import Dataset
from lsgd_jax.exchange import Tree, mean, worker_count, worker_index
from lsgd_jax.leader import LeaderPullState

AXES = ("group", "worker")
STACKED = PartitionSpec(*AXES)
"""Arrays with the two worker axes first, one worker a device."""
SHARED = PartitionSpec()


class TrainState(NamedTuple):
    """All workers' state; the axes ("group", "worker") come first in every array."""

    params: optax.Params
    model: nnx.State
    """What a model holds beside its parameters."""
    optimizer: optax.OptState


class Leaders(NamedTuple):
    """What a method with leaders tells; the axes ("group", "worker") come first in every array."""

    score: Float[Array, "group worker"]
    """The mean of the last training losses, by which leaders are elected."""
    positions: Int[Array, "group worker level"]
    """Of the last local and, with groups, global leader."""
    distances: Float[Array, "group worker level"]
    """To these leaders when they were elected."""


class StepMetrics(NamedTuple):
    """What local steps tell."""

    loss: Float[Array, "group worker"]
    """The mean training loss."""
    leaders: Leaders | None
    """None for methods without leaders."""


class Evaluation(NamedTuple):
    """On the test data; errors are shares of them, in [0, 1]."""

    center_error: Float[Array, ""]
    """Of the model that the method reports. An example with a logit that is not finite counts as wrong."""
    center_loss: Float[Array, ""]
    worker_errors: Float[Array, "group worker"]


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """All workers at the same start, each on its device."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    state = TrainState(params, rest, optimizer.init(params))
    workers = tuple(mesh.shape[axis] for axis in AXES)
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, workers + np.shape(x)), state)
    return jax.device_put(stacked, NamedSharding(mesh, STACKED))


def local_steps(model: nnx.Module, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> Wrapped:
    """A function that takes every worker through some local steps, with the exchanges that fall due.

    Returns:
      A jitted function of the state, the training x and y (shared by all workers), the indices of the examples
      [group, worker, steps, batch] and the number of the first step; it returns the new state, in place of the old, and
      the `StepMetrics`. A single step is no loop: on the CPU, the gradients of convolutions are an order of
      magnitude slower in one (https://github.com/jax-ml/jax/issues/12868).
    """
    graphdef = nnx.graphdef(_as_mode(model, training=True))

    def step(train_x: Array, train_y: Array, state: TrainState, now: tuple) -> tuple:
        number, batch = now
        x, y = train_x[batch], train_y[batch]

        def loss_of(params: optax.Params) -> tuple[Array, nnx.State]:
            network = nnx.merge(graphdef, params, state.model, copy=True)
            logits = network(x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, nnx.state(network, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params, value=loss, step=number)
        state = TrainState(optax.apply_updates(state.params, updates), rest, optimizer_state)
        return state, StepMetrics(loss, _leaders(optimizer_state))

    def steps(state: TrainState, train_x: Array, train_y: Array, batches: Array, first: Array) -> tuple:
        state, batches = _own((state, batches))
        one_step = partial(step, train_x, train_y)
        if len(batches) == 1:
            state, metrics = one_step(state, (first, batches[0]))
        else:
            state, metrics = lax.scan(one_step, state, (first + jnp.arange(len(batches)), batches))
            last = jax.tree.map(lambda x: x[-1], metrics.leaders)
            metrics = StepMetrics(metrics.loss.mean(0), last)
        return _stacked((state, metrics))

    in_specs = (STACKED, SHARED, SHARED, STACKED, SHARED)
    return jax.jit(jax.shard_map(steps, mesh=mesh, in_specs=in_specs, out_specs=STACKED), donate_argnums=0)


def evaluation(model: nnx.Module, center: Callable, mesh: Mesh, data: Dataset) -> Callable[[TrainState], Evaluation]:
    """A jitted function from the state to its `Evaluation` on the test data.

    Every worker's own model is tested on all test data; of the center's test each worker does its share.

    Args:
      model: of the workers.
      center: from params, optimiser state and axes to the model that the method reports.
      mesh: of the workers.
      data: of which the test examples are used.
    """
    graphdef = nnx.graphdef(_as_mode(model, training=False))
    count, workers = len(data.test_y), mesh.size
    share = -(-count // workers)
    padding = [(0, share * workers - count)]
    test_x = np.pad(data.test_x, padding + [(0, 0)] * (data.test_x.ndim - 1))
    test_y = np.pad(data.test_y, padding, constant_values=-1)

    def wrong_and_loss(params: optax.Params, rest: nnx.State, x: Array, y: Array) -> Float[Array, " 2"]:
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        wrong = (jnp.argmax(logits, -1) != y) | ~jnp.isfinite(logits).all(-1)
        return jnp.where((y >= 0)[None], jnp.stack([wrong, losses]), 0).sum(1) / count

    def evaluate(state: TrainState, test_x: Array, test_y: Array) -> tuple[Array, Array, Array]:
        state = _own(state)
        own = wrong_and_loss(state.params, state.model, test_x, test_y)
        center_params = center(state.params, state.optimizer, AXES)
        center_model = mean(state.model, AXES)
        start = worker_index(AXES) * share
        x, y = (lax.dynamic_slice_in_dim(a, start, share) for a in (test_x, test_y))
        error, loss = mean(wrong_and_loss(center_params, center_model, x, y), AXES) * worker_count(AXES)
        return error, loss, _stacked(own[0])

    out_specs = (SHARED, SHARED, STACKED)
    mapped = jax.shard_map(evaluate, mesh=mesh, in_specs=(STACKED, SHARED, SHARED), out_specs=out_specs)
    jitted, test = jax.jit(mapped), jax.device_put((test_x, test_y), NamedSharding(mesh, SHARED))
    return lambda state: Evaluation(*jitted(state, *test))


def _as_mode(model: nnx.Module, *, training: bool) -> nnx.Module:
    model = nnx.clone(model)
    model.train() if training else model.eval()
    return model


def _leaders(state: optax.OptState) -> Leaders | None:
    """What the `leader_pull` in an optimiser's state tells, if there is one."""
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, LeaderPullState))
    for part in parts:
        if isinstance(part, LeaderPullState):
            positions, distances = (jnp.stack([leader[i] for leader in part.leaders]) for i in range(2))
            return Leaders(part.score, positions, distances)
    return None


def _own(stacked: Tree) -> Tree:
    """One worker's part of arrays with the worker axes first, inside the axes."""
    return jax.tree.map(lambda x: x.reshape(x.shape[len(AXES) :]), stacked)


def _stacked(own: Tree) -> Tree:
    """The inverse of `_own`."""
    return jax.tree.map(lambda x: x.reshape((1,) * len(AXES) + x.shape), own)
