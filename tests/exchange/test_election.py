"""Who is elected."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax import NOBODY, elect
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
@settings(max_examples=200, deadline=None)
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


def test_nobody_leads_when_all_scores_are_infinite_or_nan():
    scores = np.array([np.nan, np.inf, -np.inf, np.nan], np.float32)
    leaders = jax.jit(jax.vmap(lambda s: elect(s, "worker"), axis_name="worker"))(scores)
    np.testing.assert_array_equal(leaders, [NOBODY] * 4)


def test_a_score_is_a_scalar():
    with pytest.raises(ValueError, match=r"one scalar score a worker, got the shape \(3,\)"):
        jax.vmap(lambda s: elect(s, "worker"), axis_name="worker")(jnp.zeros((2, 3)))
