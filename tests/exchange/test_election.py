"""Who is elected."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax import NOBODY, elect
from lsgd_jax.exchange import all_finite, elect_quorum
from tests.mapping import MAPPINGS, over_workers

SCORES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38])
EVERYONE = ("group", "worker")


def elected(scores, eligible):
    """The lowest finite score of an eligible worker, the first of several, in a plain loop."""
    best = NOBODY
    for i, (score, able) in enumerate(zip(scores, eligible, strict=True)):
        if able and np.isfinite(score) and (best == NOBODY or score < scores[best]):
            best = i
    return best


@jax.jit
@partial(jax.vmap, axis_name="worker")
def leader(score, eligible):
    return elect(score, "worker", eligible=eligible)


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=6))
@settings(max_examples=200)
def test_elects_the_lowest_finite_score_and_the_first_of_ties(workers):
    scores = np.array([score for score, _ in workers])
    eligible = np.array([able for _, able in workers])
    with jax.enable_x64(True):
        leaders = leader(scores, eligible)
    assert set(np.asarray(leaders)) == {elected(scores, eligible)}


@pytest.mark.optimized
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_election_is_the_same_under_every_mapping(mapping):
    scores = np.array([[np.nan, 2.0, 1.0, 1.0], [0.5, np.inf, 0.5, 3.0]], np.float32)
    local, everyone = over_workers(lambda s: (elect(s, "worker"), elect(s, EVERYONE)), mapping)(scores)
    np.testing.assert_array_equal(local, [[2] * 4, [0] * 4])
    np.testing.assert_array_equal(everyone, np.full((2, 4), 4))


all_finite_jitted = jax.jit(all_finite)


def test_nobody_leads_when_all_scores_are_infinite_or_nan():
    scores = np.array([np.nan, np.inf, -np.inf, np.nan], np.float32)
    leaders = jax.jit(jax.vmap(lambda s: elect(s, "worker"), axis_name="worker"))(scores)
    np.testing.assert_array_equal(leaders, [NOBODY] * 4)


def test_a_score_is_a_scalar():
    with pytest.raises(ValueError, match=r"one scalar score a worker, got the shape \(3,\)"):
        jax.vmap(lambda s: elect(s, "worker"), axis_name="worker")(jnp.zeros((2, 3)))


@pytest.mark.parametrize("kappa", [0.0, 0.5, 3.0, np.inf])
def test_a_quorum_is_near_the_lowest_score(kappa):
    """Sorted by hand, for scores of which some are equal and some can't be elected."""
    rng = np.random.default_rng(1)
    elect_all = jax.jit(jax.vmap(jax.vmap(lambda s, e: elect_quorum(s, "w", kappa, eligible=e), axis_name="w")))
    scores = rng.choice([0.1, 0.2, 0.4, 0.9, 2.0, np.nan, np.inf, -np.inf], size=(40, 5)).astype(np.float32)
    eligible = rng.random((40, 5)) < 0.8
    eligible[0], scores[1] = False, np.nan
    positions, members = elect_all(scores, eligible)
    for score, able, position, includes, count in zip(scores, eligible, positions, *members, strict=True):
        candidates = [i for i in range(5) if able[i] and np.isfinite(score[i])]
        by_score = sorted(candidates, key=lambda i: (score[i], i))
        expected = np.zeros(5, bool)
        if by_score:
            lowest, median = score[by_score[0]], score[by_score[len(by_score) // 2]]
            width = np.inf if kappa == np.inf else np.float32(kappa) * (median - lowest)
            expected[[i for i in by_score if score[i] - lowest <= width]] = True
        np.testing.assert_array_equal(position, np.full(5, by_score[0] if by_score else NOBODY))
        np.testing.assert_array_equal(includes, expected)
        np.testing.assert_array_equal(count, np.full(5, expected.sum()))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.complex64])
def test_one_number_that_is_not_finite_is_found(dtype):
    """Among the largest ones, whose sum would not be finite, in an array of any size."""
    largest = float(jnp.finfo(dtype).max)
    for size in (3, 5000):
        x = np.where(np.arange(size) % 3, largest, -largest).astype(dtype)
        for bad, expected in ((largest, True), (np.nan, False), (np.inf, False), (-np.inf, False)):
            x[size // 2] = bad
            assert all_finite_jitted({"a": x, "b": np.ones(2, dtype), "c": np.array([7])}) == expected
