"""Stochastic leader: election on noisy losses raises the limit of constant steps by a bounded amount."""

import math
from typing import Any

import numpy as np

from lsgd_jax.paper import bounds
from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes, Z
from lsgd_jax.paper.claims.noisy_descent import CONSTANTS, NOISE, mean_values

LOSS_NOISES = (0.0, 0.01, 0.1, 1.0, 10.0)


def measure(sizes: Sizes, *, workers: tuple[int, ...] = (4, 16), lam: float = 1.0) -> Findings:
    """Measure the limit of constant steps with a leader elected on noisy losses."""
    eta, steps = 1 / (2 * CONSTANTS["smoothness"]), 300
    curves: list[Curve] = []
    numbers: dict[str, Any] = {"eta": eta, "lambda": lam}

    def limit(p: int, lam: float, noise: float) -> tuple[float, float]:
        values = mean_values(sizes.replicas, p, np.full(steps, eta), np.full(steps, lam), noise)[0]
        per_replica = values[steps // 3 :].mean(0)
        return per_replica.mean(), Z * per_replica.std(ddof=1) / math.sqrt(sizes.replicas)

    exceeded, largest, raised = 0, 0.0, 0.0
    for p in workers:
        mean, half = np.array([limit(p, lam, noise) for noise in LOSS_NOISES]).T
        bound = np.array(
            [
                bounds.limit_bound(eta, lam, noise=NOISE, workers=p, loss_noise=noise, **CONSTANTS)
                for noise in LOSS_NOISES
            ]
        )
        curves.append(Curve("limit", f"{p} workers", np.array(LOSS_NOISES), mean, mean - half, mean + half, bound))
        exceeded += int((mean - half > bound).sum())
        largest = max(largest, float((mean / bound).max()))
        rise = (mean - mean[0])[1:] / (bound - bound[0])[1:]
        raised = max(raised, float(rise.max()))
        numbers[f"{p} workers"] = {"sigma_f": LOSS_NOISES, "limit": mean.tolist(), "bound": bound.tolist()}
    alone, _ = limit(workers[0], 0.0, 0.0)
    numbers["independent"] = float(alone)
    exact, noisiest = (numbers[f"{workers[-1]} workers"]["limit"][i] for i in (0, -1))
    row = Row(
        "a leader elected on noisy losses: limsup E f(x_k) - f* <= eta kappa sigma^2 / 2 + 4/m lambda sqrt(p) sigma_f",
        "stochastic leader",
        COMMAND,
        f"{exceeded} of {len(workers) * len(LOSS_NOISES)} limits exceed it, at most {largest:.2f} of the bound;"
        f" the noise raises the limit by at most {raised:.0%} of what it may; {workers[-1]} workers: {exact:.3f}"
        f" without, {noisiest:.3f} with sigma_f = {LOSS_NOISES[-1]:g}, {alone:.3f} for independent workers",
        "holds" if exceeded == 0 else "fails",
    )
    return Findings([row], curves, numbers)
