"""Convergence at rate O(1/k) with step sizes Theta(1/k)."""

import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from lsgd_jax.paper import bounds
from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes, Z, verdict
from lsgd_jax.paper.claims.noisy_descent import CONSTANTS, NOISE, mean_values


def measure(sizes: Sizes, *, workers: int = 4, lam: float = 1.0, loss_noise: float = 1.0) -> Findings:
    """Measure the convergence rate with step sizes Theta(1/k)."""
    k = np.arange(sizes.steps)
    eta = bounds.decreasing_step(k, **CONSTANTS)
    decreasing_lam = 2 * CONSTANTS["smoothness"] * lam * eta
    slow = bounds.decreasing_step(k, **CONSTANTS, scale=0.2)
    cases: dict[str, tuple[np.ndarray, np.ndarray, float, dict[str, Any] | None]] = {
        "LSGD": (eta, np.full_like(eta, lam), 0.0, {"lam": lam}),
        "LSGD, noisy losses, lambda_k = Theta(1/k)": (
            eta,
            decreasing_lam,
            loss_noise,
            {"lam": lam, "workers": workers, "loss_noise": loss_noise},
        ),
        "independent": (eta, np.zeros_like(eta), 0.0, {}),
        "LSGD, steps too small": (slow, np.full_like(eta, lam), 0.0, None),
    }
    curves, numbers = [], {}
    for name, (etas, lams, noise, options) in cases.items():
        values, gap = mean_values(sizes.replicas, workers, etas, lams, noise)
        mean, half = values.mean(1), Z * values.std(1, ddof=1) / math.sqrt(sizes.replicas)
        slope = _slope(values, 1 / etas)  # k up to a factor and the delay in the step sizes.
        bound = None
        if options is not None:
            bound = bounds.decreasing_steps_bound(k + 1, gap, noise=NOISE, **CONSTANTS, **options)
        thin = np.unique(np.geomspace(1, sizes.steps, 60).astype(int)) - 1
        thin_bound = None if bound is None else bound[thin]
        curves.append(Curve("rate", name, thin + 1, mean[thin], (mean - half)[thin], (mean + half)[thin], thin_bound))
        numbers[name] = {"slope": slope, "gap of the start": gap}
        if bound is not None:
            numbers[name]["largest mean / bound"] = float((mean / bound).max())
            numbers[name]["shown to exceed the bound"] = int((mean - half > bound).sum())
    rows = [
        _rate_row("decreasing steps, eta_k = Theta(1/k): E f(x_k) - f* = O(1/k)", "LSGD", numbers),
        _rate_row("a leader elected on noisy losses, eta_k and lambda_k = Theta(1/k): O(1/k)", list(cases)[1], numbers),
    ]
    return Findings(rows, curves, numbers)


def _rate_row(claim: str, name: str, numbers: dict[str, Any]) -> Row:
    low, middle, high = numbers[name]["slope"]
    control, slow = numbers["independent"]["slope"][1], numbers["LSGD, steps too small"]["slope"][1]
    holds = low <= -1 and not numbers[name]["shown to exceed the bound"]
    return Row(
        claim,
        "convergence" if name == "LSGD" else "stochastic leader",
        COMMAND,
        f"log-log slope {middle:.3f} [{low:.3f}, {high:.3f}], never more than"
        f" {numbers[name]['largest mean / bound']:.2f} of the bound; independent workers {control:.3f}; steps ten times"
        f" smaller, for which nothing is promised, {slow:.2f}",
        verdict(holds, fails_outside=slow > -0.9),
    )


def _slope(values: Float[np.ndarray, "steps replicas"], k: Float[np.ndarray, " steps"]) -> list[float]:
    """Log-log slope of the mean over the last decade of k, with its bootstrapped 95 % interval."""
    replicas = values.shape[1]
    # Means over intervals of equal length on the logarithmic scale.
    edges = np.unique(np.searchsorted(k, np.geomspace(k[-1] / 10, k[-1], 21)))
    intervals = [slice(*pair) for pair in itertools.pairwise(edges)]
    binned = np.stack([values[interval].mean(0) for interval in intervals])
    at = np.log([k[interval].mean() for interval in intervals])
    resampled = np.random.default_rng(0).integers(replicas, size=(1000, replicas))
    low, high = np.quantile(np.polyfit(at, np.log(binned[:, resampled].mean(-1)), 1)[0], (0.025, 0.975))
    return [float(low), float(np.polyfit(at, np.log(binned.mean(1)), 1)[0]), float(high)]
