"""The analytic problems of the paper: functions of one worker's point, without a worker axis."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def bowl(x: Float[Array, " 2"]) -> Float[Array, ""]:
    """The convex bowl x^2 + y^2 of the trajectories figure."""
    return jnp.sum(x**2)


def sinc_rings(x: Float[Array, " 2"]) -> Float[Array, ""]:
    r"""The heavily non-convex function :math:`\sin(\pi r) / (\pi r)`, r the distance from the origin.

    Its minima are rings: the global one at r = 1.43 of height -0.2172, then r = 3.47 of height -0.0913, r = 5.48 of
    height -0.0580, ... with maxima of 0.1284, 0.0709, ... in between.

    Example:
      >>> print(f"{sinc_rings(jnp.array([0.0, 1.4303])):.4f}")
      -0.2172
    """
    square = jnp.sum(x**2)
    # The root has no derivative at 0, where the function is flat.
    r = jnp.sqrt(jnp.where(square > 0, square, 1))
    return jnp.where(square > 0, jnp.sinc(r), 1)


def double_well(x: Float[Array, " d"], tilt: float = 0.0) -> Float[Array, ""]:
    r"""Two wells along each coordinate, :math:`\sum_i (x_i^2 - 1)^2 + t x_i`; without a tilt t all are as deep.

    Example:
      >>> double_well(jnp.array([1.0, 0.5])).tolist()
      0.5625
    """
    return jnp.sum((x**2 - 1) ** 2 + tilt * x)


def matrix_completion(x: Float[Array, "d rank"], target: Float[Array, "d d"]) -> Float[Array, ""]:
    r"""Low-rank matrix completion, :math:`F(X) = \frac14 \|M - X X^T\|_F^2` with M the target, fully observed."""
    return jnp.sum((target - jnp.matmul(x, x.T, precision="highest")) ** 2) / 4


def matrix_completion_problem(
    key: PRNGKeyArray, dimension: int, rank: int, workers: int
) -> tuple[Float[Array, "d d"], Float[Array, "workers d rank"]]:
    """A target X* X*^T and starts for `matrix_completion`, with X* and the starts standard normal.

    The same numbers are drawn in single and in double precision.

    Args:
      key: for X* and the starts; the first start does not depend on how many there are.
      dimension: d.
      rank: of X* and of the starts.
      workers: how many starts.

    Returns:
      The target and the starts, the worker axis first.
    """
    target_key, start_key = jax.random.split(key)
    solution = jax.random.normal(target_key, (dimension, rank), jnp.float32).astype(float)
    start_keys = jax.vmap(lambda i: jax.random.fold_in(start_key, i))(jnp.arange(workers))
    starts = jax.vmap(lambda k: jax.random.normal(k, (dimension, rank), jnp.float32))(start_keys).astype(float)
    return jnp.matmul(solution, solution.T, precision="highest"), starts


class Quadratic(NamedTuple):
    r"""A strongly convex quadratic with noisy gradients, :math:`f(x) = \frac12 (x - x^*)^T H (x - x^*)`, f* = 0."""

    hessian: Float[Array, "d d"]
    minimiser: Float[Array, " d"]
    strong_convexity: float
    """m, the smallest eigenvalue of the Hessian."""
    smoothness: float
    """M, the largest eigenvalue of the Hessian."""
    noise: float
    """sigma: the gradient's noise is normal with mean 0 and E ||noise||^2 = sigma^2."""

    def value(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """f(x), without noise."""
        return jnp.vdot(x - self.minimiser, self._times_hessian(x - self.minimiser), precision="highest") / 2

    def gradient(self, x: Float[Array, " d"], key: PRNGKeyArray) -> Float[Array, " d"]:
        """An unbiased gradient with variance sigma^2."""
        noise = jax.random.normal(key, x.shape, x.dtype) * self.noise / jnp.sqrt(x.size).astype(x.dtype)
        return self._times_hessian(x - self.minimiser) + noise

    def _times_hessian(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.matmul(self.hessian, x, precision="highest")


def quadratic(
    key: PRNGKeyArray, dimension: int, *, strong_convexity: float = 1.0, smoothness: float = 10.0, noise: float = 0.0
) -> Quadratic:
    """A random `Quadratic` whose eigenvalues run geometrically from m to M, in a uniformly random orientation.

    Args:
      key: for the orientation and the minimiser, which is standard normal.
      dimension: d, at least 2.
      strong_convexity: m > 0.
      smoothness: M >= m.
      noise: sigma >= 0.

    Raises:
      ValueError: if a number is out of range.
    """
    if dimension < 2 or not 0 < strong_convexity <= smoothness or noise < 0:
        raise ValueError(
            f"a quadratic needs dimension >= 2, 0 < strong_convexity <= smoothness and noise >= 0,"
            f" got {dimension}, {strong_convexity}, {smoothness} and {noise}."
        )
    orientation_key, minimiser_key = jax.random.split(key)
    eigenvalues = jnp.geomspace(strong_convexity, smoothness, dimension)
    axes = jax.random.orthogonal(orientation_key, dimension)
    hessian = jnp.matmul(axes * eigenvalues[None], axes.T, precision="highest")
    return Quadratic(hessian, jax.random.normal(minimiser_key, (dimension,)), strong_convexity, smoothness, noise)
