"""What the claims share: sample sizes, findings and starting points."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.paper import directions
from lsgd_jax.paper.objectives import Quadratic

COMMAND = "lsgd figure theory"
Z = 1.96
"""Half-width of a 95 % interval in standard errors."""


class Sizes(NamedTuple):
    """Sample sizes of the measurements."""

    starts: int = 2000
    """Starts of Newton's method for stationary points, and of the descents into wells."""
    points: int = 8
    """Level sets of a quadratic at which one step is measured."""
    samples: int = 100
    """Noise samples per expectation of one step."""
    replicas: int = 32
    """Descents per expectation, each on a different quadratic."""
    steps: int = 3000
    """Steps of decreasing size."""
    candidates: int = 100_000
    """Candidate leaders sampled per point."""
    runs: int = 2000
    """Runs from random starts on the rings."""


class Row(NamedTuple):
    """Row of the table of claims."""

    claim: str
    place: str
    """Where the paper makes the claim."""
    command: str
    measured: str
    verdict: str


class Curve(NamedTuple):
    """Plotted curve: y against x, with an optional interval and bound."""

    panel: str
    series: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    bound: np.ndarray | None = None


class Findings(NamedTuple):
    """Result of measuring a claim."""

    rows: list[Row]
    curves: list[Curve]
    numbers: dict[str, Any]


def verdict(holds: bool, *, fails_outside: bool) -> str:
    """Verdict on a bound, from whether it holds under its conditions and whether it fails outside them."""
    if not holds:
        return "fails"
    return "holds where promised, fails outside" if fails_outside else "holds"


def sample_starts(
    problem: Quadratic, key: PRNGKeyArray, levels: np.ndarray, workers: int
) -> Float[Array, "levels workers d"]:
    """Sample workers uniformly below each level of a quadratic."""

    def below(key: PRNGKeyArray, level: Array) -> Array:
        direction = jnp.ones_like(problem.minimizer)
        length = jnp.sqrt(level / problem.value(problem.minimizer + direction))
        return directions.sample_candidates(key, problem, problem.minimizer + length * direction, workers)

    return jax.vmap(below)(jax.random.split(key, len(levels)), jnp.asarray(levels))
