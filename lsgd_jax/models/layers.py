"""Layers shared by the networks."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lsgd_jax.models.convolution import convolve

Conv = partial(nnx.Conv, conv_general_dilated=convolve)
"""`flax.nnx.Conv` with a convolution that is also fast on a CPU."""

BatchNorm = partial(nnx.BatchNorm, momentum=0.9)
"""`flax.nnx.BatchNorm` with running statistics of momentum 0.9."""

he_normal = nnx.initializers.he_normal()
"""He initialization, which preserves the variance through ReLU layers (He et al. 2015, https://arxiv.org/abs/1502.01852)."""


def scaled(size: int, width: float) -> int:
    """Scale a layer's published size by `width`, rounded, to at least 1."""
    return max(1, round(size * width))


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch half_height half_width channels"]:
    """Max-pool 2 x 2 windows; an odd last row or column is dropped, but a side of 1 is kept.

    The value equals that of `flax.nnx.max_pool`; on a CPU, the maximum of slices and its gradient are several times
    faster.
    """
    if x.shape[1] > 1:
        end = x.shape[1] // 2 * 2
        x = jnp.maximum(x[:, 0:end:2], x[:, 1:end:2])
    if x.shape[2] > 1:
        end = x.shape[2] // 2 * 2
        x = jnp.maximum(x[:, :, 0:end:2], x[:, :, 1:end:2])
    return x
