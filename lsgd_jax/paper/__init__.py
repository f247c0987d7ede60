"""The paper's objectives, bounds and figures, and a verdict on each of its claims."""

from collections.abc import Callable
from pathlib import Path


def analytic() -> dict[str, Callable[[Path | str], str]]:
    """The paper's analytic figures: each takes the folder to write to and returns what it found in a few lines."""
    # Matplotlib takes its time to import, and training does without.
    from lsgd_jax.paper import matrix_completion, nonconvex, trajectories

    return {
        "trajectories": trajectories.make,
        "nonconvex": nonconvex.make,
        "matrix-completion": matrix_completion.make,
    }
