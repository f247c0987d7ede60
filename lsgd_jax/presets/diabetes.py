"""A regression of a few seconds: scikit-learn's diabetes, a network with one hidden layer, 2 groups of 4 workers.

    lsgd train diabetes

A linear model leaves about half of the variance unexplained.
"""

from lsgd_jax.config import Config
from lsgd_jax.tasks import Regression

CONFIGS: dict[str, Config] = {
    "diabetes": Config(
        task=Regression(), steps=300, learning_rate=0.01, weight_decay=1e-3, batch_size=16, eval_every=50
    )
}
