"""A smoke test of a few seconds: scikit-learn's digits, a multilayer perceptron, 2 groups of 4 workers.

    lsgd train digits

The data are easy: this checks that training works, not which method is better.
"""

from lsgd_jax.config import Config
from lsgd_jax.tasks import Classification

CONFIGS: dict[str, Config] = {
    "digits": Config(
        task=Classification(dataset="digits", model="mlp"), steps=300, learning_rate=0.1, batch_size=16, eval_every=50
    )
}
