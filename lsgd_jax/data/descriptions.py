"""What each data set is like, to be known without having it."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lsgd_jax.data import preprocessing
from lsgd_jax.data.preprocessing import Preprocessing


class Description(NamedTuple):
    """What is known of a data set."""

    train: int
    """Training examples."""
    test: int
    """Test examples."""
    shape: tuple[int, ...]
    """Of an example before preprocessing; of ImageNet's images, which come in all sizes, the usual one."""
    dtype: npt.DTypeLike
    """Of an example before preprocessing."""
    classes: int
    preprocessing: Preprocessing | None = None
    """What makes 8-bit images into the networks' input; None if the examples are that already."""


DESCRIPTIONS: dict[str, Description] = {
    "mnist1d": Description(4_000, 1_000, (40, 1), np.float32, 10),
    "digits": Description(1_437, 360, (8, 8, 1), np.float32, 10),
    "mnist5k": Description(4_000, 1_000, (28, 28, 1), np.uint8, 10, preprocessing.MNIST),
    "mnist": Description(60_000, 10_000, (28, 28, 1), np.uint8, 10, preprocessing.MNIST),
    "cifar10": Description(50_000, 10_000, (32, 32, 3), np.uint8, 10, preprocessing.CIFAR10),
    "cifar100": Description(50_000, 10_000, (32, 32, 3), np.uint8, 100, preprocessing.CIFAR100),
    "imagenet2012": Description(1_281_167, 50_000, (224, 224, 3), np.uint8, 1_000, preprocessing.IMAGENET),
}
"""By the data set's name."""
