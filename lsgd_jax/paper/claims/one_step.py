"""One step with noisy gradients: its mean stays below the bound."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsgd_jax.paper import bounds
from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes, Z, sample_starts, verdict
from lsgd_jax.paper.claims.noisy_descent import noisy_descent
from lsgd_jax.paper.objectives import Quadratic, quadratic

ETA_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.5)
"""Step sizes, as multiples of the largest to which the bound applies, 1/(2M)."""
PULL_FACTORS = (0.0, 0.5, 1.0, 4.0, 16.0, 64.0)
"""Pulls eta lambda, as multiples of the largest to which the bound applies, 1/(2 kappa)."""


def measure(
    sizes: Sizes, *, conditions: tuple[float, ...] = (2.0, 10.0, 100.0), workers: tuple[int, ...] = (1, 4, 16)
) -> Findings:
    """Compare the mean after one step with the bound."""
    worst, undecided, tightest, applicable_count = 0, 0, 0.0, 0
    failed, counted = np.zeros((2, len(ETA_FACTORS), len(PULL_FACTORS)))
    for i, kappa in enumerate(conditions):
        problem = quadratic(jax.random.key(i), 10, smoothness=kappa, noise=1.0)
        constants = {"strong_convexity": 1.0, "smoothness": kappa}
        eta = np.array(ETA_FACTORS)[:, None] / (2 * kappa)
        lam = np.array(PULL_FACTORS)[None] / (2 * kappa) / eta
        for p in workers:
            starts = sample_starts(problem, jax.random.key(p), np.geomspace(1e-3, 1e2, sizes.points), p)
            gap = np.asarray(jax.vmap(jax.vmap(problem.value))(starts))
            mean, half = _means_after_one_step(problem, starts, eta, lam, sizes.samples)
            bound = bounds.one_step_bound(
                gap, gap.min(1, keepdims=True), eta[..., None, None], lam[..., None, None], noise=1.0, **constants
            )
            applicable = bounds.bound_applies(np.broadcast_to(eta, lam.shape), lam, **constants)
            failed += (mean - half > bound).sum((2, 3))
            counted += gap.size
            worst += int((mean - half > bound)[applicable].sum())
            undecided += int((abs(mean - bound) <= half)[applicable].sum())
            applicable_count += bound[applicable].size
            tightest = max(tightest, float((mean / bound)[applicable].max()))
    share = failed / counted
    outside = (np.array(ETA_FACTORS)[:, None] > 1) | (np.array(PULL_FACTORS) > 1)
    numbers = {
        "promised cases": applicable_count,
        "shown to exceed the bound where promised": worst,
        "undecided where promised": undecided,
        "largest mean / bound where promised": tightest,
        "share that exceeds the bound, by eta 2M and eta lambda 2 kappa": {
            f"{e:g}, {p:g}": float(share[i, j]) for i, e in enumerate(ETA_FACTORS) for j, p in enumerate(PULL_FACTORS)
        },
    }
    row = Row(
        "one step: E f(x+) - f* <= (1 - m eta)(f(x) - f*) - eta lambda (f(x) - f(z)) + eta^2 M sigma^2 / 2",
        "convergence",
        COMMAND,
        f"eta <= 1/(2M), eta lambda <= 1/(2 kappa): {worst} of {applicable_count} means exceed it, at most"
        f" {tightest:.2f} of the bound; outside up to {share[outside].max():.0%} do, first at eta ="
        f" {_first_failure(share[:, PULL_FACTORS.index(1.0)], ETA_FACTORS)}/(2M) or eta lambda ="
        f" {_first_failure(share[ETA_FACTORS.index(1.0)], PULL_FACTORS)}/(2 kappa)",
        verdict(worst == 0, fails_outside=share[outside].max() > 0),
    )
    curves = [Curve("one step", f"eta 2M = {e:g}", np.array(PULL_FACTORS), share[i]) for i, e in enumerate(ETA_FACTORS)]
    return Findings([row], curves, numbers)


def _first_failure(share: np.ndarray, factors: tuple[float, ...]) -> str:
    failing = [factor for factor, part in zip(factors, share, strict=True) if part > 0]
    return f"{failing[0]:g}" if failing else "none"


@partial(jax.jit, static_argnames="samples")
def _after_one_step(
    problem: Quadratic, starts: Float[Array, "points workers d"], eta: Array, lam: Array, samples: int
) -> tuple[Array, Array]:
    keys = jax.random.split(jax.random.key(2), samples)
    zero = jnp.zeros(())

    def at_point(start: Array) -> tuple[Array, Array]:
        values = jax.vmap(lambda key: noisy_descent(problem, start, key, eta[None], lam[None], zero)[0])(keys)
        return values.mean(0), Z * values.std(0, ddof=1) / math.sqrt(samples)

    return jax.vmap(at_point)(starts)


def _means_after_one_step(
    problem: Quadratic, starts: Array, eta: np.ndarray, lam: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means and interval half-widths, by eta, lambda, point and worker."""
    grid = zip(np.broadcast_to(eta, lam.shape).flat, lam.flat, strict=True)
    results = [_after_one_step(problem, starts, jnp.asarray(e), jnp.asarray(p), samples) for e, p in grid]
    mean, half = (np.stack(each).reshape(*lam.shape, *starts.shape[:2]) for each in zip(*results, strict=True))
    return mean, half
