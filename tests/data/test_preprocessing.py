import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.data.preprocessing import CIFAR10, MNIST, Preprocessing

IDENTITY = {"mean": (0.0,), "std": (1 / 255,)}  # Leaves intensities in [0, 255].


def images(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def windows(image, crop):
    """All sub-windows of an image, and their mirror images, as bytes: place and whether mirrored."""
    places = {}
    for top in range(image.shape[0] - crop + 1):
        for left in range(image.shape[1] - crop + 1):
            window = image[top : top + crop, left : left + crop]
            places[window.tobytes()] = (top, left, False)
            places[window[:, ::-1].tobytes()] = (top, left, True)
    return places


@given(st.integers(0, 99), st.integers(3, 6), st.integers(3, 6), st.integers(1, 3), st.booleans())
@settings(max_examples=20)
def test_training_images_are_windows_of_their_image(seed, height, width, crop, flip):
    x = images(seed, 4, height, width, 2)
    preprocessing = Preprocessing((0.0, 0.0), (1 / 255, 1 / 255), crop=crop, flip=flip)
    out = np.asarray(preprocessing.training(x, jax.random.key(seed)))
    assert out.dtype == np.float32
    for one, image in zip(np.rint(out).astype(np.uint8), x, strict=True):
        assert one.shape == (crop, crop, 2)
        _, _, mirrored = windows(image, crop)[one.tobytes()]
        assert flip or not mirrored or crop == 1


def test_all_windows_and_mirror_images_come_about_equally_often():
    image = images(0, 5, 5, 1)
    x = np.broadcast_to(image, (1800, 5, 5, 1))
    out = Preprocessing(**IDENTITY, crop=3, flip=True).training(x, jax.random.key(0))
    places = windows(image, 3)
    seen = [places[one.tobytes()] for one in np.rint(np.asarray(out)).astype(np.uint8)]
    counts = [seen.count(place) for place in places.values()]
    assert len(counts) == 18
    assert 65 < min(counts) < max(counts) < 140


def test_training_is_that_of_numpy():
    x, key = images(1, 6, 32, 32, 3), jax.random.key(3)
    out = np.asarray(jax.jit(CIFAR10.training)(x, key))
    mean, std = np.array(CIFAR10.mean), np.array(CIFAR10.std)
    for one, image in zip(out, x, strict=True):
        intensities = np.rint((one * std + mean) * 255).astype(np.uint8)
        top, left, mirrored = windows(image, 28)[intensities.tobytes()]
        expected = image[top : top + 28, left : left + 28] / 255
        expected = (expected[:, ::-1] if mirrored else expected) - mean
        np.testing.assert_allclose(one, expected / std, rtol=0, atol=1e-5)


def test_testing_takes_the_centre():
    x = images(2, 3, 32, 32, 3)
    out = np.asarray(jax.jit(CIFAR10.testing)(x))
    expected = (x[:, 2:30, 2:30] / 255 - CIFAR10.mean) / CIFAR10.std
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_without_crop_and_flip_training_is_testing():
    x = images(3, 2, 28, 28, 1)
    out = MNIST.training(x, jax.random.key(0))
    np.testing.assert_array_equal(out, MNIST.testing(x))
    np.testing.assert_allclose(out, (x / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)


def test_the_key_decides():
    x = images(4, 8, 32, 32, 3)
    one, same, other = (np.asarray(CIFAR10.training(x, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("shape", [(1, 28, 28, 3), (1, 30, 40, 3)])
def test_images_of_other_sizes(shape):
    x = images(5, *shape)
    assert CIFAR10.training(x, jax.random.key(0)).shape == CIFAR10.testing(x).shape == (1, 28, 28, 3)
