"""Default without a download: MNIST-1D, a small 1-D convolutional network, 2 groups of 4 workers.

    lsgd train mnist1d

A Python package generates the data, which have a real generalization gap.
"""

from lsgd_jax.config import Config
from lsgd_jax.tasks import Classification

CONFIGS: dict[str, Config] = {
    "mnist1d": Config(
        task=Classification(dataset="mnist1d", model="conv1d"),
        steps=4000,
        learning_rate=0.1,
        learning_rate_drops=(0.7,),
        weight_decay=1e-3,
    )
}
