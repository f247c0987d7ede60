"""The compiled training step: local steps of all workers, with their exchanges."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, STACKED, Placement, gathered, over_chips, value_and_gradient
from lsgd_jax.exchange import AxisName, worker_index
from lsgd_jax.exchange.trees import merged
from lsgd_jax.link import parts
from lsgd_jax.task import Task
from lsgd_jax.train.corruption import Corruption
from lsgd_jax.train.learning_rates import Ladder
from lsgd_jax.variants import apply_updates, has_failed, links, was_revived

_NOBODY = 2**32 - 1
"""Index of no worker, for the random key of what all have in common."""


class TrainState(NamedTuple):
    """The state of all workers; every array starts with the axes [group, worker]."""

    params: optax.Params
    statistics: nnx.State
    """Running statistics of batch normalization: every worker's own, never exchanged."""
    optimizer: optax.OptState


class Leaders(NamedTuple):
    """Metrics of a method with leaders; every array starts with the axes [group, worker]."""

    score: Float[Array, "group worker"]
    """Mean of the last training losses, by which leaders are elected."""
    revived: Bool[Array, "group worker"] | None
    """Whether the last step revived the worker; None if workers are not revived."""
    positions: Int[Array, "group worker level"]
    """Global index of the last local leader within its group and, with groups, of the last global leader."""
    distances: Float[Array, "group worker level"]
    """Distances to these leaders when they were elected."""
    rate_factor: Float[Array, "group worker"] | None
    """On a ladder, the leader's learning rate relative to that of the run; None without one."""


class StepMetrics(NamedTuple):
    """Metrics of the local steps of one compiled program."""

    loss: Float[Array, "group worker"]
    """Mean training loss of the steps."""
    failed: Bool[Array, "group worker"]
    """Whether a worker has parameters that are not finite after the last step, or waits to be revived."""
    leaders: Leaders | None
    """None for methods without leaders."""


def state_shapes(model: nnx.Module, optimizer: optax.GradientTransformation, placement: Placement) -> TrainState:
    """Shapes, dtypes and shardings of what `init_state` returns; the model may be abstract."""
    _, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    start = jax.eval_shape(partial(_start, optimizer), params, statistics)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct((*placement.shape, *x.shape), x.dtype, sharding=placement.sharding(spec)),
        start,
        placement.specs(params, start),
    )


def _start(optimizer: optax.GradientTransformation, params: optax.Params, statistics: nnx.State) -> TrainState:
    """The state of one worker at the start."""
    return TrainState(params, statistics, optimizer.init(params))


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation, placement: Placement) -> TrainState:
    """The state of all workers at the same start, each on its device or its chips."""
    _, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    state, own = _start(optimizer, params, statistics), len(placement.own_workers)
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (own, *np.shape(x))), state)
    return placement.put(stacked, placement.specs(params, state))


class CommonBatch(NamedTuple):
    """The batch that all workers see at an exchange, of training arrays in memory."""

    first: int
    end: int
    """The examples of which it is, from the first one to the one before the end."""
    size: int
    """Number of its examples; if these are not all, they are sampled anew at each step."""

    def indices(self, key: PRNGKeyArray) -> Int[Array, " size"]:
        """Those of its examples."""
        if self.size == self.end - self.first:
            return jnp.arange(self.first, self.end)
        return jax.random.randint(key, (self.size,), self.first, self.end)


def worker_step(
    task: Task,
    model: nnx.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    feed: Feed,
    *,
    common: CommonBatch | None = None,
    corruption: Corruption | None = None,
    axis_name: AxisName = (),
) -> Callable:
    """The function that takes one worker through one local step, with an exchange if one is due.

    Args:
      task: of the workers; its loss is what they minimize.
      model: of the workers.
      optimizer: the method around every worker's optimizer.
      feed: provides the training data.
      common: the batch by which workers are compared; None: their training losses.
      corruption: what is wrong with some workers; None: nothing.
      axis_name: the worker axes, if something is.

    Returns:
      A function from
        the feed's arrays on the device,
        the learning-rate factor,
        the random key of the worker's steps, and with a common batch that of all, into which the number of the step is
        folded,
        the worker's `TrainState`, without worker axes, and
        the number of the step with the worker's batch
      to the new state and the loss. It calls the optimizer's collectives.
    """
    graphdef = nnx.graphdef(in_mode(model, training=True))
    in_evaluation = nnx.graphdef(in_mode(model, training=False))

    def step(
        shared: Any,
        rate_factor: Array,
        key: PRNGKeyArray,
        state: TrainState,
        now: Sequence,
        common_key: PRNGKeyArray | None = None,
    ) -> tuple[TrainState, Array]:
        number, batch = now
        examples, step_key = over_chips(feed.training(shared, batch)), jax.random.fold_in(key, number)
        told: dict[str, Any] = {}
        if corruption is not None:
            examples = corruption.of_examples(examples, jax.random.fold_in(step_key, 1), axis_name)

        def loss_of(params: optax.Params) -> tuple[Array, nnx.State]:
            network = nnx.merge(graphdef, params, state.statistics, copy=True)
            loss = task.loss(network, examples, step_key)
            return loss, nnx.state(network, nnx.BatchStat)

        (loss, statistics), grads = value_and_gradient(loss_of)(state.params)
        if corruption is not None:
            grads = corruption.of_gradients(grads, jax.random.fold_in(step_key, 2), axis_name)
        if common is not None and common_key is not None:
            indices = common.indices(jax.random.fold_in(common_key, number))

            def common_loss(x: optax.Params) -> Array:
                params = gathered(merged(x, state.params))
                network = nnx.merge(in_evaluation, params, state.statistics, copy=True)
                return task.measures(network, over_chips(feed.training(shared, indices)))["loss"].mean()

            told["common_loss"] = common_loss
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.params, value=loss, step=number, rate_factor=rate_factor, **told
        )
        statistics = jax.tree.map(  # A NaN would stay in a running mean forever, also after a revival.
            lambda new, old: jnp.where(jnp.isfinite(new).all(), new, old), statistics, state.statistics
        )
        return TrainState(apply_updates(state.params, updates, optimizer_state), statistics, optimizer_state), loss

    return step


