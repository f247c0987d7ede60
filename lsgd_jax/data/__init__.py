"""Data sets and input pipelines."""

from lsgd_jax.data.descriptions import DESCRIPTIONS, Description
from lsgd_jax.data.examples import BlankStream, Data, Stream, blank, count, hold_out
from lsgd_jax.data.feeds import Feed, InMemory, Streamed, feed_of
from lsgd_jax.data.preprocessing import Preprocessing
from lsgd_jax.data.sources import Dataset, load
from lsgd_jax.data.streams import BatchIndices, Stretch

__all__ = [
    "DESCRIPTIONS",
    "BatchIndices",
    "BlankStream",
    "Data",
    "Dataset",
    "Description",
    "Feed",
    "InMemory",
    "Preprocessing",
    "Stream",
    "Streamed",
    "Stretch",
    "blank",
    "count",
    "feed_of",
    "hold_out",
    "load",
]
