"""Tasks that come with the package."""

from lsgd_jax.tasks.classification import Classification
from lsgd_jax.tasks.language import Language
from lsgd_jax.tasks.regression import Regression

__all__ = ["Classification", "Language", "Regression"]
