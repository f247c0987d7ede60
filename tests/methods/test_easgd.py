import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax.methods.easgd import easgd
from tests.mapping import GROUPS, MAPPINGS, WORKERS, over_workers

EVERYONE = ("group", "worker")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.optimized
@pytest.mark.parametrize("pull_at", ["after_step", "before_step"])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_follows_a_plain_loop(mapping, pull_at):
    """f = x^2 / 2, eta 0.1, alpha 0.2, beta 0.5, period 2, from the equations of the paper."""
    start = np.random.default_rng(0).normal(size=(GROUPS, WORKERS))
    tx = easgd(optax.sgd(0.1), axis_name=EVERYONE, period=2, pull=0.2, center_pull=0.5, pull_at=pull_at)

    def train(x):
        state = tx.init(x)
        for t in range(7):
            updates, state = tx.update(x, state, x, step=jnp.asarray(t))
            x = optax.apply_updates(x, updates)
        return x, state[-1].attractor.x, state[-1].exchanges

    x, center, exchanges = over_workers(train, mapping)(start)

    expected, c = start.reshape(-1).copy(), start.mean()
    for t in range(7):
        origin = expected.copy()
        expected = expected - 0.1 * expected
        if (t + 1) % 2 == 0:
            at = origin if pull_at == "before_step" else expected.copy()
            for i in range(len(expected)):
                expected[i] -= 0.2 * (at[i] - c)
            c += 0.5 * (at.mean() - c)
    np.testing.assert_allclose(np.reshape(x, -1), expected, rtol=1e-12)
    np.testing.assert_allclose(center, np.full((GROUPS, WORKERS), c), rtol=1e-12)
    np.testing.assert_array_equal(exchanges, np.full((GROUPS, WORKERS), 3))


def test_the_forces_are_symmetric_by_default():
    """The workers are drawn by alpha to the centre, and the centre by n alpha to their mean."""
    x = jnp.array([1.0, 5.0, 0.0, 2.0])
    tx = easgd(optax.sgd(0.0), axis_name="worker", period=1)
    step = jax.vmap(lambda x, state: tx.update(x, state, x), axis_name="worker")
    updates, state = step(x, jax.vmap(tx.init)(x))
    alpha = 0.9**8 / 4
    np.testing.assert_allclose(updates, -alpha * (x - 2.0), rtol=1e-12)
    np.testing.assert_allclose(state[-1].attractor.x, np.full(4, 2.0), rtol=1e-12)
    updates, state = step(x + 1, state)
    np.testing.assert_allclose(state[-1].attractor.x, np.full(4, 2.0 + 4 * alpha), rtol=1e-12)


def test_a_pull_that_would_make_the_centre_overshoot_is_one_sentence():
    tx = easgd(optax.sgd(0.1), axis_name="worker", pull=0.3)
    x = jnp.ones(4)
    with pytest.raises(ValueError, match=r"workers \* pull must be at most 1, got 4 \* 0\.3: give center_pull, too"):
        jax.vmap(lambda x, state: tx.update(x, state, x), axis_name="worker")(x, jax.vmap(tx.init)(x))


def test_params_are_needed():
    tx = easgd(optax.sgd(0.1), axis_name="worker")
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="moves parameters: pass them"):
        jax.vmap(lambda x, state: tx.update(x, state), axis_name="worker")(x, jax.vmap(tx.init)(x))
