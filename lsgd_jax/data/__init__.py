"""Data sets and how they reach the workers."""

from lsgd_jax.data.sources import Dataset, hold_out, load
from lsgd_jax.data.streams import BatchIndices

__all__ = ["BatchIndices", "Dataset", "hold_out", "load"]
