"""Data sets as arrays in memory. The embedded ones come with Python packages and need no download."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from lsgd_jax.errors import UsageError


class Dataset(NamedTuple):
    """A classification data set, examples first."""

    train_x: Float32[np.ndarray, "train ..."]
    train_y: Int32[np.ndarray, " train"]
    test_x: Float32[np.ndarray, "test ..."]
    test_y: Int32[np.ndarray, " test"]
    classes: int


def hold_out(data: Dataset, share: float) -> Dataset:
    """The data with a share of the training examples, always the same, in place of the test examples.

    Raises:
      UsageError: if that leaves no example for the one or the other.
    """
    if not 0 < round(share * len(data.train_y)) < len(data.train_y):
        raise UsageError(f"validation holds out none or all of {len(data.train_y)} examples, got {share}.")
    order = np.random.default_rng(0).permutation(len(data.train_y))
    held, kept = np.split(order, [round(share * len(order))])
    return Dataset(data.train_x[kept], data.train_y[kept], data.train_x[held], data.train_y[held], data.classes)


@functools.cache
def load(name: str) -> Dataset:
    """The data set of that name, always the same to the bit.

    Raises:
      ValueError: if there is no such data set.
    """
    if name not in _SOURCES:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(_SOURCES)}.")
    return _SOURCES[name]()


def _mnist1d() -> Dataset:
    """MNIST-1D, https://arxiv.org/abs/2011.14439: x [examples, 40, 1], with its standard split."""
    from mnist1d.data import get_dataset_args, make_dataset

    random_state = np.random.get_state()  # noqa: NPY002 - the package seeds NumPy's global generator.
    try:
        data = make_dataset(get_dataset_args())
    finally:
        np.random.set_state(random_state)  # noqa: NPY002

    def signals(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)[:, :, None]

    train_y, test_y = (data[name].astype(np.int32) for name in ("y", "y_test"))
    return Dataset(signals(data["x"]), train_y, signals(data["x_test"]), test_y, classes=10)


def _digits() -> Dataset:
    """scikit-learn's digits: x [examples, 8, 8, 1] in [0, 1]; the last fifth of a fixed shuffle is for testing."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1), y[order].astype(np.int32)
    split = len(x) * 4 // 5
    return Dataset(x[:split], y[:split], x[split:], y[split:], classes=10)


_SOURCES = {"mnist1d": _mnist1d, "digits": _digits}
