"""The quorum as a point between LSGD, local SGD and DiLoCo, and where it is by itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax.methods import METHODS
from lsgd_jax.methods.base import outer_step
from lsgd_jax.methods.quorum import quorum_of
from lsgd_jax.scores import scored
from lsgd_jax.streaming import WHOLE, streamed
from lsgd_jax.variants import apply_updates, links
from tests.mapping import over_workers, quickest

GROUPS, WORKERS, STEPS = 2, 4, 16
PLAIN = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
LIMITS = {
    "a leader": (
        "lsgd",
        {"pull": 0.2, "pull_at": "before_step"},
        {"kappa": 0.0, "pull": 0.2, "pull_at": "before_step", **PLAIN},
    ),
    "leaders in groups": (
        "lsgd",
        {"pull": 0.3, "global_pull": 0.2, "global_period": 4, "delay": 1},
        {"kappa": 0.0, "pull": 0.3, "global_pull": 0.2, "global_period": 4, "delay": 1, **PLAIN},
    ),
    "a mean": ("local_sgd", {"wire": "bfloat16"}, {"kappa": np.inf, "wire": "bfloat16", **PLAIN}),
    "a mean in fragments": ("local_sgd", {"fragments": 2}, {"kappa": np.inf, "fragments": 2, **PLAIN}),
    "an outer step": (
        "diloco",
        {"outer_learning_rate": 0.7, "outer_momentum": 0.9},
        {"kappa": np.inf, "outer_learning_rate": 0.7, "outer_momentum": 0.9},
    ),
}
"""Another method with its options, and those with which the quorum does the same."""


@pytest.fixture(scope="module")
def problem():
    """Starts [group, worker, ...], gradient noise and loss noise [group, worker, step, ...]."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (4,)}

    def normal(*more):
        return {name: rng.normal(size=(GROUPS, WORKERS, *more, *shape)) for name, shape in shapes.items()}

    return jax.tree.map(np.float32, (normal(), normal(STEPS), rng.normal(size=(GROUPS, WORKERS, STEPS))))


def built(name, options):
    groups = ("group",) if "global_pull" in options else ()
    workers = ("worker",) if groups else ("group", "worker")
    given = {"period": 2} | ({"window": 3} if METHODS[name].elects else {}) | options
    return METHODS[name].built(optax.sgd(0.1, 0.9), given, groups=groups, workers=workers)


def path_of(tx, start, gradient_noise, losses):
    """All points [group, worker, step, ...]."""

    def train(x, *noises):
        def step(carry, now):
            x, state = carry
            number, noise, loss = now
            grads = jax.tree.map(lambda x, noise: x + noise, x, noise)
            updates, state = tx.update(grads, state, x, value=loss, step=number)
            x = apply_updates(x, updates, state)
            return (x, state), x

        return jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(STEPS), *noises))[1]

    return jax.tree.map(np.asarray, over_workers(train, quickest())(start, gradient_noise, losses))


@pytest.mark.optimized
@pytest.mark.parametrize("limit", LIMITS)
def test_its_limits_are_other_methods_to_the_bit(limit, problem):
    other, options, own = LIMITS[limit]
    start, noise, losses = problem
    if limit == "a leader":  # A worker that is not finite is nobody's leader, and in no quorum.
        noise = noise | {"b": noise["b"].copy()}
        noise["b"][1, 2, 5] = np.nan
    expected, found = (path_of(tx, start, noise, losses) for tx in (built(other, options), built("quorum", own)))
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert np.isnan(found["b"]).any() == (limit == "a leader")


def test_any_optimizer_of_optax_takes_the_outer_step():
    """Adam, from numbers on paper: of workers at 1, 2 and 9 with losses 1, 1.5 and 20 the last is left out."""
    outer, axis = optax.adam(0.5), "worker"
    center = outer_step(quorum_of(axis, 3.0), outer, axis)
    tx = scored(streamed(center, 1.0, WHOLE, axis_name=axis, period=1), window=1)
    x = np.array([1.0, 2.0, 9.0], np.float32)

    @jax.jit
    @partial(jax.vmap, axis_name=axis)
    def step(x, state, loss):
        updates, state = tx.update(jnp.zeros_like(x), state, x, value=loss)
        return x + updates, state

    state, c = jax.jit(jax.vmap(tx.init))(x), np.float32(4.0)
    own, update = outer.init(c), jax.jit(outer.update)
    for average in (1.5, 2.0):  # In the second exchange all are at the center, and then the first two moved.
        x, state = step(x, state, jnp.array([1.0, 1.5, 20.0]))
        updates, own = update(c - np.float32(average), own, c)
        c = c + updates
        np.testing.assert_allclose(x, np.full(3, c), rtol=1e-6)
        x = x + (2.0 - c) * np.array([1, 1, 3], np.float32)
    np.testing.assert_array_equal(state.leader.leads, [True, True, False])
    np.testing.assert_array_equal(state.leader.position, [0, 0, 0])


def test_without_anybody_who_is_eligible_nobody_moves_and_the_center_waits():
    tx = built("quorum", {"period": 1, "outer_momentum": 0.5, "window": 1})
    x = np.arange(8, dtype=np.float32).reshape(2, 4)

    def step(x, state, loss):
        updates, state = tx.update(jnp.zeros_like(x), state, x, value=loss)
        return x + updates, state, METHODS["quorum"].center(x, state, ("group", "worker"))

    step, init = (over_workers(f, "vmap") for f in (step, tx.init))
    moved, state, reported = step(x, init(x), jnp.full((2, 4), jnp.nan))
    np.testing.assert_array_equal(moved, x)
    np.testing.assert_array_equal(reported, np.full((2, 4), 3.5))
    assert (np.asarray(links(state)[0].leader.position) == -1).all()
    # The outer momentum starts with the first exchange that has a quorum: at 0 from the mean of the starts, 3.5.
    losses = jnp.where(x < 2, 0.0, jnp.nan)
    moved, _, reported = step(x, state, losses)
    np.testing.assert_allclose(moved, np.full((2, 4), 3.5 - 1.5 * 3.0), rtol=1e-6)
    np.testing.assert_array_equal(reported, np.full((2, 4), 0.5))


def test_a_worker_that_fails_restarts_from_the_center(problem):
    start, noise, losses = problem
    noise = noise | {"b": noise["b"].copy()}
    noise["b"][1, 2, 4] = np.inf
    found = path_of(built("quorum", {"revive": "from_leader", "period": 3}), start, noise, losses)
    assert all(np.isfinite(x).all() for x in found.values())
    for x in found.values():
        np.testing.assert_allclose(x[1, 2, 5], x[0, 0, 5], rtol=1e-5, atol=1e-6)  # At the center, as all are.
        np.testing.assert_array_equal(x[1, 2, 3], x[1, 2, 4])  # Where it waited.
