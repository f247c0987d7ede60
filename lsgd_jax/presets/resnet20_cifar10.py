"""Figures 5 and 8: ResNet20 on CIFAR-10, 4 workers in one group and 16 in four.

    lsgd data prepare cifar10
    lsgd compare resnet20-cifar10-4 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
    lsgd compare resnet20-cifar10-16 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
    lsgd figure F5
    lsgd figure F8

Read off the paper, the final test error of the center is about 9.3 % for all methods with 4 workers; 9.0 % for LSGD,
9.8 % for SGD, 10.0 % for EASGD and 11.5 % for DOWNPOUR with 16. With 4 workers, LSGD's workers led 34, 38, 48 and 62
of 182 times.

With 4 workers, the number of steps is that of Figure 8, 182 x 1024 in total; with 16, each takes half as many. The
paper drops the learning rate by wall-clock time, at 1500 seconds:
`--learning-rate-drops 1500 --learning-rate-drops-in seconds`.
"""

from lsgd_jax.config import Config
from lsgd_jax.presets.cifar10 import cifar10

CONFIGS: dict[str, Config] = {
    "resnet20-cifar10-4": cifar10("resnet20", groups=1, steps=46_592, learning_rate_drops=(0.75,)),
    "resnet20-cifar10-16": cifar10("resnet20", groups=4, steps=23_296, learning_rate_drops=(0.75,)),
}
