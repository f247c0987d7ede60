"""Comparisons of methods with identical initialization, data and data order, over several seeds."""

from lsgd_jax.compare.comparison import compare, configs_of
from lsgd_jax.compare.results import curves, hyperparameters
from lsgd_jax.compare.table import show

__all__ = ["compare", "configs_of", "curves", "hyperparameters", "show"]
