"""Preprocessing and augmentation of images, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Key, UInt8


class Preprocessing(NamedTuple):
    """Crops, flips and normalizes images inside `jax.jit`, so that they stay 8-bit until then."""

    mean: tuple[float, ...]
    """Mean per channel of intensities in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation per channel of intensities in [0, 1]."""
    crop: int | None = None
    """Side of the square crop in pixels; None for the whole image."""
    flip: bool = False
    """Whether training images are flipped horizontally with probability 1/2."""

    def training(
        self, x: UInt8[Array, "batch height width channels"], key: Key[Array, ""]
    ) -> Float32[Array, "batch crop crop channels"]:
        """Crop each image at a random position, flip at random, and normalize.

        Args:
          x: images of one worker, without a worker axis.
          key: random key for crops and flips.
        """
        place_key, flip_key = jax.random.split(key)
        if self.crop is not None:
            spare = np.array(x.shape[1:3]) - self.crop
            places = jax.random.randint(place_key, (len(x), 2), 0, spare[None] + 1)
            x = jax.vmap(self._crop)(x, places)
        if self.flip:
            flipped = jax.random.bernoulli(flip_key, shape=(len(x), 1, 1, 1))
            x = jnp.where(flipped, x[:, :, ::-1], x)
        return self._normalize(x)

    def testing(self, x: UInt8[Array, "batch height width channels"]) -> Float32[Array, "batch crop crop channels"]:
        """Center-crop and normalize each image."""
        if self.crop is not None:
            top, left = (np.array(x.shape[1:3]) - self.crop) // 2
            x = x[:, top : top + self.crop, left : left + self.crop]
        return self._normalize(x)

    def _crop(self, image: Array, place: Array) -> Array:
        return lax.dynamic_slice(image, (*place, 0), (self.crop, self.crop, image.shape[-1]))

    def _normalize(self, x: Array) -> Array:
        mean, std = (np.array(values, np.float32).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        return (x.astype(jnp.float32) - 255 * mean) / (255 * std)


# The customary statistics of the training images; CIFAR-10's crop and flip are the paper's, https://arxiv.org/abs/1905.10395.
CIFAR10 = Preprocessing((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), crop=28, flip=True)
CIFAR100 = Preprocessing((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), crop=28, flip=True)
MNIST = Preprocessing((0.1307,), (0.3081,))
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Crops and flips happen during decoding; see `lsgd_jax.data.imagenet`."""
