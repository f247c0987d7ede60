"""Training in step: setup, loop, evaluation, checkpoints."""

from lsgd_jax.train.loop import train_and_evaluate

__all__ = ["train_and_evaluate"]