def local_steps(
    task: Task,
    model: nnx.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    placement: Placement,
    feed: Feed,
    *,
    common: CommonBatch | None = None,
    corruption: Corruption | None = None,
) -> Wrapped:
    """The function that takes all workers through some local steps, with the exchanges that are due.

    Args:
      task: of the workers.
      model: of the workers.
      optimizer: the method around every worker's optimizer.
      placement: of the workers.
      feed: provides the training data.
      common: the batch by which workers are compared; None: their training losses.
      corruption: what is wrong with some workers; None: nothing.

    Returns:
      A jitted function from
        the state (donated),
        the feed's arrays on the devices,
        batches of the feed [group, worker, steps, ...],
        the number of the first step,
        the learning-rate factor, or one per step, and
        the random key of the steps, into which a worker's global index and then the number of the step are folded
      to the new state and the `StepMetrics`; these are replicated, so that every process has all of them.
    """
    step = worker_step(task, model, optimizer, feed, common=common, corruption=corruption, axis_name=placement.axes)

    def steps(
        state: TrainState, shared: Any, batches: Any, first: Array, rate_factor: Array, key: PRNGKeyArray
    ) -> tuple[TrainState, StepMetrics]:
        own_key, common_key = jax.random.fold_in(key, worker_index(placement.axes)), jax.random.fold_in(key, _NOBODY)

        def take(state: TrainState, now: tuple) -> tuple[TrainState, Array]:
            rate_factor, *number_and_batch = now
            return step(shared, rate_factor, own_key, state, number_and_batch, common_key)

        count = len(jax.tree.leaves(batches)[0])
        rate_factors = jnp.broadcast_to(rate_factor, (count,))
        if count == 1:
            state, loss = take(state, (rate_factors[0], first, jax.tree.map(lambda x: x[0], batches)))
        else:
            state, losses = lax.scan(take, state, (rate_factors, first + jnp.arange(count), batches))
            loss = losses.mean(0)
        return state, StepMetrics(loss, has_failed(state.params, state.optimizer), leaders_in(state.optimizer))

    unpacked: Callable[[Array], StepMetrics]

    def packed_steps(*arguments: Any) -> tuple[TrainState, Array]:
        nonlocal unpacked
        state, metrics = steps(*arguments)
        packed, unpacked = _packed(metrics)
        return state, packed

    # Workers would wait for each other once per array that all of them receive.
    in_specs = (STACKED, SHARED, STACKED, SHARED, SHARED, SHARED)
    mapped = placement.over_workers(packed_steps, in_specs, (STACKED, STACKED))

    def program(*arguments: Any) -> tuple[TrainState, StepMetrics]:
        state, packed = mapped(*arguments)
        return state, unpacked(lax.with_sharding_constraint(packed, placement.sharding(SHARED)))

    # Between programs, a worker's state stays sharded over its chips.
    shardings = placement.sharding(STACKED)
    if placement.chips > 1:
        shardings = jax.tree.map(lambda x: x.sharding, state_shapes(model, optimizer, placement))
    return jax.jit(program, donate_argnums=0, out_shardings=(shardings, placement.sharding(SHARED)))


def _packed(tree: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The bytes of a tree's arrays in one array, which is sent at once, and a function that makes the tree of them.

    The function also takes the bytes of several workers, [..., byte], and makes their trees, [..., array].
    """
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    ends = np.cumsum([x.size * x.dtype.itemsize for x in shapes])[:-1]

    def unpacked(packed: Array) -> Any:
        parts = zip(jnp.split(packed, ends, axis=-1), shapes, strict=True)
        arrays = [part.view(x.dtype).reshape(*packed.shape[:-1], *x.shape) for part, x in parts]
        return jax.tree.unflatten(treedef, arrays)

    return jnp.concatenate([x.reshape(-1).view(jnp.uint8) for x in leaves]), unpacked


def in_mode(model: nnx.Module, *, training: bool) -> nnx.Module:
    """A copy of a model in training or in evaluation mode."""
    model = nnx.clone(model)
    model.train() if training else model.eval()
    return model


def leaders_in(state: optax.OptState) -> Leaders | None:
    """Metrics of the `leader_pull` in an optimizer's state; None if there is none."""
    pulls = links(state)
    if not pulls:
        return None
    positions = jnp.stack([pull.leader.position for pull in pulls])
    distances = jnp.stack([pull.leader.distance for pull in pulls])
    ladder = parts(Ladder, state)
    rate_factor = ladder[0].factor if ladder else None
    return Leaders(pulls[0].score, was_revived(state), positions, distances, rate_factor)
