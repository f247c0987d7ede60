"""Curse of symmetry: elastic averaging stalls between workers, the leader does not."""

import jax.numpy as jnp
import numpy as np

from lsgd_jax.paper import matrix_completion, nonconvex
from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes
from lsgd_jax.paper.descent import METHODS, STARTS, descend, methods
from lsgd_jax.paper.objectives import sinc_rings


def measure(sizes: Sizes, *, dimension: int = 100, ranks: tuple[int, ...] = (1, 10)) -> Findings:
    """Measure the curse of symmetry on the problems of Figures 2 and 3, the latter at a tenth of its dimension."""
    final = {
        name: np.asarray(descend(method, sinc_rings, jnp.array(STARTS), nonconvex.ITERATIONS).values[:, -1])
        for name, method in methods(nonconvex.ETA, nonconvex.PULL).items()
    }
    reached = nonconvex.random_starts(20, sizes.runs)
    # The target's scale grows with the dimension, so the step size shrinks with it.
    eta = matrix_completion.ETA * matrix_completion.DIMENSION / dimension
    completed = matrix_completion.solve(dimension, eta, ranks)
    best = {f"rank {r}": {name: float(v[:, -1].min()) for name, v in values.items()} for r, values in completed.items()}
    numbers = {
        "rings: final values": {name: values.tolist() for name, values in final.items()},
        "rings: share of workers in the global minimum": reached,
        "matrix completion: best final value": best,
    }
    rows = [
        Row(
            "rings around the global minimum: elastic averaging stalls between workers, the leader does not",
            "curse of symmetry, Figure 2",
            COMMAND,
            f"worst worker from the paper's starts: EAGD {final['EAGD'].max():.4f}, LGD {final['LGD'].max():.4f};"
            f" workers in the global minimum from {sizes.runs} random starts: "
            + ", ".join(f"{name} {reached[name]:.1%}" for name in METHODS),
            "holds"
            if final["LGD"].max() < -0.21 < final["EAGD"].min() and reached["LGD"] > reached["EAGD"]
            else "fails",
        ),
        Row(
            "matrix completion: elastic averaging stalls on plateaus, the leader descends linearly",
            "curse of symmetry, Figure 3",
            COMMAND + "; at full size lsgd figure matrix-completion",
            f"best worker after {matrix_completion.ITERATIONS} iterations, dimension {dimension}: "
            + "; ".join(f"{rank}: " + ", ".join(f"{n} {ends[n]:.0e}" for n in METHODS) for rank, ends in best.items()),
            "holds against EAGD; tie with independent workers"
            if all(ends["LGD"] < ends["EAGD"] / 100 for ends in best.values())
            else "fails",
        ),
    ]
    curves = [
        Curve("matrix completion", f"{name}, rank {rank}", np.arange(matrix_completion.ITERATIONS + 1), v.min(0))
        for rank, by_method in completed.items()
        for name, v in by_method.items()
    ]
    return Findings(rows, curves, numbers)
