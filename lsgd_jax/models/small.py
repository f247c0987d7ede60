"""Networks for the embedded data sets."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lsgd_jax.models.layers import Conv, scaled


class Conv1D(nnx.Module):
    """1-D CNN for signals such as MNIST-1D: three strided convolutions of 64 channels and a dense layer.

    Args:
      shape: shape of an example, (length, channels).
      classes: number of classes.
      width: width multiplier relative to the published architecture.
      dtype: dtype of the computation; parameters and logits are float32.
      rngs: random number generators; `params` initializes the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        width: float = 1.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        length, channels = shape
        self.convolutions: nnx.List = nnx.List([])
        for taps in (5, 3, 3):
            self.convolutions.append(Conv(channels, scaled(64, width), (taps,), strides=2, dtype=dtype, rngs=rngs))
            channels, length = scaled(64, width), -(-length // 2)
        self.out = nnx.Linear(length * channels, classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch length channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch classes"]:
        """Compute logits."""
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.out(x.reshape(len(x), -1)).astype(jnp.float32)


class MLP(nnx.Module):
    """Multilayer perceptron with two hidden layers of 64 units, for examples of any shape.

    Args:
      shape: shape of an example.
      classes: number of classes.
      width: width multiplier relative to the published architecture.
      dtype: dtype of the computation; parameters and logits are float32.
      rngs: random number generators; `params` initializes the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        width: float = 1.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        units = scaled(64, width)
        sizes = (math.prod(shape), units)
        self.hidden = nnx.List([nnx.Linear(size, units, dtype=dtype, rngs=rngs) for size in sizes])
        self.out = nnx.Linear(units, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch ..."], *, rngs: nnx.Rngs | None = None) -> Float[Array, "batch classes"]:
        """Compute logits."""
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.out(x).astype(jnp.float32)
