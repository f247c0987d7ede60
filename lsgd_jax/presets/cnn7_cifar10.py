"""Figure 4: CNN7 on CIFAR-10, 4 workers in one group and 16 in four.

    lsgd data prepare cifar10
    lsgd compare cnn7-cifar10-4 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
    lsgd compare cnn7-cifar10-16 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
    lsgd figure F4

Read off the paper, the final test error of the center is 17.5 % for LSGD, 17.6 % for EASGD, 18.5 % for DOWNPOUR and
20 % for SGD with 4 workers; 17.0 %, 17.4 %, 19 % and 20 % with 16.

The paper reports seconds instead of steps; the numbers of steps are this project's choice.
"""

from lsgd_jax.config import Config
from lsgd_jax.presets.cifar10 import cifar10

CONFIGS: dict[str, Config] = {
    "cnn7-cifar10-4": cifar10("cnn7", groups=1, steps=20_000),
    "cnn7-cifar10-16": cifar10("cnn7", groups=4, steps=10_000),
}
