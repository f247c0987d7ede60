"""The paper's claims, one file per claim: its measurement and its verdict."""

from collections.abc import Callable

from lsgd_jax.paper.claims import (
    decreasing_steps,
    one_step,
    stationary_points,
    step_directions,
    stochastic_leader,
    symmetry,
    wells,
)
from lsgd_jax.paper.claims.base import Findings, Sizes

CLAIMS: dict[str, Callable[[Sizes], Findings]] = {
    "stationary points": stationary_points.measure,
    "one step": one_step.measure,
    "decreasing steps": decreasing_steps.measure,
    "stochastic leader": stochastic_leader.measure,
    "step directions": step_directions.measure,
    "wells": wells.measure,
    "symmetry": symmetry.measure,
}
"""Claims measured by computation; `comparisons` reads those about networks from finished comparisons."""
