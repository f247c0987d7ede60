"""Exchanges of workers in virtual time, by the methods themselves."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lsgd_jax.exchange import NOBODY
from lsgd_jax.methods import METHODS
from lsgd_jax.train.step import leaders_in

_AXIS = "worker"
SIMULATED = (
    "period",
    "pull",
    "center_pull",
    "global_pull",
    "global_period",
    "window",
    "broadcast",
    "kappa",
    "outer_learning_rate",
    "outer_momentum",
)
"""Options of methods with which training is simulated."""


@functools.cache
def reported(center: Callable[[optax.Params, Any, Any], optax.Params]) -> Callable:
    """From lists of the workers' parameters and of what they keep to the evaluated model."""

    @jax.jit
    def report(*lists: list[Any]) -> optax.Params:
        params, kept = (jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in lists)
        of_each = jax.vmap(lambda x, state: center(x, state, _AXIS), axis_name=_AXIS)(params, kept)
        return jax.tree.map(lambda x: x[0], of_each)

    return report


class Exchange(NamedTuple):
    """Exchanges of workers among each other."""

    init: Callable[[optax.Params], Any]
    """From a worker's parameters to what it keeps before the first exchange."""
    meet: Callable[..., tuple[list[optax.Params], list[Any], Array]]
    """From lists of the workers' parameters, of their scores and of what they keep to lists of the moved parameters and
    of what they keep then, and who led."""


@functools.cache
def exchanges_of(method: str, options: tuple[tuple[str, Any], ...]) -> Exchange:
    """The exchanges of a method with these options; where leaders are elected, by the latest scores."""
    own = {"period": 1} | ({"window": 1} if METHODS[method].elects else {})
    given = {name: value for name, value in options if name in SIMULATED}
    return _together(METHODS[method].build(optax.identity(), axis_name=_AXIS, **given | own))


def _together(tx: optax.GradientTransformationExtraArgs) -> Exchange:
    def one(x: optax.Params, score: Array, state: Any) -> tuple[optax.Params, Any, Array]:
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, x), state, x, value=score)
        leaders = leaders_in(state)
        return optax.apply_updates(x, updates), state, jnp.array(NOBODY) if leaders is None else leaders.positions[-1]

    @jax.jit
    def meet(params: list[optax.Params], scores: list[Array], states: list[Any]) -> tuple[list, list, Array]:
        stacked, kept = (jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (params, states))
        of_scores = jnp.stack([jnp.reshape(score, ()) for score in scores])
        moved, kept, positions = jax.vmap(one, axis_name=_AXIS)(stacked, of_scores, kept)
        apart = [jax.tree.map(lambda x, i=i: x[i], (moved, kept)) for i in range(len(params))]
        return [x for x, _ in apart], [state for _, state in apart], positions[0]

    return Exchange(jax.jit(tx.init), meet)
