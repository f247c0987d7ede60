"""What the networks are made of."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lsgd_jax.models.convolution import convolve

Conv = partial(nnx.Conv, conv_general_dilated=convolve)
"""`flax.nnx.Conv`, fast on a CPU too."""

BatchNorm = partial(nnx.BatchNorm, momentum=0.9)
"""`flax.nnx.BatchNorm`; a batch makes a tenth of the running statistics."""

he_normal = nnx.initializers.he_normal()
"""Keeps the variance through rectified layers (He et al. 2015, https://arxiv.org/abs/1502.01852)."""


def scaled(size: int, width: float) -> int:
    """A layer's published size times `width`, rounded, at least 1."""
    return max(1, round(size * width))


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch half_height half_width channels"]:
    """The maxima of 2 x 2 squares; an odd row or column at the end falls away, but a side of 1 stays as it is.

    On a CPU, the maximum of slices and its gradient are several times faster than `flax.nnx.max_pool`, of equal value.
    """
    if x.shape[1] > 1:
        end = x.shape[1] // 2 * 2
        x = jnp.maximum(x[:, 0:end:2], x[:, 1:end:2])
    if x.shape[2] > 1:
        end = x.shape[2] // 2 * 2
        x = jnp.maximum(x[:, :, 0:end:2], x[:, :, 1:end:2])
    return x
