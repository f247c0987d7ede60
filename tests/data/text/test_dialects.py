"""The generated language: its entropy, and the best loss against Bayes' rule, symbol by symbol."""

import itertools
import math

import numpy as np
import pytest

from lsgd_jax.data.text import Dialects

SMALL = Dialects(symbols=3, dialects=2, exponent=1.0, seed=1)


def zipf(symbols, exponent):
    weights = [rank**-exponent for rank in range(1, symbols + 1)]
    return [weight / sum(weights) for weight in weights]


def bayes_loss(language, document, exponent):
    """The mean loss of a reader who weighs dialects by how well they have predicted so far."""
    probabilities, orders = zipf(language.symbols, exponent), language._orders
    posterior, losses = [1 / language.dialects] * language.dialects, [math.log(language.symbols)]
    for before, last, now in zip(document, document[1:], document[2:], strict=False):
        of_dialects = [probabilities[list(order[before, last]).index(now)] for order in orders]
        predicted = sum(p * q for p, q in zip(posterior, of_dialects, strict=True))
        posterior = [p * q / predicted for p, q in zip(posterior, of_dialects, strict=True)]
        losses.append(-math.log(predicted))
    return sum(losses) / len(losses)


def test_the_entropy_rate_is_that_of_zipf_s_law():
    expected = -sum(p * math.log(p) for p in zipf(16, 1.5))
    assert Dialects().entropy_rate == pytest.approx(expected)
    assert round(expected, 3) == 1.86


def test_the_best_loss_is_that_of_bayes_rule():
    documents = SMALL.documents([0, 1, 1, 0], length=9, seed=3)
    expected = np.mean([bayes_loss(SMALL, document.tolist(), exponent=1.0) for document in documents])
    assert SMALL.best_loss(documents) == pytest.approx(expected)


def test_the_best_predictor_is_a_probability_of_all_documents():
    documents = np.array(list(itertools.product(range(3), repeat=5)), np.uint8)
    total = sum(math.exp(-4 * SMALL.best_loss(document[None])) for document in documents)
    assert total == pytest.approx(3)  # The first symbol is given.


def test_pairs_have_orders_of_their_own_in_each_dialect():
    orders = Dialects()._orders.reshape(-1, 16)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(16), (len(orders), 1)))
    assert len(np.unique(orders, axis=0)) == len(orders)


def test_documents_are_in_the_dialects_asked_for_and_at_their_entropy():
    language = Dialects(symbols=8, dialects=2)
    documents = language.documents([0] * 40, length=500, seed=0)
    assert documents.dtype == np.uint8
    one = Dialects(symbols=8, dialects=1)
    one._ranks, one._orders = language._ranks[:1], language._orders[:1]
    other = Dialects(symbols=8, dialects=1)
    other._ranks, other._orders = language._ranks[1:], language._orders[1:]
    rate = (498 * language.entropy_rate + math.log(8)) / 499  # The second symbol is uniform.
    assert one.best_loss(documents) == pytest.approx(rate, rel=0.01)
    assert other.best_loss(documents) > 1.2 * rate
    assert (
        one.best_loss(documents) < language.best_loss(documents) < one.best_loss(documents) + math.log(2) / 499 + 1e-9
    )


def test_documents_are_the_same_for_the_same_seed():
    language = Dialects()
    first, again, other = (language.documents([1, 2], length=30, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
