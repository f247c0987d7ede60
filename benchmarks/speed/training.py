"""A training step in JAX, and programs that take it: forward, backward, SGD with Nesterov momentum and weight decay."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
TRANSFORMER = {"width": 512, "depth": 8, "heads": 8}
"""Size of the transformer: 25 million parameters."""


def random_network(build: Callable[[], nnx.Module]) -> nnx.Module:
    """A network of random values, made here; its own initialization compiles programs for each shape.

    Args:
      build: makes the network.
    """
    rng = np.random.default_rng(0)

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        inputs = math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / math.sqrt(inputs), leaf.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.tree.map(value, state))


def jax_step(model: nnx.Module) -> tuple[Callable, Any]:
    """The training step and the state to start from."""
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    tx = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True))

    def step(state: tuple, batch: tuple) -> tuple:
        params, stats, optimizer, key = state
        key, dropout = jax.random.split(key)
        x, y = batch

        def loss(params: nnx.State) -> tuple:
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits = model(x, rngs=nnx.Rngs(dropout=dropout))
            value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return value, nnx.state(model, nnx.BatchStat)

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, optimizer = tx.update(grads, optimizer, params)
        return optax.apply_updates(params, updates), stats, optimizer, key

    return step, (params, stats, tx.init(params), jax.random.key(0))


class Running:
    """A program that steps on from where it stood, once with each of the arguments, in the memory of its last state."""

    def __init__(self, step: Callable, state: Any, arguments: list) -> None:
        self._step: Any = jax.jit(step, donate_argnums=0)
        self._state, self._arguments = jax.tree.map(jnp.copy, state), arguments

    def compile(self) -> None:
        """Compile the step now; several threads may compile several programs at once."""
        self._step = self._step.lower(self._state, self._arguments[0]).compile()

    def __call__(self) -> None:
        """Take the steps, and wait for the last."""
        for argument in self._arguments:
            self._state = self._step(self._state, argument)
        jax.block_until_ready(self._state)
