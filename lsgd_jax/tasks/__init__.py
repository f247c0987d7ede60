"""Tasks that come with the package."""

from lsgd_jax.tasks.classification import Classification

__all__ = ["Classification"]
