"""Flax NNX networks: they take a batch of examples, channels last, and return logits."""

from collections.abc import Callable

from flax import nnx

from lsgd_jax.models.adapted import Adapted
from lsgd_jax.models.cifar import CNN7, VGG16
from lsgd_jax.models.resnet import ResNet20, ResNet50
from lsgd_jax.models.small import MLP, Conv1D

__all__ = ["BATCH_NORM", "CNN7", "MLP", "MODELS", "VGG16", "Adapted", "Conv1D", "ResNet20", "ResNet50"]

MODELS: dict[str, tuple[Callable[..., nnx.Module], int | None]] = {
    "conv1d": (Conv1D, 2),
    "mlp": (MLP, None),
    "cnn7": (CNN7, 3),
    "vgg16": (VGG16, 3),
    "resnet20": (ResNet20, 3),
    "resnet50": (ResNet50, 3),
}
"""Network classes by name, each with the number of dimensions of its examples (None: any).

The constructor takes an example's shape, the number of classes, the width multiplier `width`, the `dtype` of the
computation and `rngs`. Calls take `rngs=`, which dropout layers sample from in training mode."""
BATCH_NORM = ("vgg16", "resnet20", "resnet50")
"""Networks with batch normalization, and thus with batch statistics."""
