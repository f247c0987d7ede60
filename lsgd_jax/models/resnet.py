"""Residual networks: He, Zhang, Ren, Sun, "Deep residual learning for image recognition".

https://arxiv.org/abs/1512.03385. A block computes y = relu(shortcut(x) + f(x)).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lsgd_jax.models.layers import BatchNorm, Conv, he_normal, scaled


class ResNet20(nnx.Module):
    """ResNet-20 for CIFAR-10, with 0.27 million parameters.

    A 3 x 3 convolution and three stages of three blocks with 16, 32 and 64 channels; the second and the third stage
    start by halving the resolution. Shortcuts have no parameters (option A): where the shape changes, they subsample
    rows and columns and pad the channels with zeros.

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
        channels = scaled(16, width)
        self.stem = _NormedConv(shape[-1], channels, 3, dtype=dtype, rngs=rngs)
        self.blocks: nnx.List = nnx.List([])
        for size, stride in ((16, 1), (32, 2), (64, 2)):
            for strides in (stride, 1, 1):
                self.blocks.append(_Basic(channels, scaled(size, width), strides, dtype=dtype, rngs=rngs))
                channels = scaled(size, width)
        self.out = nnx.Linear(channels, classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch classes"]:
        """Compute logits."""
        x = jax.nn.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2))).astype(jnp.float32)


class ResNet50(nnx.Module):
    """ResNet-50 for ImageNet, with 25.6 million parameters.

    A 7 x 7 convolution, a max pool, and four stages of 3, 4, 6 and 3 bottleneck blocks, whose narrow layers have 64,
    128, 256 and 512 channels. Shortcuts are convolutions where the shape changes. A block halves the resolution in its
    3 x 3 convolution (version 1.5), not in the 1 x 1 before it, which would skip three quarters of its input. All
    batch-norm scales start at 1, as published; some recipes start the last one of each block at 0.

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
        channels = scaled(64, width)
        self.stem = _NormedConv(shape[-1], channels, 7, 2, dtype=dtype, rngs=rngs)
        self.blocks: nnx.List = nnx.List([])
        for size, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for strides in (stride, *(depth - 1) * (1,)):
                self.blocks.append(_Bottleneck(channels, scaled(size, width), strides, dtype=dtype, rngs=rngs))
                channels = 4 * scaled(size, width)
        self.out = nnx.Linear(channels, classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch classes"]:
        """Compute logits."""
        x = jax.nn.relu(self.stem(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((1, 2))).astype(jnp.float32)


class _NormedConv(nnx.Module):
    """Convolution, padded by half its size, with batch normalization."""

    def __init__(
        self, inputs: int, outputs: int, taps: int, strides: int = 1, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.convolution = Conv(
            inputs,
            outputs,
            (taps, taps),
            strides=strides,
            padding=taps // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=he_normal,
            rngs=rngs,
        )
        self.norm = BatchNorm(outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.convolution(x))


class _Basic(nnx.Module):
    """Basic block: two 3 x 3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, strides: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        self.strides, self.extra_channels = strides, outputs - inputs
        self.first = _NormedConv(inputs, outputs, 3, strides, dtype=dtype, rngs=rngs)
        self.second = _NormedConv(outputs, outputs, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        shortcut = x[:, :: self.strides, :: self.strides]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, self.extra_channels)))
        return jax.nn.relu(shortcut.astype(x.dtype) + self.second(jax.nn.relu(self.first(x))))


class _Bottleneck(nnx.Module):
    """Bottleneck block: 1 x 1, 3 x 3 and 1 x 1 convolutions, the last with four times the channels, and a shortcut."""

    def __init__(self, inputs: int, narrow: int, strides: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        outputs = 4 * narrow
        self.first = _NormedConv(inputs, narrow, 1, dtype=dtype, rngs=rngs)
        self.second = _NormedConv(narrow, narrow, 3, strides, dtype=dtype, rngs=rngs)
        self.third = _NormedConv(narrow, outputs, 1, dtype=dtype, rngs=rngs)
        changes = strides != 1 or inputs != outputs
        self.shortcut = nnx.data(_NormedConv(inputs, outputs, 1, strides, dtype=dtype, rngs=rngs) if changes else None)

    def __call__(self, x: Array) -> Array:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(shortcut + self.third(jax.nn.relu(self.second(jax.nn.relu(self.first(x))))))
