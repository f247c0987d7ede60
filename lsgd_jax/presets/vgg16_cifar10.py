"""Figure 6: VGG16 on CIFAR-10, 4 workers in one group.

    lsgd data prepare cifar10
    lsgd compare vgg16-cifar10-4 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
    lsgd figure F6

Read off the paper, the final test error of the center is 9.7 % for LSGD, 9.8 % for SGD, 10.0 % for EASGD and 10.3 % for
DOWNPOUR.

The paper reports seconds instead of steps; the number of steps is this project's choice.
"""

from lsgd_jax.config import Config
from lsgd_jax.presets.cifar10 import cifar10

CONFIGS: dict[str, Config] = {
    "vgg16-cifar10-4": cifar10("vgg16", groups=1, steps=20_000, learning_rate_drops=(0.75,)),
}
