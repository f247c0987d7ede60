"""Step directions: at least half of the candidate leaders turn a step toward Newton's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import stats

from lsgd_jax.paper import directions
from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes, sample_starts, verdict
from lsgd_jax.paper.objectives import Quadratic, quadratic

LAMBDAS = np.geomspace(1e-4, 1e4, 9)


def measure(
    sizes: Sizes,
    *,
    dimensions: tuple[int, ...] = (2, 5, 20),
    conditions: tuple[float, ...] = (10.0, 1000.0),
    points: int = 4,
) -> Findings:
    """Measure the share of candidate leaders that improve a step's direction, at random and worst-case points."""
    curves, cases = [], []
    for d in dimensions:
        for kappa in conditions:
            problem = quadratic(jax.random.key(d), d, smoothness=kappa)
            at_random = sample_starts(problem, jax.random.key(0), np.ones(1), points)[0]
            for i, x in enumerate([*at_random, _largest_angle(problem)]):
                promised, angle = directions.guaranteed_pull(problem, x)
                lams = np.sort(np.append(LAMBDAS, min(promised, 10 * LAMBDAS[-1])))
                good = np.asarray(_improving(problem, x, jax.random.key(i), jnp.asarray(lams), sizes.candidates))
                low, high = _binomial_interval(good, sizes.candidates)
                name = f"dimension {d}, kappa {kappa:g}, angle {angle:.1f}"
                curves.append(Curve("direction", name, lams, good / sizes.candidates, low, high))
                cases.append((promised, angle, lams <= promised, low >= 0.5, high < 0.5))

    def count(kind: str) -> dict[str, int]:
        chosen = [
            (in_promise if kind != "outside" else ~in_promise, half, less)
            for promised, _, in_promise, half, less in cases
            if kind == "outside" or np.isinf(promised) == (kind == "large angle")
        ]
        return {
            "cases": sum(int(where.sum()) for where, _, _ in chosen),
            "shown to be at least half": sum(int((where & half).sum()) for where, half, _ in chosen),
            "shown to be less than half": sum(int((where & less).sum()) for where, _, less in chosen),
        }

    numbers: dict[str, Any] = {kind: count(kind) for kind in ("small lambda", "large angle", "outside")}
    numbers["candidates"] = sizes.candidates
    numbers["points"] = [
        {"angle": angle, "lambda": promised if np.isfinite(promised) else None} for promised, angle, *_ in cases
    ]
    less = numbers["outside"]["shown to be less than half"]
    angles = [angle for promised, angle, *_ in cases if np.isinf(promised)]
    rows = [
        Row(
            f"{kind}: at least half of the candidate leaders turn the step towards Newton's",
            "step direction",
            COMMAND,
            f"of {numbers[kind]['cases']} shares {numbers[kind]['shown to be at least half']} are shown to be at least"
            f" half, {numbers[kind]['shown to be less than half']} to be less; {where}",
            verdict(numbers[kind]["shown to be less than half"] == 0, fails_outside=fails_outside),
        )
        for kind, where, fails_outside in (
            ("small lambda", f"beyond it {less} of {numbers['outside']['cases']} to be less", less > 0),
            ("large angle", f"{len(angles)} points with angles from {min(angles):.0f} degrees, any lambda", False),
        )
    ]
    return Findings(rows, curves, numbers)


@partial(jax.jit, static_argnames="count")
def _improving(
    problem: Quadratic, x: Float[Array, " d"], key: PRNGKeyArray, lams: Float[Array, " lams"], count: int
) -> Float[Array, " lams"]:
    """Count the candidates that improve the direction, for each lambda."""
    leaders = directions.sample_candidates(key, problem, x, count)
    return jax.lax.map(lambda lam: directions.improves_direction(problem, x, leaders, lam).sum(), lams)


def _largest_angle(problem: Quadratic) -> Float[Array, " d"]:
    """Point with the largest possible angle (Kantorovich): equal shares of f along the two outermost axes."""
    values, axes = jnp.linalg.eigh(problem.hessian)
    return problem.minimizer + axes[:, 0] / jnp.sqrt(values[0]) + axes[:, -1] / jnp.sqrt(values[-1])


def _binomial_interval(good: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson 95 % interval."""
    low, high = stats.beta.ppf(0.025, good, count - good + 1), stats.beta.ppf(0.975, good + 1, count - good)
    return np.where(good == 0, 0, low), np.where(good == count, 1, high)
