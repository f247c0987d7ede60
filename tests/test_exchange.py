import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax import NOBODY, broadcast_from, elect
from lsgd_jax.exchange import mean
from tests.mapping import GROUPS, MAPPINGS, WORKERS, over_workers

SCORES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38])
EVERYONE = ("group", "worker")


def elected(scores, eligible):
    """The lowest finite score of an eligible worker, the first of several, in a plain loop."""
    best = NOBODY
    for i, (score, able) in enumerate(zip(scores, eligible, strict=True)):
        if able and np.isfinite(score) and (best == NOBODY or score < scores[best]):
            best = i
    return best


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_elects_the_lowest_finite_score_and_the_first_of_ties(workers):
    scores = np.array([score for score, _ in workers])
    eligible = np.array([able for _, able in workers])
    with jax.enable_x64(True):
        leaders = jax.vmap(lambda s, e: elect(s, "worker", eligible=e), axis_name="worker")(scores, eligible)
    assert set(np.asarray(leaders)) == {elected(scores, eligible)}


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_election_is_the_same_under_every_mapping(mapping):
    scores = np.array([[np.nan, 2.0, 1.0, 1.0], [0.5, np.inf, 0.5, 3.0]], np.float32)
    local, everyone = over_workers(lambda s: (elect(s, "worker"), elect(s, EVERYONE)), mapping)(scores)
    np.testing.assert_array_equal(local, [[2] * 4, [0] * 4])
    np.testing.assert_array_equal(everyone, np.full((2, 4), 4))


def test_nobody_leads_when_all_scores_are_infinite_or_nan():
    scores = jnp.array([jnp.nan, jnp.inf, -jnp.inf, jnp.nan])
    leaders = jax.vmap(lambda s: elect(s, "worker"), axis_name="worker")(scores)
    np.testing.assert_array_equal(leaders, [NOBODY] * 4)


def values(dtype, rng):
    """[GROUPS, WORKERS, 3] of random bits: NaN payloads, signed zeros and denormals among them."""
    if dtype == np.complex64:
        return (values(np.float32, rng) + 1j * values(np.float32, rng)).astype(dtype)
    if np.dtype(dtype).kind == "b":
        return rng.random((GROUPS, WORKERS, 3)) < 0.5
    return rng.integers(0, 256, (GROUPS, WORKERS, 3 * np.dtype(dtype).itemsize), np.uint8).view(dtype)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, casting the signalling NaNs.
@pytest.mark.parametrize(
    "dtype", [np.float32, jnp.bfloat16, np.float16, np.int32, np.int8, np.uint16, bool, np.complex64]
)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_root_comes_through_bit_for_bit(mapping, dtype):
    x = values(dtype, np.random.default_rng(0))
    local = over_workers(lambda root, x: broadcast_from(x, root, "worker"), mapping)
    everyone = over_workers(lambda root, x: broadcast_from(x, root, EVERYONE), mapping)
    for root in range(WORKERS):
        roots = np.array([[root] * WORKERS, [(root + 1) % WORKERS] * WORKERS], np.int32)  # Each group has its own.
        received = np.asarray(local(roots, x))
        for group in range(GROUPS):
            for worker in range(WORKERS):
                assert received[group, worker].tobytes() == x[group, roots[group, 0]].tobytes()
    for root in range(GROUPS * WORKERS):
        received = np.asarray(everyone(np.full((GROUPS, WORKERS), root, np.int32), x))
        assert received.tobytes() == x.reshape(-1, 3)[root].tobytes() * (GROUPS * WORKERS)


def test_nobody_sends_zeros_and_no_nan_leaks():
    x = jnp.full((4, 2), jnp.nan).at[2].set(7.0)
    send = jax.vmap(lambda x, root: broadcast_from({"x": x}, root, "worker"), axis_name="worker", in_axes=(0, None))
    np.testing.assert_array_equal(send(x, NOBODY)["x"], np.zeros((4, 2)))
    np.testing.assert_array_equal(send(x, 2)["x"], np.full((4, 2), 7.0))


def test_float64_and_mixed_trees():
    with jax.enable_x64(True):
        tree = {"a": np.arange(8.0) / 3, "b": (np.arange(8, dtype=np.int64), np.arange(8) > 3)}
        received = jax.vmap(lambda tree: broadcast_from(tree, 5, "worker"), axis_name="worker")(tree)
        assert received["a"].dtype == np.float64
    jax.tree.map(lambda got, sent: np.testing.assert_array_equal(got, np.full(8, sent[5])), received, tree)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_mean(mapping):
    x = np.arange(8, dtype=np.float32).reshape(GROUPS, WORKERS)
    np.testing.assert_array_equal(over_workers(lambda x: mean(x, "worker"), mapping)(x), [[1.5] * 4, [5.5] * 4])
    np.testing.assert_array_equal(over_workers(lambda x: mean(x, EVERYONE), mapping)(x), np.full((2, 4), 3.5))


@pytest.mark.parametrize(
    "function", [lambda x: elect(x, "host"), lambda x: broadcast_from(x, 0, "host"), lambda x: mean(x, "host")]
)
def test_an_axis_that_does_not_exist_is_named(function):
    with pytest.raises(NameError, match=r"no axis 'host' here: .* axis_name='host'"):
        jax.vmap(function, axis_name="worker")(jnp.zeros(2))


def test_a_score_is_a_scalar():
    with pytest.raises(ValueError, match=r"one scalar score a worker, got the shape \(3,\)"):
        jax.vmap(lambda s: elect(s, "worker"), axis_name="worker")(jnp.zeros((2, 3)))
