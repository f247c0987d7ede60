"""The embedded default: MNIST-1D, a small 1-D convolutional net, 2 groups of 4 workers.

    lsgd train mnist1d

The data are made by their package, without a download, and have a real generalisation gap.
"""

from lsgd_jax.config import Config

CONFIGS: dict[str, Config] = {
    "mnist1d": Config(
        dataset="mnist1d", model="conv1d", steps=4000, learning_rate=0.1, learning_rate_drops=(0.7,), weight_decay=1e-3
    )
}
