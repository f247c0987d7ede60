"""Networks in flax.nnx, called with a batch of examples, channels last; they return logits."""

from collections.abc import Callable

from flax import nnx

from lsgd_jax.models.cifar import CNN7, VGG16
from lsgd_jax.models.resnet import ResNet20, ResNet50
from lsgd_jax.models.small import MLP, Conv1D

MODELS: dict[str, tuple[Callable[..., nnx.Module], int | None]] = {
    "conv1d": (Conv1D, 2),
    "mlp": (MLP, None),
    "cnn7": (CNN7, 3),
    "vgg16": (VGG16, 3),
    "resnet20": (ResNet20, 3),
    "resnet50": (ResNet50, 3),
}
"""By name: the class, made from an example's shape, the number of classes, `width`, which multiplies the layers' sizes,
the `dtype` of the computation and `rngs`; and the number of dimensions that an example must have, or None if it may
have any. Called with `rngs=`, from which layers with dropout draw in training mode."""
BATCH_NORM = ("vgg16", "resnet20", "resnet50")
"""Those with batch normalization, which have batch statistics."""
