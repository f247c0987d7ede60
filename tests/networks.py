"""A network that is quick to compile."""

import dataclasses

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
