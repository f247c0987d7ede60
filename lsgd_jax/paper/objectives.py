"""Analytic test problems of the paper, as functions of one worker's parameters (no worker axis)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def bowl(x: Float[Array, " 2"]) -> Float[Array, ""]:
    """Convex bowl x^2 + y^2 of the trajectories figure."""
    return jnp.sum(x**2)


def sinc_rings(x: Float[Array, " 2"]) -> Float[Array, ""]:
    r"""Heavily nonconvex function :math:`\sin(\pi r) / (\pi r)`, where r is the distance from the origin.

    Its minima are rings: the global one at r = 1.43 with value -0.2172, then r = 3.47 with -0.0913, r = 5.48 with
    -0.0580, ..., with maxima of 0.1284, 0.0709, ... in between.

    Example:
      >>> print(f"{sinc_rings(jnp.array([0.0, 1.4303])):.4f}")
      -0.2172
    """
    square = jnp.sum(x**2)
    # The square root has no derivative at 0, where the function is flat.
    r = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, jnp.sinc(r), 1)


def double_well(x: Float[Array, " d"], tilt: float = 0.0) -> Float[Array, ""]:
    r"""Two wells per coordinate, :math:`\sum_i (x_i^2 - 1)^2 + t x_i`; equally deep for tilt t = 0.

    Example:
      >>> double_well(jnp.array([1.0, 0.5])).tolist()
      0.5625
    """
    return jnp.sum((x**2 - 1) ** 2 + tilt * x)


def matrix_completion(x: Float[Array, "d rank"], target: Float[Array, "d d"]) -> Float[Array, ""]:
    r"""Low-rank matrix completion, :math:`F(X) = \frac14 \|M - X X^T\|_F^2` for a fully observed target M."""
    return jnp.sum((target - jnp.matmul(x, x.T, precision="highest")) ** 2) / 4


def matrix_completion_problem(
    key: PRNGKeyArray, dimension: int, rank: int, workers: int
) -> tuple[Float[Array, "d d"], Float[Array, "workers d rank"]]:
    """Sample a target X* X*^T and starting points for `matrix_completion`; X* and the starts are standard normal.

    Single and double precision get the same numbers.

    Args:
      key: random key for X* and the starts; the first start does not depend on the number of workers.
      dimension: dimension d of the target.
      rank: rank of X* and of the starts.
      workers: number of starts.

    Returns:
      The target, and the starts with the worker axis first.
    """
    target_key, start_key = jax.random.split(key)
    solution = jax.random.normal(target_key, (dimension, rank), jnp.float32).astype(float)
    start_keys = jax.vmap(lambda i: jax.random.fold_in(start_key, i))(jnp.arange(workers))
    starts = jax.vmap(lambda k: jax.random.normal(k, (dimension, rank), jnp.float32))(start_keys).astype(float)
    return jnp.matmul(solution, solution.T, precision="highest"), starts


class Quadratic(NamedTuple):
    r"""Strongly convex quadratic with noisy gradients, :math:`f(x) = \frac12 (x - x^*)^T H (x - x^*)`, f* = 0."""

    hessian: Float[Array, "d d"]
    minimizer: Float[Array, " d"]
    strong_convexity: float
    """Smallest eigenvalue m of the Hessian."""
    smoothness: float
    """Largest eigenvalue M of the Hessian."""
    noise: float
    """Noise level sigma: the gradient noise is normal with mean 0 and E ||noise||^2 = sigma^2."""

    def value(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """Return f(x), without noise."""
        return jnp.vdot(x - self.minimizer, self._times_hessian(x - self.minimizer), precision="highest") / 2

    def gradient(self, x: Float[Array, " d"], key: PRNGKeyArray) -> Float[Array, " d"]:
        """Sample an unbiased gradient with variance sigma^2."""
        noise = jax.random.normal(key, x.shape, x.dtype) * self.noise / jnp.sqrt(x.size).astype(x.dtype)
        return self._times_hessian(x - self.minimizer) + noise

    def _times_hessian(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.matmul(self.hessian, x, precision="highest")


def quadratic(
    key: PRNGKeyArray, dimension: int, *, strong_convexity: float = 1.0, smoothness: float = 10.0, noise: float = 0.0
) -> Quadratic:
    """Sample a `Quadratic` with eigenvalues geometrically spaced from m to M and a uniformly random orientation.

    Args:
      key: random key for the orientation and the minimizer, which is standard normal.
      dimension: dimension d, at least 2.
      strong_convexity: smallest eigenvalue m > 0.
      smoothness: largest eigenvalue M >= m.
      noise: gradient noise sigma >= 0.

    Raises:
      ValueError: if a number is out of range.
    """
    if dimension < 2 or not 0 < strong_convexity <= smoothness or noise < 0:
        raise ValueError(
            f"a quadratic needs dimension >= 2, 0 < strong_convexity <= smoothness and noise >= 0,"
            f" got {dimension}, {strong_convexity}, {smoothness} and {noise}."
        )
    orientation_key, minimizer_key = jax.random.split(key)
    eigenvalues = jnp.geomspace(strong_convexity, smoothness, dimension)
    axes = jax.random.orthogonal(orientation_key, dimension)
    hessian = jnp.matmul(axes * eigenvalues[None], axes.T, precision="highest")
    return Quadratic(hessian, jax.random.normal(minimizer_key, (dimension,)), strong_convexity, smoothness, noise)
