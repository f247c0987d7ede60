"""Texts for language models: rows of tokens, read in windows, and a generated language of known entropy."""

from lsgd_jax.data.text.corpora import Corpus, Windows, load
from lsgd_jax.data.text.dialects import Dialects

__all__ = ["Corpus", "Dialects", "Windows", "load"]
