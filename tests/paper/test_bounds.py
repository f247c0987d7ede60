"""The paper's bounds, and the directions of its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lsgd_jax.paper import bounds, directions
from lsgd_jax.paper.objectives import Quadratic, double_well


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_quadratic(rng, dimension, kappa, noise=0.0):
    axes = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
    hessian = axes @ np.diag(np.geomspace(1, kappa, dimension)) @ axes.T
    return Quadratic(hessian, rng.normal(size=dimension), 1.0, kappa, noise)  # NumPy throughout: bounds need no JAX.


def expected_after_one_step(problem, x, z, eta, lam):
    """The exact mean with isotropic noise: the value at the mean point, and eta^2 / 2 tr(H) sigma^2 / d."""
    hessian, away = np.array(problem.hessian), np.array(x - problem.minimizer)
    mean = away - eta * (hessian @ away + lam * np.array(x - z))
    return mean @ hessian @ mean / 2 + eta**2 / 2 * np.trace(hessian) / len(away) * problem.noise**2


def gap(problem, x):
    away = np.array(x - problem.minimizer)
    return away @ np.array(problem.hessian) @ away / 2


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    dimension=st.integers(2, 8),
    kappa=st.floats(1, 1e3),
    scale=st.floats(1e-3, 1e2),
    of_eta=st.floats(0, 1),
    of_pull=st.floats(0, 1),
    noise=st.floats(0, 3),
)
def test_the_exact_mean_after_one_step_is_below_the_bound(seed, dimension, kappa, scale, of_eta, of_pull, noise):
    rng = np.random.default_rng(seed)
    problem = random_quadratic(rng, dimension, kappa, noise)
    x, z = problem.minimizer + scale * rng.normal(size=(2, dimension))
    eta = of_eta / (2 * kappa)
    lam = of_pull / (2 * kappa) / eta if eta > 1e-12 else 0.0
    constants = {"strong_convexity": 1.0, "smoothness": kappa}
    assert bounds.bound_applies(eta, lam, **constants)
    bound = bounds.one_step_bound(gap(problem, x), gap(problem, z), eta, lam, noise=noise, **constants)
    assert expected_after_one_step(problem, x, z, eta, lam) <= bound * (1 + 1e-9)


def test_without_a_pull_one_step_is_sgd_and_in_a_round_bowl_its_noise_is_that_of_the_bound():
    problem = Quadratic(jnp.eye(3) * 2.0, jnp.zeros(3), 2.0, 2.0, 0.7)
    constants = {"strong_convexity": 2.0, "smoothness": 2.0, "noise": 0.7}
    at_minimum = bounds.one_step_bound(0.0, 0.0, 0.1, 0.0, **constants)
    np.testing.assert_allclose(expected_after_one_step(problem, jnp.zeros(3), jnp.ones(3), 0.1, 0.0), at_minimum)
    alone = bounds.one_step_bound(3.0, 1.0, 0.1, 0.0, **constants)
    np.testing.assert_allclose(alone, 0.8 * 3 + 0.1**2 * 0.7**2)
    # A worker who leads is not pulled.
    np.testing.assert_allclose(bounds.one_step_bound(3.0, 3.0, 0.1, 1.0, **constants), alone)


def test_an_overlong_step_exceeds_the_bound():
    problem = Quadratic(jnp.diag(jnp.array([1.0, 10.0])), jnp.zeros(2), 1.0, 10.0, 0.0)
    x = jnp.array([0.0, 1.0])
    constants = {"strong_convexity": 1.0, "smoothness": 10.0}
    assert not bounds.bound_applies(0.25, 0.0, **constants)
    after = expected_after_one_step(problem, x, x, 0.25, 0.0)
    assert after > bounds.one_step_bound(5.0, 5.0, 0.25, 0.0, noise=0.0, **constants)


def test_the_limit_is_where_the_bound_of_one_step_stands_still():
    constants = {"strong_convexity": 0.5, "smoothness": 4.0, "noise": 2.0}
    limit = bounds.limit_bound(0.1, 0.3, **constants)
    np.testing.assert_allclose(bounds.one_step_bound(limit, limit, 0.1, 0.3, **constants), limit)
    noisy = bounds.limit_bound(0.1, 0.3, workers=9, loss_noise=0.5, **constants)
    np.testing.assert_allclose(noisy - limit, 4 / 0.5 * 0.3 * 3 * 0.5)


@pytest.mark.parametrize("kappa", [1.0, 10.0, 100.0])
def test_one_step_after_another_stays_below_the_bound_of_decreasing_steps(kappa):
    constants = {"strong_convexity": 1.0, "smoothness": kappa}
    k = np.arange(2000)
    bound = bounds.decreasing_steps_bound(np.arange(2001), 5.0, noise=1.5, **constants)
    of = 5.0
    for eta, after in zip(bounds.decreasing_step(k, **constants), bound[1:], strict=True):
        assert bounds.bound_applies(eta, 1.0, **constants)
        of = float(bounds.one_step_bound(of, of, eta, 1.0, noise=1.5, **constants))
        assert of <= after * (1 + 1e-12)


def test_elastic_averaging_rests_where_no_gradient_vanishes_and_the_leader_does_not():
    lam = 0.5
    a = bounds.elastic_counterexample(lam)
    pair = jnp.array([[a], [-a]])
    np.testing.assert_allclose(jax.grad(bounds.elastic_objective(double_well, lam))(pair), [[0], [0]], atol=1e-14)
    slopes = jax.vmap(jax.grad(double_well))(pair)
    np.testing.assert_allclose(slopes, [[-lam * a], [lam * a]])
    pulled = jax.grad(bounds.leader_objective(double_well, lam))(pair)
    np.testing.assert_allclose(pulled[0], slopes[0])  # The first leads, by the tie: its own gradient, and it moves.
    np.testing.assert_allclose(pulled[1], slopes[1] - 2 * lam * a)


@pytest.mark.parametrize("dimension", [2, 5])
def test_candidates_are_uniform_by_volume(dimension):
    rng = np.random.default_rng(dimension)
    problem = random_quadratic(rng, dimension, 50.0)
    x = problem.minimizer + 1.0
    z = np.asarray(directions.sample_candidates(jax.random.key(0), problem, x, 20_000))
    share = np.array([gap(problem, each) for each in z[:5000]]) / gap(problem, x)
    assert stats.kstest(np.sqrt(share), lambda r: np.clip(r, 0, 1) ** dimension).pvalue > 1e-3
    # A ball's second moments are r^2 / (d + 2), those of the ellipsoid {z^T H z <= 2f} are 2f H^-1 / (d + 2).
    second = np.cov(z.T, bias=True)
    expected = 2 * gap(problem, x) * np.linalg.inv(problem.hessian) / (dimension + 2)
    np.testing.assert_allclose(second, expected, atol=0.05 * expected.max())


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    kappa=st.floats(2, 1e4),
    part=st.floats(1e-3, 1),
    dimension=st.sampled_from([2, 6]),
)
def test_half_of_the_candidates_improve_the_direction_where_it_is_promised(seed, kappa, part, dimension):
    rng = np.random.default_rng(seed)
    problem = random_quadratic(rng, dimension, kappa)
    x = problem.minimizer + rng.normal(size=dimension) * np.geomspace(1, 10, dimension)
    limit, angle = directions.guaranteed_pull(problem, x)
    z = directions.sample_candidates(jax.random.key(seed), problem, x, 2000)
    good = directions.improves_direction(problem, x, z, part * min(limit, 1e6))
    assert 0 < angle < 90
    assert good.mean() > 0.5 - 4 * 0.5 / np.sqrt(2000)


def test_along_an_axis_no_pull_improves_a_direction_that_is_newtons():
    problem = Quadratic(jnp.diag(jnp.array([1.0, 10.0])), jnp.zeros(2), 1.0, 10.0, 0.0)
    x = jnp.array([0.0, 1.0])
    assert directions.guaranteed_pull(problem, x) == (0.0, 0.0)
    z = directions.sample_candidates(jax.random.key(0), problem, x, 1000)
    assert not directions.improves_direction(problem, x, z, 1e-3).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: bounds.one_step_bound(1, 1, 0.1, 0, strong_convexity=2.0, smoothness=1.0, noise=0.0), "smoothness"),
        (lambda: bounds.limit_bound(0.1, 0, strong_convexity=1.0, smoothness=2.0, noise=-1.0), "noise must be"),
        (lambda: bounds.limit_bound(0.6, 0, strong_convexity=1.0, smoothness=1.0, noise=1.0), "eta <= 1/"),
        (lambda: bounds.decreasing_step(0, strong_convexity=1.0, smoothness=1.0, scale=0.0), "scale must be"),
        (
            lambda: bounds.decreasing_steps_bound(0, 1, strong_convexity=1.0, smoothness=1.0, noise=0.0, lam=2.0),
            "lam in",
        ),
        (lambda: bounds.elastic_counterexample(4.0), "lam must lie in"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
