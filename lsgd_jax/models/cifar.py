"""Convolutional networks without shortcuts, for CIFAR-10."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lsgd_jax.models.layers import BatchNorm, Conv, he_normal, max_pool, scaled


class CNN7(nnx.Module):
    """Seven-layer CNN of the EASGD and LSGD experiments, for 28 x 28 images.

    Unpadded convolutions of 5 x 5 x 64, 5 x 5 x 128 and 3 x 3 x 64 with ReLUs and two max pools, a dense layer of 256
    units, dropout of 1/2, and a dense output layer. Its source is Zhang, Choromanska, LeCun, "Deep learning
    with Elastic Averaging SGD", https://arxiv.org/abs/1412.6651, with the sizes of https://arxiv.org/abs/1905.10395.
    Kernels have LeCun initialization (variance 1 / inputs): with He initialization, of twice the variance, gradients
    without normalization are too large for the paper's learning rates.

    Args:
      shape: shape of an example, (height, width, channels).
      classes: number of classes.
      width: width multiplier relative to the published architecture.
      dtype: dtype of the computation; parameters and logits are float32.
      rngs: random number generators; `params` initializes the parameters.

    Raises:
      ValueError: if the images are too small for the layers.
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
        *sides, channels = shape
        if min(sides) < 24:
            raise ValueError(f"CNN7 needs images of at least 24 x 24 pixels, got {sides[0]} x {sides[1]}.")
        self.convolutions: nnx.List = nnx.List([])
        for size, taps in ((64, 5), (128, 5), (64, 3)):
            size = scaled(size, width)
            self.convolutions.append(Conv(channels, size, (taps, taps), padding="VALID", dtype=dtype, rngs=rngs))
            channels = size
        height, breadth = (((side - 4) // 2 - 4) // 2 - 2 for side in sides)
        units = scaled(256, width)
        self.dense = nnx.Linear(height * breadth * channels, units, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.out = nnx.Linear(units, classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch classes"]:
        """Compute logits; training mode needs `rngs` for dropout."""
        first, second, third = self.convolutions
        # Pool and ReLU commute: after the pool, the ReLU has a quarter of the work.
        x = jax.nn.relu(max_pool(first(x)))
        x = jax.nn.relu(max_pool(second(x)))
        x = jax.nn.relu(third(x))
        x = jax.nn.relu(self.dense(x.reshape(len(x), -1)))
        return self.out(self.dropout(x, rngs=rngs)).astype(jnp.float32)


class VGG16(nnx.Module):
    """VGG network, configuration D, with batch normalization and two hidden dense layers of 512 units.

    Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition",
    https://arxiv.org/abs/1409.1556. Thirteen 3 x 3 convolutions, a max pool after the 2nd, 4th, 7th, 10th and 13th. A
    side of a single pixel is not pooled further, so 28 x 28 images end at 1 x 1, as 32 x 32 images do.

    Args:
      shape: shape of an example, (height, width, channels).
      classes: number of classes.
      width: width multiplier relative to the published architecture.
      dtype: dtype of the computation; parameters, statistics and logits are float32.
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
        *sides, channels = shape
        self.stages: nnx.List = nnx.List([])
        for size, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            stage: nnx.List = nnx.List([])
            for _ in range(depth):
                outputs = scaled(size, width)
                convolution = Conv(channels, outputs, (3, 3), dtype=dtype, kernel_init=he_normal, rngs=rngs)
                channels = outputs
                stage.append(nnx.List([convolution, BatchNorm(channels, dtype=dtype, rngs=rngs)]))
            self.stages.append(stage)
            sides = [max(1, side // 2) for side in sides]
        units = scaled(512, width)
        self.hidden = nnx.List(
            nnx.Linear(size, units, dtype=dtype, kernel_init=he_normal, rngs=rngs)
            for size in (sides[0] * sides[1] * channels, units)
        )
        self.dropout = nnx.Dropout(0.5)
        self.out = nnx.Linear(units, classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch classes"]:
        """Compute logits; training mode needs `rngs` for dropout."""
        for stage in self.stages:
            for convolution, norm in stage:
                x = jax.nn.relu(norm(convolution(x)))
            x = max_pool(x)
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = self.dropout(jax.nn.relu(layer(x)), rngs=rngs)
        return self.out(x).astype(jnp.float32)
