"""Streaming exchanges against a table of numbers, the NumPy oracle, and the unstreamed methods."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax.exchange.axes import as_own
from lsgd_jax.leader import leader_pull
from lsgd_jax.methods import METHODS
from lsgd_jax.streaming import Streaming, cut, schedule
from lsgd_jax.variants import links
from tests import oracle
from tests.mapping import GROUPS, WORKERS, over_workers, quickest

AXES = ("group", "worker")
ETA, STEPS, PERIOD = 0.05, 26, 7
CURVATURES = {
    "a": np.array([1.0, 0.3]),
    "b": np.array([[2.0], [0.5], [1.5]]),
    "c": np.array([0.7, 1.2]),
    "d": np.ones(1),
}
FRAGMENTS = {1: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]], 3: [[0], [1], [2, 3]]}
"""Which arrays, of 2, 3, 2 and 1 numbers, are sent together."""
ENDS = np.cumsum([0, 2, 3, 2, 1])
WAYS = [(2, 0), (2, 2), (3, 0), (3, 2), (1, 2)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem():
    """Starts, loss noise and gradient noise, the worker axes first."""
    rng, shape = np.random.default_rng(0), (GROUPS, WORKERS)

    def normal(*more):
        return {name: rng.normal(size=(*shape, *more, *c.shape)) for name, c in CURVATURES.items()}

    return normal(), rng.normal(size=(*shape, STEPS)), normal(STEPS)


def trained(make, start, loss_noise, gradient_noise, report=lambda x, state: (), strengths=(1.0,), mapping=None):
    """For each strength, all points [group, worker, step, ...] by array, and what is reported of each step.

    `make` makes the method of a strength, so that one program is compiled for all.
    """

    def train(x, loss_noise, gradient_noise, strength):
        tx = make(strength)

        def step(carry, now):
            x, state = carry
            t, loss_noise, gradient_noise = now
            loss = loss_noise + sum(jnp.sum(CURVATURES[k] * x[k] ** 2) / 2 for k in x)
            grads = {k: CURVATURES[k] * x[k] + gradient_noise[k] for k in x}
            updates, state = tx.update(grads, state, x, value=loss, step=t)
            x = optax.apply_updates(x, updates)
            return (x, state), (x, report(x, state))

        state, noises = tx.init(x), (jnp.arange(len(loss_noise)), loss_noise, gradient_noise)
        return jax.lax.scan(step, (x, as_own(state, state, AXES)), noises)[1]

    program = over_workers(train, mapping or quickest())
    for strength in strengths:
        each = np.full((GROUPS, WORKERS), strength)
        yield strength, *jax.tree.map(np.asarray, program(start, loss_noise, gradient_noise, each))


def test_diloco_in_two_fragments_is_at_the_numbers_of_a_table():
    """A gradient of 2, inner rate 1 and outer rate 2; the whole model at once would go as its second layer does."""
    path = {"streamed": [], "whole": []}
    for label, fragments in (("streamed", 2), ("whole", None)):
        tx = METHODS["diloco"].build(
            optax.sgd(1.0),
            axis_name="worker",
            period=6,
            outer_learning_rate=2.0,
            outer_momentum=0.0,
            fragments=fragments,
        )

        @jax.jit
        @partial(jax.vmap, axis_name="worker")
        def step(x, state, tx=tx):
            updates, state = tx.update(jax.tree.map(lambda x: jnp.full_like(x, 2.0), x), state, x)
            return optax.apply_updates(x, updates), state

        x = {"first": jnp.ones((2, 3)), "second": jnp.ones((2, 3))}
        state = jax.jit(jax.vmap(tx.init))(x)
        for _ in range(10):
            path[label].append(x)
            x, state = step(x, state)
    first, second = ([float(x[name][0, 0]) for x in path["streamed"]] for name in ("first", "second"))
    assert first == [1, -1, -3, -11, -13, -15, -17, -19, -21, -35]
    assert second[:8] == [1, -1, -3, -5, -7, -9, -23, -25]
    assert [float(x["first"][1, 2]) for x in path["whole"]] == second


PEERS = {
    "local_sgd": {},
    "diloco": {"outer_learning_rate": 0.7, "outer_momentum": 0.8},
    "easgd": {"pull": 0.1, "center_pull": 0.5},
    "downpour": {},
    "mgrawa": {"pull": 0.4, "prox": 0.1},
    "lgrawa": {"pull": 0.4, "prox": 0.1},
    "quorum": {"kappa": 1.5, "pull": 0.9, "outer_learning_rate": 0.8, "outer_momentum": 0.3, "window": 3},
}
CASES = [(name, *way) for name in ("local_sgd", "diloco") for way in WAYS]
CASES += [(name, 3, 2) for name in PEERS if name not in ("local_sgd", "diloco")]


@pytest.mark.parametrize(("name", "fragments", "overlap"), CASES)
def test_follows_its_oracle(name, fragments, overlap, problem):
    start, loss_noise, gradient_noise = problem
    loss_noise, everyone = np.reshape(loss_noise, (-1, STEPS)), range(GROUPS * WORKERS)
    start, noise = (
        [[np.reshape(tree[k], (len(everyone), *tree[k].shape[2:]))[i] for k in CURVATURES] for i in everyone]
        for tree in (start, gradient_noise)
    )

    def make(mixing):
        options = {"axis_name": AXES, "period": PERIOD, "fragments": fragments, "overlap": overlap} | PEERS[name]
        mixed = {"mixing": mixing} if "mixing" in METHODS[name].options else {}
        return METHODS[name].build(optax.sgd(ETA, 0.9, nesterov=True), **options, **mixed)

    def gradient(x, t, i):
        return [c * layer + n[t] for c, n, layer in zip(CURVATURES.values(), noise[i], x, strict=True)]

    def loss(x, t, i):
        return loss_noise[i, t] + sum((c * layer**2).sum() / 2 for c, layer in zip(CURVATURES.values(), x, strict=True))

    def center_of(x, state):
        return METHODS[name].center(x, state, AXES)

    mixings = (1.0, 0.5) if "mixing" in METHODS[name].options else (1.0,)
    for mixing, path, center in trained(make, *problem, center_of, mixings):
        expected, expected_center = oracle.peer(
            name,
            start,
            gradient,
            loss,
            steps=STEPS,
            eta=ETA,
            momentum=0.9,
            period=PERIOD,
            fragments=FRAGMENTS[fragments],
            overlap=overlap,
            mixing=mixing,
            **PEERS[name],
        )
        for k, layer in enumerate(CURVATURES):
            got = path[layer].reshape(len(everyone), STEPS, *CURVATURES[layer].shape)
            want = np.array([[points[i][k] for points in expected] for i in everyone])
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(center[layer][1, 2, -1], expected_center[k], rtol=1e-9, atol=1e-10)


LSGD = [
    (2, 0, {}),
    (2, 2, {}),
    (3, 0, {}),
    (3, 0, {"delay": 1, "stale_pull": 0.2}),
    (3, 2, {"stale_pull": 0.2, "global_stale_pull": 0.1, "pull_at": "before_step"}),
    (2, 0, {"election": "per_fragment"}),
]


@pytest.mark.parametrize(("fragments", "overlap", "options"), LSGD, ids=str)
def test_lsgd_follows_its_oracle_leaders_first(fragments, overlap, options, problem):
    """The last array of a leader is lost between two fragments: it then leads no more, and a NaN reaches nobody."""
    start, loss_noise, gradient_noise = problem
    loss_noise, gradient_noise = loss_noise.copy(), gradient_noise | {"d": gradient_noise["d"].copy()}
    loss_noise[0, 1, 7:9], gradient_noise["d"][0, 1, 9] = -100, np.nan

    def joined(tree):
        return np.concatenate([tree[k].reshape(*tree[k].shape[: -CURVATURES[k].ndim], -1) for k in CURVATURES], -1)

    curvature, noise = joined(CURVATURES), joined(gradient_noise)

    def make(pull):
        own = {"fragments": fragments, "overlap": overlap, "window": 2, "period": PERIOD, "global_period": 2 * PERIOD}
        own |= {"pull": pull, "global_pull": 0.3, "axis_name": "worker", "group_axis_name": "group"} | options
        return METHODS["lsgd"].build(optax.sgd(ETA), **own)

    def leaders_of(x, state):
        return jnp.stack([pulls.leader.position for pulls in links(state)])

    for pull, path, leaders in trained(make, start, loss_noise, gradient_noise, leaders_of, (1.0, 0.5)):
        told = {name: value for name, value in options.items() if name not in ("pull_at", "election")}
        with np.errstate(invalid="ignore"):
            expected = oracle.lsgd(
                joined(start),
                lambda x, t, worker: curvature * x + noise[(*worker, t)],
                lambda x, t, worker: np.sum(curvature * x**2) / 2 + loss_noise[(*worker, t)],
                steps=STEPS,
                eta=ETA,
                pull=lambda *_, pull=pull: pull,
                period=PERIOD,
                global_pull=lambda *_: 0.3,
                global_period=2 * PERIOD,
                window=2,
                fragments=tuple(slice(ENDS[part[0]], ENDS[part[-1] + 1]) for part in FRAGMENTS[fragments]),
                overlap=overlap,
                pull_at_x=options.get("pull_at") == "before_step",
                per_fragment=options.get("election") == "per_fragment",
                **told,
            )
        for level, found in ((0, expected.local_leaders), (1, [[leader] * 2 for leader in expected.global_leaders])):
            period = PERIOD * (level + 1)
            first = schedule(fragments, period)[0] - 1
            positions = leaders[:, :, first::period, level]
            np.testing.assert_array_equal(positions, np.repeat(np.transpose(found)[:, None], WORKERS, 1))
        x = np.moveaxis(joined(path), 2, 0)
        np.testing.assert_allclose(x, expected.x, rtol=1e-9, atol=1e-10)
        assert np.isnan(x[-1]).any(-1).sum() == 1


@pytest.mark.parametrize("name", ["lsgd", "diloco"])
def test_every_mapping_gives_the_same(name, problem):
    axes = {"axis_name": "worker", "group_axis_name": "group"} if name == "lsgd" else {"axis_name": AXES}

    def make(_):
        return METHODS[name].build(optax.sgd(ETA), period=4, fragments=2, overlap=1, **axes)

    one, other = (list(trained(make, *problem, mapping=mapping)) for mapping in ("vmap", "shard_map"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), one, other)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if "fragments" in row.options])
def test_one_fragment_applied_at_once_is_the_same_program(name):
    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2, 2))}

    def program(**options):
        tx = METHODS[name].build(optax.sgd(0.1), axis_name="worker", period=4, **options)

        @partial(jax.vmap, axis_name="worker")
        def update(x):
            return tx.update(x, tx.init(x), x, value=jnp.sum(x["a"]))

        return str(jax.make_jaxpr(update)(x))

    assert program(fragments=1, overlap=0) == program()


def test_an_unbatched_step_keeps_a_branch_for_each_fragment_under_vmap():
    tx = leader_pull(0.5, axis_name="worker", period=6, streaming=Streaming(2, overlap=1))
    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}
    state = jax.jit(jax.vmap(tx.init))(x)

    @partial(jax.vmap, axis_name="worker", in_axes=(0, 0, None))
    def update(x, state, step):
        return tx.update(x, state, x, value=jnp.sum(x["a"]), step=step)

    assert str(jax.make_jaxpr(update)(x, state, jnp.asarray(0))).count("cond[") == 4  # To send and to apply each.


@pytest.mark.parametrize(("election", "leaders"), [("per_round", [0, 0]), ("per_fragment", [0, 1])])
def test_a_leader_is_elected_once_a_round(election, leaders):
    """Workers at 0, 1 and 2 that take no steps; the first is best until the second fragment is sent."""
    tx = leader_pull(1.0, axis_name="worker", period=2, window=1, streaming=Streaming(2, election=election))
    x = {"a": jnp.arange(3.0)[:, None], "b": jnp.arange(3.0)[:, None]}
    state = jax.jit(jax.vmap(tx.init))(x)

    @jax.jit
    @partial(jax.vmap, axis_name="worker")
    def step(x, state, loss):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, x), state, x, value=loss)
        return optax.apply_updates(x, updates), state

    for losses in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]):
        x, state = step(x, state, jnp.array(losses))
    np.testing.assert_array_equal(x["a"], np.full((3, 1), leaders[0]))
    np.testing.assert_array_equal(x["b"], np.full((3, 1), leaders[1]))
    np.testing.assert_array_equal(state.leader.position, [0, 0, 0])
    np.testing.assert_array_equal(state.exchanges, [1, 1, 1])
    of_two = [0.0, np.sqrt(2), np.sqrt(8)] if election == "per_round" else [1.0, 1.0, np.sqrt(5)]
    np.testing.assert_allclose(state.leader.distance, of_two)


@pytest.mark.parametrize(
    ("sizes", "fragments", "expected"),
    [
        ([2, 3, 2, 1], 2, [2, 2]),
        ([2, 3, 2, 1], 3, [1, 1, 2]),
        ([10, 1, 1, 1], 2, [1, 3]),
        ([1, 1, 1, 10], 3, [2, 1, 1]),
        ([5, 5, 5], 3, [1, 1, 1]),
        ([0, 0, 4], 2, [2, 1]),
        ([7], 1, [1]),
    ],
)
def test_fragments_are_neighboring_arrays_of_about_equal_size(sizes, fragments, expected):
    tree = {f"{i:02}": jax.ShapeDtypeStruct((size,), np.float32) for i, size in enumerate(sizes)}
    parts = cut(tree, fragments)
    assert [len(jax.tree.leaves(part)) for part in parts] == expected
    assert [x for part in parts for x in jax.tree.leaves(part)] == list(tree.values())


def test_the_largest_fragment_is_as_small_as_can_be():
    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = rng.integers(0, 20, rng.integers(1, 9)).tolist()
        fragments = int(rng.integers(1, len(sizes) + 1))
        parts = cut([np.zeros(size) for size in sizes], fragments)
        largest = max(sum(x.size for x in jax.tree.leaves(part)) for part in parts)

        def least(sizes, parts):
            if parts == 1:
                return sum(sizes)
            ends = range(1, len(sizes) - parts + 2)
            return min(max(sum(sizes[:end]), least(sizes[end:], parts - 1)) for end in ends)

        assert largest == least(sizes, fragments)
        assert all(jax.tree.leaves(part) for part in parts)


@pytest.mark.parametrize(
    ("fragments", "period", "after"), [(1, 5, [5]), (2, 6, [3, 6]), (3, 7, [2, 4, 7]), (3, 3, [1, 2, 3])]
)
def test_fragments_are_sent_evenly_over_the_period(fragments, period, after):
    assert schedule(fragments, period) == after


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("diloco", {"fragments": 7}, "fragments must be at most the period, 6, got 7: one is sent at a time"),
        ("easgd", {"fragments": 0}, "fragments must be a whole number of parts, at least 1, got 0"),
        ("lgrawa", {"overlap": -1}, "overlap must be a whole number of updates, at least 0, got -1"),
        ("diloco", {"fragments": 2, "overlap": 3}, "overlap must be less than period / fragments, 6 / 2, got 3"),
        ("local_sgd", {"overlap": 6}, "overlap must be less than period / fragments, 6 / 1, got 6"),
        ("local_sgd", {"overlap": 1, "delay": 1}, "delay must be 0 with an overlap, which puts pulls off as well"),
        ("local_sgd", {"mixing": 1.5}, r"mixing must be in \[0, 1\], got 1\.5"),
        ("lsgd", {"fragments": 2, "revive": "from_leader"}, "revive needs 1 fragment and no overlap"),
        ("lsgd", {"fragments": 2, "election": "once"}, "election must be .*, got 'once'"),
    ],
)
def test_an_option_out_of_range_is_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        METHODS[name].build(optax.sgd(0.1), axis_name="worker", period=6, **options)
    assert "\n" not in str(error.value)


def test_more_fragments_than_arrays_are_one_sentence_and_no_arrays_are_none():
    tx = METHODS["diloco"].build(optax.sgd(0.1), axis_name="worker", period=6, fragments=3)
    with pytest.raises(ValueError, match="fragments must be at most 2, the number of arrays that are exchanged, got 3"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2), "count": jnp.zeros((), int)})
    assert len(tx.init({})[-1].sending) == 3
