"""What the claims share: how much is measured, and what is found."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.paper import directions
from lsgd_jax.paper.objectives import Quadratic

COMMAND = "lsgd figure theory"
Z = 1.96
"""Standard errors in half a 95 % interval."""


class Sizes(NamedTuple):
    """How much is measured."""

    starts: int = 2000
    """Newton's method is started from, for stationary points; also the descents into wells."""
    points: int = 8
    """At which levels of a quadratic one step is measured."""
    draws: int = 100
    """Of a step's noise, in an expectation."""
    replicas: int = 32
    """Descents in an expectation, each on a quadratic of its own."""
    steps: int = 3000
    """With decreasing sizes."""
    candidates: int = 100_000
    """Leaders drawn at a point."""
    runs: int = 2000
    """From random starts on the rings."""


class Row(NamedTuple):
    """A row of the table."""

    claim: str
    place: str
    """In the paper."""
    command: str
    measured: str
    verdict: str


class Curve(NamedTuple):
    """What is drawn: y against x, with an interval and a bound where there is one."""

    panel: str
    series: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    bound: np.ndarray | None = None


class Findings(NamedTuple):
    """What has been found about a claim."""

    rows: list[Row]
    curves: list[Curve]
    numbers: dict[str, Any]


def verdict(holds: bool, *, fails_outside: bool) -> str:
    """The verdict on a bound: whether it holds where it is promised, and whether it fails elsewhere."""
    if not holds:
        return "fails"
    return "holds where promised, fails outside" if fails_outside else "holds"


def sample_starts(
    problem: Quadratic, key: PRNGKeyArray, levels: np.ndarray, workers: int
) -> Float[Array, "levels workers d"]:
    """Workers at random below each level of a quadratic."""

    def below(key: PRNGKeyArray, level: Array) -> Array:
        towards = jnp.ones_like(problem.minimiser)
        length = jnp.sqrt(level / problem.value(problem.minimiser + towards))
        return directions.sample_candidates(key, problem, problem.minimiser + length * towards, workers)

    return jax.vmap(below)(jax.random.split(key, len(levels)), jnp.asarray(levels))
