"""Training: setup, the synchronous and the asynchronous loop, recording, evaluation, checkpointing, resuming."""

from lsgd_jax.train.loop import train_and_evaluate

__all__ = ["train_and_evaluate"]
