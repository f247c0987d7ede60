"""LSGD on quadratics with noisy gradients and losses, for the claims on convergence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.leader import leader_pull
from lsgd_jax.paper.objectives import Quadratic, quadratic

CONSTANTS: dict[str, Any] = {"strong_convexity": 1.0, "smoothness": 10.0}
NOISE, DIMENSION = 1.0, 10


@jax.jit
def noisy_descent(
    problem: Quadratic,
    starts: Float[Array, "workers d"],
    key: PRNGKeyArray,
    etas: Float[Array, " steps"],
    lams: Float[Array, " steps"],
    loss_noise: Float[Array, ""],
) -> Float[Array, "steps workers"]:
    """Run LSGD with pulls eta lambda at x and a leader elected on noisy losses at every step; returns all values."""

    def worker(start: Array) -> Array:
        def step(carry: tuple, t: tuple) -> tuple[tuple, Array]:
            x, state = carry
            k, eta, lam = t
            own = jax.random.fold_in(jax.random.fold_in(key, k), jax.lax.axis_index("worker"))
            gradient_key, loss_key = jax.random.split(own)
            loss = problem.value(x) + loss_noise * jax.random.normal(loss_key, (), x.dtype)
            method = _method(eta, eta * lam)
            updates, state = method.update(problem.gradient(x, gradient_key), state, x, value=loss)
            x = optax.apply_updates(x, updates)
            return (x, state), problem.value(x)

        state = _method(etas[0], lams[0]).init(start)
        return jax.lax.scan(step, (start, state), (jnp.arange(len(etas)), etas, lams))[1]

    return jax.vmap(worker, axis_name="worker", out_axes=1)(starts)


def _method(eta: Array, pull: Array) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(eta), leader_pull(pull, axis_name="worker", window=1, pull_at="before_step"))


def mean_values(
    replicas: int, workers: int, etas: np.ndarray, lams: np.ndarray, loss_noise: float
) -> tuple[Float[np.ndarray, "steps replicas"], float]:
    """Mean value over workers after each step of descents on random quadratics, and the mean value at the start."""
    keys = jax.random.split(jax.random.key(0), (3, replicas))
    problems = jax.vmap(lambda key: quadratic(key, DIMENSION, noise=NOISE, **CONSTANTS))(keys[0])
    starts = problems.minimizer[:, None] + jax.random.normal(keys[1, 0], (replicas, workers, DIMENSION))
    gap = float(jax.vmap(lambda problem, x: jax.vmap(problem.value)(x))(problems, starts).mean())
    values = _descents(problems, starts, keys[2], jnp.asarray(etas), jnp.asarray(lams), jnp.asarray(loss_noise))
    return np.asarray(values.mean(2).T), gap


_descents = jax.jit(jax.vmap(noisy_descent, (0, 0, 0, None, None, None)))
