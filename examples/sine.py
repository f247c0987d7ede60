"""A task of one's own, in one file: lsgd train examples/sine.py:preset --width 32."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from lsgd_jax.config import Config
from lsgd_jax.task import Data, Task


@dataclasses.dataclass(frozen=True)
class Sine(Task):
    """A network with one hidden layer learns sin(2x)."""

    width: int = 64
    """Units of the hidden layer."""

    def data(self, data_dir=None):
        """Return training and test examples: trees of arrays, examples first."""
        x = np.random.default_rng(0).uniform(-3, 3, 1024).astype(np.float32)
        return Data((x[:768], np.sin(2 * x[:768])), (x[768:], np.sin(2 * x[768:])))

    def network(self, rngs):
        """Return the network at its start."""
        return nnx.Sequential(nnx.Linear(1, self.width, rngs=rngs), jax.nn.tanh, nnx.Linear(self.width, 1, rngs=rngs))

    def measures(self, network, examples):
        """Return a number per example, by name; the mean of "loss" is what workers minimize."""
        x, y = examples
        return {"loss": (network(x[:, None])[:, 0] - y) ** 2}


preset = Config(task=Sine(), steps=400, learning_rate=0.02, batch_size=16, groups=1, workers=4)
