"""Shared configuration of the paper's CIFAR-10 experiments.

Batches of 128 per worker, Nesterov momentum 0.9, weight decay 1e-4, leaders elected by the mean of the last 10 losses,
4 workers per group. Tuning tries learning rates of 0.1, 0.01 and 0.001 and exchanges among all workers every 4, 16 and
64 steps, with local exchanges four times as often. Pull strengths are the methods' defaults, which are the paper's.
"""

from typing import Literal

from lsgd_jax.config import Config
from lsgd_jax.tasks import Classification


def cifar10(
    model: Literal["cnn7", "resnet20", "vgg16"], *, groups: int, steps: int, learning_rate_drops: tuple[float, ...] = ()
) -> Config:
    """Return the configuration for a network and a number of groups.

    Args:
      model: network.
      groups: number of groups of 4 workers.
      steps: steps per worker.
      learning_rate_drops: fractions of the steps after which the learning rate is multiplied by 0.1.
    """
    return Config(
        task=Classification(dataset="cifar10", model=model),
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
