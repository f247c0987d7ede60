"""Many runs of one method as one program: an axis of `jax.vmap` over runs, around that over their workers.

The runs differ in their seeds, learning rates, options of the method and numbers of corrupted workers; all of these are
arrays, so that one compiled program serves a whole tuning grid and all final runs. Each run is that of
`lsgd train` with the same configuration, up to rounding.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from lsgd_jax.compare.comparison import VALIDATION
from lsgd_jax.config import Config
from lsgd_jax.data import Data, Feed
from lsgd_jax.exchange import worker_index
from lsgd_jax.methods import METHODS
from lsgd_jax.optimizers import local_optimizer
from lsgd_jax.train.corruption import corruption_of
from lsgd_jax.train.evaluated_model import evaluated_model, with_tail
from lsgd_jax.train.learning_rates import learning_rate_factor, scale_by_rate_factor
from lsgd_jax.train.setup import feed_from, make_model, step_key
from lsgd_jax.train.step import TrainState, in_mode, worker_step

AXES = ("worker",)


class Run(NamedTuple):
    """What a run has of its own."""

    seed: int
    config: Config
    """Its learning rate, options and number of corrupted workers count; all else is as in the other runs."""


class ManyRuns:
    """The program that trains so many runs at once."""

    def __init__(self, config: Config, data: Data) -> None:
        """Prepare the program.

        Args:
          config: of all runs, in one group, in which workers may be corrupted. It has no batch normalization.
          data: its task's examples, in memory.
        """
        plain = {"groups": 1, "learning_rates": "equal", "learning_rate_drops_in": "fractions"}
        plain |= {"elect_by": "training_losses", "chips_per_worker": 1}
        if config.task.has_batch_norm or any(getattr(config, name) != value for name, value in plain.items()):
            raise ValueError(f"many runs at once are without batch normalization, and with {plain}.")
        self.config, self.data = config, data
        method = METHODS[config.method]
        self.kinds = ["own"] if method.exchanges == "never" else ["own", "tail_mean"]
        """The models of a run that are evaluated."""
        self.options = [name for name in method.grid if name in config.options]
        self.examples = len(jax.tree.leaves(data.train)[0])
        steps = np.arange(config.steps)
        self.rate_factors = learning_rate_factor(config, steps, epochs=0.0, seconds=0.0)
        self._network = functools.cache(self._start)
        self._trained = jax.jit(self._train)
        self._measured = jax.jit(self._measure)

    def errors(self, runs: Sequence[Run], *, validation: bool) -> dict[str, Float[np.ndarray, " runs"]]:
        """Train the runs; returns the headline measure of each kind of evaluated model, NaN where it has failed.

        Args:
          runs: as many as in every call before, or a program is compiled anew.
          validation: whether a part of the training data is held out and takes the place of the test data.
        """
        feeds = {seed: self._feed(seed, validation) for seed in {run.seed for run in runs}}
        batches = {seed: np.stack(list(feed.batches(0, self.config.steps))) for seed, feed in feeds.items()}
        [feed, *_] = feeds.values()
        own = {
            "start": jax.tree.map(lambda *xs: jnp.stack(xs), *(self._network(run.seed) for run in runs)),
            "key": jnp.stack([step_key(run.seed) for run in runs]),
            "rate": jnp.array([run.config.learning_rate / self.config.learning_rate for run in runs]),
            "corrupt": jnp.array([run.config.corrupt_workers for run in runs]),
            "options": {name: jnp.array([float(run.config.options[name]) for run in runs]) for name in self.options},
        }
        of_steps = np.stack([batches[run.seed] for run in runs], axis=1)  # [steps, runs, workers, batch]
        models = self._trained(self._padded(feed.shared), own, of_steps)
        held = next(iter(feed.test_chunks(feed.test_count)))[0]
        return {kind: np.asarray(self._measured(models[kind], held)) for kind in self.kinds}

    def _feed(self, seed: int, validation: bool) -> Feed:
        return feed_from(self.config.replace(seed=seed, validation=VALIDATION if validation else 0.0), self.data)

    def _padded(self, shared: Any) -> Any:
        """Training arrays of one size, so that the same program takes those from which a part is held out."""
        return jax.tree.map(lambda x: np.pad(x, [(0, self.examples - len(x)), *[(0, 0)] * (x.ndim - 1)]), shared)

    def _start(self, seed: int) -> nnx.State:
        return nnx.state(make_model(self.config.replace(seed=seed)), nnx.Param)

    @functools.cached_property
    def _model(self) -> nnx.Module:
        model = make_model(self.config)
        for _, module in nnx.iter_graph(model):
            if isinstance(module, nnx.Conv):
                module.conv_general_dilated = as_product
        return model

    def _train(self, shared: Any, own: dict[str, Any], batches: Array) -> dict[str, Any]:
        """The evaluated models of all runs, by kind: [runs, ...]."""
        config, feed = self.config, self._feed(0, validation=False)

        def worker(start: Any, own: dict[str, Any], batches: Array) -> dict[str, Any]:
            optimizer = self._method(own["options"])
            corruption = corruption_of(config)
            if corruption is not None:
                corruption = corruption._replace(workers=own["corrupt"])
            step = worker_step(config.task, self._model, optimizer, feed, corruption=corruption, axis_name=AXES)
            key = jax.random.fold_in(own["key"], worker_index(AXES))

            def take(state: TrainState, now: tuple) -> tuple[TrainState, None]:
                factor, *number_and_batch = now
                return step(shared, factor * own["rate"], key, state, number_and_batch)[0], None

            state = TrainState(start, nnx.State({}), optimizer.init(start))
            state, _ = lax.scan(take, state, (self.rate_factors, jnp.arange(config.steps), batches))
            return {kind: self._evaluated(kind)(state.params, state.optimizer, AXES) for kind in self.kinds}

        def run(own: dict[str, Any], batches: Array) -> dict[str, Any]:
            workers = jax.vmap(worker, in_axes=(None, None, 1), axis_name="worker")
            return jax.tree.map(lambda x: x[0], workers(own["start"], own, batches))  # The same on all.

        return jax.vmap(run, in_axes=(0, 1))(own, batches)

    def _method(self, options: dict[str, Array]) -> optax.GradientTransformationExtraArgs:
        config = self.config
        optimizer = optax.chain(local_optimizer(config), scale_by_rate_factor())
        others = {name: value for name, value in config.method_options.items() if name not in options}
        method = METHODS[config.method].built(optimizer, others | options, groups=(), workers=AXES)
        return with_tail(config, method, AXES) if "tail_mean" in self.kinds else method

    def _evaluated(self, kind: str) -> Any:
        return evaluated_model(self.config.replace(evaluated_model=None if kind == "own" else kind))

    def _measure(self, models: Any, examples: Any) -> Float[Array, " runs"]:
        """The headline measure of each model; NaN if one of its measures is not finite."""
        graphdef, task = nnx.graphdef(in_mode(self._model, training=False)), self.config.task

        def measure(params: Any) -> Array:
            measures = task.measures(nnx.merge(graphdef, params), examples)
            found = {name: jnp.mean(x, dtype=float) for name, x in measures.items()}
            is_finite = jnp.isfinite(jnp.stack(list(found.values()))).all()
            return jnp.where(is_finite, found[task.headline.name], jnp.nan)

        return lax.map(measure, models, batch_size=8)


def as_product(
    x: Float[Array, "batch length in_channels"],
    kernel: Float[Array, "taps in_channels out_channels"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "batch out_length out_channels"]:
    """A convolution over one axis as a matrix product: with a kernel per worker, one batched product on a GPU."""
    del options
    taps, [stride] = len(kernel), strides
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:2], (taps,), strides, padding)
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    positions = (x.shape[1] - taps) // stride + 1
    fields = [x[:, tap : tap + stride * (positions - 1) + 1 : stride] for tap in range(taps)]
    return jnp.concatenate(fields, -1) @ kernel.reshape(-1, kernel.shape[-1])
