"""A generated language whose lowest possible loss is known: dialects of a Markov chain of order 2."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8


class Dialects:
    """Several Markov chains of order 2 over the same symbols, one per dialect.

    In each dialect every pair of symbols has an order of all symbols of its own, and the r-th in it follows the pair
    with the probability of Zipf's law,

        p_r = r^-s / sum_k k^-s.

    A document is in one dialect, which its reader has to infer. Within a known dialect, the entropy rate is the entropy
    of p; no predictor can have a lower loss in the long run. `best_loss` is that of the best predictor on given
    documents: Bayes' mixture of the dialects, which starts with all of them equally likely.

    Args:
      symbols: number of symbols, at most 256.
      dialects: number of dialects.
      exponent: Zipf's s; the larger, the lower the entropy.
      seed: random seed of the orders.

    Example:
      >>> language = Dialects()
      >>> print(round(language.entropy_rate, 3))
      1.86
      >>> language.documents([0, 0, 3], length=5, seed=1).shape
      (3, 5)
    """

    def __init__(self, symbols: int = 16, dialects: int = 4, exponent: float = 1.5, seed: int = 0) -> None:
        self.symbols, self.dialects = symbols, dialects
        weights = np.arange(1, symbols + 1) ** -float(exponent)
        self._probabilities: Float[np.ndarray, " symbols"] = weights / weights.sum()
        orders = np.tile(np.arange(symbols), (dialects, symbols, symbols, 1))
        self._orders = np.random.default_rng(seed).permuted(orders, axis=-1)  # [dialect, last but one, last, rank]
        self._ranks = np.argsort(self._orders, -1)  # [dialect, last but one, last, symbol]

    @property
    def entropy_rate(self) -> float:
        """Entropy of a symbol within a known dialect, given all before it, in nats."""
        return float(-(self._probabilities * np.log(self._probabilities)).sum())

    def documents(
        self, dialects: Sequence[int] | Int[np.ndarray, " documents"], length: int, seed: int
    ) -> UInt8[np.ndarray, "documents length"]:
        """Sample documents.

        Args:
          dialects: the dialect of each document.
          length: number of symbols per document, at least 2; the first two are uniform.
          seed: random seed of the symbols.
        """
        rng, dialects = np.random.default_rng(seed), np.asarray(dialects)
        text = np.empty((length, len(dialects)), np.uint8)
        text[:2] = rng.integers(self.symbols, size=(2, len(dialects)))
        for t in range(2, length):
            ranks = rng.choice(self.symbols, size=len(dialects), p=self._probabilities)
            text[t] = self._orders[dialects, text[t - 2], text[t - 1], ranks]
        return np.ascontiguousarray(text.T)

    def best_loss(self, documents: UInt8[np.ndarray, "documents length"]) -> float:
        """Mean loss of the best predictor of all symbols but the first of each document, in nats."""
        before, last, following = documents[:, :-2], documents[:, 1:-1], documents[:, 2:]
        ranks = self._ranks[:, before, last, following]  # [dialect, document, time]
        log_likelihoods = np.log(self._probabilities)[ranks].sum(-1)
        log_evidence = np.logaddexp.reduce(log_likelihoods - np.log(self.dialects))
        total = log_evidence - np.log(self.symbols)  # The second symbol is uniform.
        return float(-total.mean() / (documents.shape[1] - 1))
