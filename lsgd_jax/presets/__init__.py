"""Presets, one file per experiment; `PRESETS` maps their names to configurations."""

from lsgd_jax.config import Config
from lsgd_jax.presets import (
    cnn7_cifar10,
    cnn7_mnist5k,
    digits,
    mnist1d,
    resnet20_cifar10,
    resnet50_imagenet,
    vgg16_cifar10,
)

PRESETS: dict[str, Config] = {
    **mnist1d.CONFIGS,
    **digits.CONFIGS,
    **cnn7_mnist5k.CONFIGS,
    **cnn7_cifar10.CONFIGS,
    **resnet20_cifar10.CONFIGS,
    **vgg16_cifar10.CONFIGS,
    **resnet50_imagenet.CONFIGS,
}
