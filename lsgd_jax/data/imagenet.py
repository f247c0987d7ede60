"""ImageNet, whose images are decoded while the workers train.

Images are 8-bit, for `lsgd_jax.data.preprocessing.IMAGENET`.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from lsgd_jax.data.examples import Stream
from lsgd_jax.data.preparation import encoded_examples

Images = tuple[UInt8[np.ndarray, "examples size size 3"], Int32[np.ndarray, " examples"]]


class ImageNet(Stream):
    """Images of one split, with labels: cropped and flipped at random for training, center-cropped for testing."""

    def __init__(self, split: str, image_size: int = 224, data_dir: Path | str | None = None) -> None:
        """Open the split.

        Args:
          split: "train" or "validation".
          image_size: side of the square images in pixels.
          data_dir: folder in which imagenet2012 is prepared; by default TFDS_DATA_DIR or ~/tensorflow_datasets.

        Raises:
          UsageError: if the data set is not prepared.
        """
        self._source, self._image_size = encoded_examples("imagenet2012", split, data_dir), image_size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._source)

    def read(self, indices: Int[np.ndarray, " examples"]) -> Images:
        """Return images, center-cropped, and labels."""
        return self._decoded(indices, [_central_crop] * len(indices))

    def sample(self, indices: Int[np.ndarray, " examples"], rngs: Iterator[np.random.Generator]) -> Images:
        """Return images, cropped and flipped at random, and labels."""
        return self._decoded(indices, [partial(_random_crop, rng=rng) for rng in rngs])

    def _decoded(self, indices: Int[np.ndarray, " examples"], crops: Sequence[Callable]) -> Images:
        x = np.empty((len(indices), self._image_size, self._image_size, 3), np.uint8)
        y = np.empty(len(indices), np.int32)
        examples = self._source.__getitems__(indices.tolist())
        for i, (example, crop) in enumerate(zip(examples, crops, strict=True)):
            x[i], y[i] = crop(example["image"], self._image_size), example["label"]
        return x, y


def _random_crop(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop 8 % to 100 % of the area with an aspect ratio of 3:4 to 4:3, resize, and flip with probability 1/2."""
    image = Image.open(io.BytesIO(encoded))
    flipped = rng.random() < 0.5
    for _ in range(10):  # Crops that don't fit are resampled.
        area = rng.uniform(0.08, 1) * image.width * image.height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = (int(rng.integers(spare + 1)) for spare in (image.width - width, image.height - height))
            x = _scaled(image, (left, top, left + width, top + height), size)
            return x[:, ::-1] if flipped else x
    return _central_crop(encoded, size)


def _central_crop(encoded: bytes, size: int) -> np.ndarray:
    """Crop the central square, 224/256 of the shorter side, and resize."""
    image = Image.open(io.BytesIO(encoded))
    side = min(image.size) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _scaled(image, (left, top, left + side, top + side), size)


def _scaled(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))
