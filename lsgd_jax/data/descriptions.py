"""Sizes, shapes and preprocessing of the data sets, known without loading them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lsgd_jax.data import preprocessing
from lsgd_jax.data.preprocessing import Preprocessing


class Description(NamedTuple):
    """Metadata of a data set."""

    train: int
    """Number of training examples."""
    test: int
    """Number of test examples."""
    shape: tuple[int, ...]
    """Shape of an example before preprocessing; for ImageNet, whose images vary in size, the usual one."""
    dtype: npt.DTypeLike
    """Dtype of an example before preprocessing."""
    classes: int
    preprocessing: Preprocessing | None = None
    """Turns 8-bit images into network inputs; None if examples need no preprocessing."""


DESCRIPTIONS: dict[str, Description] = {
    "mnist1d": Description(4_000, 1_000, (40, 1), np.float32, 10),
    "mnist1d-10k": Description(4_000, 10_000, (40, 1), np.float32, 10),
    "digits": Description(1_437, 360, (8, 8, 1), np.float32, 10),
    "mnist5k": Description(4_000, 1_000, (28, 28, 1), np.uint8, 10, preprocessing.MNIST),
    "mnist": Description(60_000, 10_000, (28, 28, 1), np.uint8, 10, preprocessing.MNIST),
    "cifar10": Description(50_000, 10_000, (32, 32, 3), np.uint8, 10, preprocessing.CIFAR10),
    "cifar100": Description(50_000, 10_000, (32, 32, 3), np.uint8, 100, preprocessing.CIFAR100),
    "imagenet2012": Description(1_281_167, 50_000, (224, 224, 3), np.uint8, 1_000, preprocessing.IMAGENET),
}
"""Descriptions by data set name."""
