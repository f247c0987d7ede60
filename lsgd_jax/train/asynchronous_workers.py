"""The workers of asynchronous training: each with its own compiled step, batches and random key."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled
from jaxtyping import Float32

from lsgd_jax.asynchronous import Model, StepReport, Worker
from lsgd_jax.config import Config
from lsgd_jax.data import Feed
from lsgd_jax.distributed import SHARED, Placement
from lsgd_jax.methods.independent import independent
from lsgd_jax.optimizers import local_optimizer
from lsgd_jax.train.asynchronous_step import local_step
from lsgd_jax.train.learning_rates import learning_rate_factor, rate_factors, scale_by_rate_factor
from lsgd_jax.train.recorder import Clock
from lsgd_jax.train.setup import step_key
from lsgd_jax.train.step import TrainState, init_state


class Start(NamedTuple):
    """Where a worker starts."""

    state: TrainState
    """On its device, with the axes [group, worker] of size 1."""
    step: int = 0
    """Steps that it has taken before, in all its lives."""
    eligible_from: int = 0
    """Steps after which it may lead."""
    score: float = math.inf


def worker_optimizer(config: Config, placement: Placement) -> optax.GradientTransformationExtraArgs:
    """A worker's optimizer: between exchanges it is an independent one, with the mean of its last losses."""
    return independent(
        optax.chain(local_optimizer(config), scale_by_rate_factor()),
        axis_name=placement.axes,
        **{name: value for name, value in config.options.items() if name == "window"},
    )


def worker_rate_factor(config: Config, feed: Feed, position: int, step: int, seconds: float) -> Float32[np.ndarray, ""]:
    """The learning-rate factor of a worker's step.

    Args:
      config: of the run.
      feed: of the data.
      position: of the worker among all.
      step: steps that it has taken.
      seconds: of training so far.
    """
    factor = learning_rate_factor(config, step, feed.epochs(step), seconds)
    if config.learning_rates in ("linear", "powers"):
        factor *= rate_factors(config.learning_rates, (config.groups, config.workers)).flat[position]
    return factor


class Trainers:
    """Makes the workers of this process, whose steps it compiles for their devices."""

    def __init__(
        self,
        config: Config,
        positions: Sequence[int],
        placement: Placement,
        feed: Feed,
        model: nnx.Module,
        clock: Clock,
    ) -> None:
        """Compile the steps.

        Args:
          config: of the run.
          positions: of the workers of this process, among all.
          placement: with a device for each of them, in this order.
          feed: of the data.
          model: of the workers, at the start.
          clock: of the run.
        """
        self._config, self._feed, self._clock = config, feed, clock
        self.optimizer = worker_optimizer(config, placement)
        self.starts = [Start(state) for state in placement.parts(init_state(model, self.optimizer, placement))]
        """The start that all workers have in common, once for each of `positions`."""
        self.shared = placement.put(feed.shared, SHARED)
        """The feed's arrays on all devices."""
        self._shared = placement.parts(self.shared)
        self._positions, self._key = positions, step_key(config.seed)
        self._program = local_step(config.task, model, self.optimizer, feed)
        with ThreadPoolExecutor() as pool:  # Programs are compiled for every device.
            self._compiled = list(pool.map(self._compile, range(len(positions))))

    def workers(self, starts: Sequence[Start]) -> list[Worker]:
        """The workers, at these starts."""
        return [self._worker(number, start) for number, start in enumerate(starts)]

    def start_from(self, model: Model, step: int) -> Start:
        """The start of a worker that replaces another, after so many steps of it: with a model and a new optimizer.

        It may lead once its window of losses is full.
        """
        own = jax.tree.map(lambda x: x[0, 0], model)
        state = TrainState(own.params, own.statistics, self.optimizer.init(own.params))
        window = len(jax.tree.leaves(state.optimizer.losses)[0])
        return Start(jax.tree.map(lambda x: x[None, None], state), step, step + window)

    def _compile(self, number: int) -> Compiled:
        model, optimizer = _parts(self.starts[number].state)
        on_device = SingleDeviceSharding(self._device(number))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), self._feed.batch)
        key, rate_factor = self._worker_key(number), self._rate_factor(number, 0)
        arguments = model, optimizer, self._shared[number], batch, np.int32(0), rate_factor, key
        return self._program.lower(*arguments).compile()

    def _worker(self, number: int, start: Start) -> Worker:
        config, position, program, shared = (
            self._config,
            self._positions[number],
            self._compiled[number],
            self._shared[number],
        )
        next_batch, key = self._batches(number, start.step), self._worker_key(number)
        batch = next_batch()

        def take_step(step: int, model: Model, optimizer: optax.OptState) -> tuple[Model, optax.OptState, StepReport]:
            nonlocal batch
            result = program(model, optimizer, shared, batch, np.int32(step), self._rate_factor(number, step), key)
            batch = next_batch()  # While the device computes.
            return result

        model, optimizer = _parts(start.state)
        slowdown = config.slowdowns[position] if position < len(config.slowdowns) else 1.0
        seconds = slowdown * config.min_step_seconds
        worker = Worker(position, config.steps, model, optimizer, take_step, first=start.step, min_seconds=seconds)
        worker.eligible_from, worker.score = start.eligible_from, start.score
        return worker

    def _batches(self, number: int, first: int) -> Callable[[], Any]:
        """A function that puts the worker's next batch on its device, from a step on; None at the end."""
        batches = self._feed.of_workers([self._positions[number]]).batches(first, self._config.steps)
        device = self._device(number)
        return lambda: jax.device_put(jax.tree.map(lambda x: x[0], next(batches, None)), device)

    def _rate_factor(self, number: int, step: int) -> np.ndarray:
        return worker_rate_factor(self._config, self._feed, self._positions[number], step, self._clock.seconds())

    def _worker_key(self, number: int) -> jax.Array:
        return jax.device_put(jax.random.fold_in(self._key, self._positions[number]), self._device(number))

    def _device(self, number: int) -> jax.Device:
        [device] = jax.tree.leaves(self.starts[number].state.params)[0].devices()
        return device


def _parts(state: TrainState) -> tuple[Model, optax.OptState]:
    return Model(state.params, state.statistics), state.optimizer
