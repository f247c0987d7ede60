"""The paper's objectives, bounds and figures, and a verdict on each of its claims."""

from collections.abc import Callable
from pathlib import Path


def analytic() -> dict[str, Callable[[Path | str], str]]:
    """Return the paper's analytic figures: functions that take the output folder and return a text summary."""
    # Matplotlib is slow to import, and training does not need it.
    from lsgd_jax.paper import matrix_completion, nonconvex, trajectories

    return {
        "trajectories": trajectories.make,
        "nonconvex": nonconvex.make,
        "matrix-completion": matrix_completion.make,
    }
