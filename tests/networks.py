"""Networks that are quick to compile or to start: one of a single layer, and any with values that NumPy draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lsgd_jax.tasks import Classification


class OneLayer(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        return self.out(x.reshape(len(x), -1))


@dataclasses.dataclass(frozen=True)
class WithOneLayer(Classification):
    """Of two arrays, so that programs are small; for the digits."""

    def network(self, rngs):
        return OneLayer(rngs)


def drawn(make):
    """The model that a function makes, its values drawn here: the models' own start takes long to compile."""
    rng = np.random.default_rng(0)
    graphdef, params, stats = nnx.split(nnx.eval_shape(make), nnx.Param, nnx.BatchStat)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), params)
    stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), stats)
    return nnx.merge(graphdef, params, stats)
