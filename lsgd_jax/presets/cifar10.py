"""What the paper's experiments on CIFAR-10 have in common.

Batches of 128 a worker, Nesterov momentum 0.9, weight decay 1e-4, leaders elected by the mean of the last 10 losses, 4
workers a group; learning rates of 0.1, 0.01 and 0.001 and exchanges among all workers every 4, 16 and 64 steps are
tried, with local ones four times as often. The strengths of the pulls are the methods' defaults, which are the paper's.
"""

from typing import Literal

from lsgd_jax.config import Config


def cifar10(
    model: Literal["cnn7", "resnet20", "vgg16"], *, groups: int, steps: int, learning_rate_drops: tuple[float, ...] = ()
) -> Config:
    """The configuration for a network and a number of groups.

    Args:
      model: the network.
      groups: of 4 workers.
      steps: of every worker.
      learning_rate_drops: fractions of the steps after which the learning rate is multiplied by 0.1.
    """
    return Config(
        dataset="cifar10",
        model=model,
        steps=steps,
        learning_rate=0.1,
        learning_rate_drops=learning_rate_drops,
        momentum=0.9,
        weight_decay=1e-4,
        batch_size=128,
        groups=groups,
        workers=4,
        period=4,
        global_period=16 if groups > 1 else None,
        window=10,
        tune_learning_rates=(0.1, 0.01, 0.001),
        tune_periods=(4, 16, 64),
        eval_every=200,
    )
