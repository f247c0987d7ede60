"""Workers in different wells: averaging slows them, a leader does not."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes
from lsgd_jax.paper.descent import METHODS, descend, methods
from lsgd_jax.paper.objectives import double_well


def measure(sizes: Sizes, *, workers: int = 4, lam: float = 1.0, eta: float = 0.01, iterations: int = 400) -> Findings:
    """Measure how soon workers reach the bottom when they start in different wells and in the same well."""
    level = 1e-3
    starts = jax.random.uniform(jax.random.key(0), (sizes.starts, workers, 2), minval=-2.0, maxval=2.0)
    curves, numbers = [], {}
    for name, method in methods(eta, eta * lam).items():
        for where, initial in (("different wells", starts), ("one well", jnp.abs(starts))):
            values = jax.vmap(lambda s: descend(method, double_well, s, iterations, keep_x=False).values)(initial)
            numbers[f"{name}, {where}"] = {
                who: {"iterations": _iterations(reached), "share": float(reached[:, -1].mean())}
                for who, reached in (
                    ("best", np.asarray((values <= level).any(1))),
                    ("all", np.asarray((values <= level).all(1))),
                )
            }
            middle = np.asarray(jnp.median(values.min(1), axis=0))
            curves.append(Curve("wells", f"{name}, {where}", np.arange(iterations + 1), middle))

    def median(who: str, where: str) -> str:
        return ", ".join(f"{name} {numbers[f'{name}, {where}'][who]['iterations'] or 'never'}" for name in METHODS)

    apart = {name: numbers[f"{name}, different wells"] for name in METHODS}
    slower = (apart["EAGD"]["best"]["share"], -(apart["EAGD"]["best"]["iterations"] or math.inf)) < (
        apart["LGD"]["best"]["share"],
        -(apart["LGD"]["best"]["iterations"] or math.inf),
    )
    row = Row(
        "averaging workers that descend to different minima slows them; the leader is not slowed",
        "abstract (ii)",
        COMMAND,
        f"median iterations to f <= {level:g} in four wells, best worker: {median('best', 'different wells')}; all"
        f" workers: {median('all', 'different wells')}; started in one well, best worker: {median('best', 'one well')}",
        "holds for the leader, not for its followers; tie with independent workers" if slower else "fails",
    )
    return Findings([row], curves, numbers)


def _iterations(reached: np.ndarray) -> int | None:
    """Median first iteration at which the level was reached; None if half of the runs never reach it."""
    median = np.median(np.where(reached.any(1), reached.argmax(1), np.inf))
    return int(median) if np.isfinite(median) else None
