"""The paper's theorem on step directions: which leaders turn a step toward Newton's, and when at least half do.

`lsgd figure theory` measures it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lsgd_jax.paper.objectives import Quadratic


def sample_candidates(
    key: PRNGKeyArray, problem: Quadratic, x: Float[Array, " d"], count: int
) -> Float[Array, "count d"]:
    """Sample candidate leaders uniformly by volume in the ellipsoid {z : f(z) <= f(x)} of a quadratic.

    Args:
      key: random key for the candidates.
      problem: quadratic objective f.
      x: position of the worker.
      count: number of candidates.

    Example:
      >>> from lsgd_jax.paper.objectives import quadratic
      >>> problem = quadratic(jax.random.key(0), 3)
      >>> z = sample_candidates(jax.random.key(1), problem, jnp.ones(3), 100)
      >>> bool((jax.vmap(problem.value)(z) <= problem.value(jnp.ones(3))).all())
      True
    """
    direction_key, radius_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, (count, x.size), x.dtype)
    radius = jax.random.uniform(radius_key, (count, 1), x.dtype) ** (1 / x.size)
    ball = radius * direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
    # f(z) = |L^T (z - x*)|^2 / 2 with the Hessian's Cholesky factor L: the ellipsoid is a ball, stretched linearly.
    factor = jnp.linalg.cholesky(problem.hessian)
    stretched = jax.scipy.linalg.solve_triangular(factor, ball.T, trans=1, lower=True).T
    return problem.minimizer[None] + jnp.sqrt(2 * problem.value(x)) * stretched


def improves_direction(
    problem: Quadratic, x: Float[Array, " d"], leaders: Float[Array, "count d"], lam: ArrayLike
) -> Bool[Array, " count"]:
    r"""Return whether candidate leaders turn the step toward Newton's (the theorem's condition).

    .. math:: \angle(d_N, -\nabla f(x) + \lambda (z - x)) \le \angle(d_N, -\nabla f(x)), \qquad
              d_N = -\nabla^2 f(x)^{-1} \nabla f(x)

    Args:
      problem: quadratic objective; its Newton step leads to the minimizer.
      x: position of the worker.
      leaders: candidate leaders z.
      lam: pull coefficient lambda.

    Example:
      >>> from lsgd_jax.paper.objectives import Quadratic
      >>> problem = Quadratic(jnp.diag(jnp.array([1.0, 10.0])), jnp.zeros(2), 1.0, 10.0, 0.0)
      >>> improves_direction(problem, jnp.ones(2), jnp.array([[0.0, 0.0], [1.0, -1.0]]), lam=1.0).tolist()
      [True, False]
    """
    newton, descent = problem.minimizer - x, -jax.grad(problem.value)(x)
    step = descent[None] + lam * (leaders - x[None])

    def cosine(a: Float[Array, "... d"]) -> Float[Array, "..."]:
        return jnp.matmul(a, newton, precision="highest") / jnp.linalg.norm(a, axis=-1)

    return cosine(step) >= cosine(descent)


def guaranteed_pull(problem: Quadratic, x: Float[Array, " d"]) -> tuple[float, float]:
    r"""Largest lambda for which at least half of the candidate leaders improve the direction, and the angle at x.

    The theorem requires a small lambda or a large angle theta between :math:`d_N` and :math:`-g`, where g is the
    gradient. Quantitatively, let x* = 0, let a be the longest semi-axis of the ellipsoid
    :math:`\{z : f(z) \le f(x)\}`, and let d be the unit vector along :math:`d_N`:

    - Small lambda. Let w be the component of d orthogonal to g. Half of the candidates have :math:`w^T z \ge 0`, so
      :math:`w^T u \ge \|x\| \sin^2 \theta` with u = z - x. Since
      :math:`\|\lambda u - g\| \le \|g\| + (\frac12 \lambda^2 \|u\|^2 - \lambda g^T u) / \|g\|`, they improve the
      direction if :math:`\lambda \le 2 \|g\| \|x\| \sin^2 \theta / (\cos \theta (\|x\| + a)^2)`.
    - Large angle. Directions no farther from d than -g is form a convex cone. Half of the candidates have
      :math:`x^T z \le 0`; if :math:`\tan \theta \ge a / \|x\|`, z - x lies in that cone for all of them, and so does
      :math:`\lambda (z - x) - g` for every lambda.

    Args:
      problem: quadratic objective f.
      x: position of the worker.

    Returns:
      The largest lambda (infinite if the angle is large, 0 if the angle is 0) and the angle in degrees.

    Raises:
      ValueError: if x is the minimizer, where the angle is undefined.

    Example:
      >>> from lsgd_jax.paper.objectives import Quadratic
      >>> problem = Quadratic(jnp.diag(jnp.array([1.0, 10.0])), jnp.zeros(2), 1.0, 10.0, 0.0)
      >>> lam, angle = guaranteed_pull(problem, jnp.array([2.0, 0.1]))
      >>> print(f"{lam:.3f} at {angle:.0f} degrees")
      0.097 at 24 degrees
      >>> guaranteed_pull(problem, jnp.array([1.0, 10**-0.5]))[0]
      inf
    """
    newton, gradient = np.asarray(problem.minimizer - x, float), np.asarray(jax.grad(problem.value)(x), float)
    distance, slope = np.linalg.norm(newton), np.linalg.norm(gradient)
    if distance == 0:
        raise ValueError("x must not be the minimizer.")
    cosine = min(float(-newton @ gradient / (distance * slope)), 1.0)
    half_axis = np.sqrt(distance * slope * cosine / problem.strong_convexity)  # 2 f(x) = x^T g.
    angle = float(np.degrees(np.arccos(cosine)))
    if np.sqrt(1 - cosine**2) * distance >= cosine * half_axis:
        return np.inf, angle
    return float(2 * slope * distance * (1 - cosine**2) / (cosine * (distance + half_axis) ** 2)), angle
