"""One battery over the table of methods."""

import functools
import inspect
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from lsgd_jax.checks import check_type
from lsgd_jax.methods import METHODS, Method, mean_of_workers
from lsgd_jax.methods.options import fields_of, option_types
from lsgd_jax.train.learning_rates import rate_factors, scale_by_worker
from tests import oracle
from tests.mapping import GROUPS, MAPPINGS, WORKERS, mapped, over_workers

AXES = ("group", "worker")
STEPS, ETA, MOMENTUM = 120, 0.01, 0.9
CURVATURES = {"a": np.array([1.0, 0.3]), "b": np.array([[2.0], [0.5], [1.5]])}

# What each method is tried with, and by name what its oracle is told; every option is named, no default is relied on.
OPTIONS = {
    "lsgd": {"period": 3, "pull": 0.2, "window": 4},
    "easgd": {"period": 3, "pull": 0.1, "center_pull": 0.5},
    "downpour": {"period": 3},
    "local_sgd": {"period": 3},
    "data_parallel": {},
    "diloco": {"period": 3, "outer_learning_rate": 0.7, "outer_momentum": 0.8},
    "mgrawa": {"period": 3, "pull": 0.4, "prox": 0.05},
    "lgrawa": {"period": 3, "pull": 0.4, "prox": 0.05},
    "quorum": {
        "period": 3,
        "kappa": 1.5,
        "pull": 0.9,
        "outer_learning_rate": 0.8,
        "outer_momentum": 0.3,
        "window": 4,
    },
    "coordinate_median": {"period": 3, "pull": 0.7},
    "trimmed_mean": {"period": 3, "pull": 0.7, "trim": 0.3},
    "independent": {"window": 4},
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def problem():
    """Starts, loss noise and gradient noise, the worker axes first."""
    rng, shape = np.random.default_rng(0), (GROUPS, WORKERS)

    def normal(*more):
        return {name: rng.normal(size=(*shape, *more, *c.shape)) for name, c in CURVATURES.items()}

    return normal(), rng.normal(size=(*shape, STEPS)), normal(STEPS)


def optimizer():
    return optax.sgd(ETA, MOMENTUM, nesterov=True)


def build(name, inner=None, **changed):
    return METHODS[name].build(inner or optimizer(), axis_name=AXES, **(OPTIONS[name] | changed))


# Compiled as the first test that calls it is: those that are optimized come first.
@functools.cache
def training(name, mapping="vmap", inner=None, **changed):
    """From starts and noises to all points [group, worker, step, ...] by layer, the reported model, and LSGD's leaders
    after each step."""
    program = over_workers(train_with(name, build(name, inner, **changed)), mapping)
    return lambda *problem: jax.tree.map(np.asarray, program(*problem))


def train_with(name, tx):
    def train(x, loss_noise, gradient_noise):
        def step(carry, now):
            x, state = carry
            t, loss_noise, gradient_noise = now
            loss = loss_noise + sum(jnp.sum(CURVATURES[k] * x[k] ** 2) / 2 for k in x)
            grads = {k: CURVATURES[k] * x[k] + gradient_noise[k] for k in x}
            updates, state = tx.update(grads, state, x, value=loss, step=t)
            x = optax.apply_updates(x, updates)
            leaders = state[-1].leader.position if name == "lsgd" else None
            return (x, state), (x, leaders)

        # With replication checks on, the state that `init` makes must have the types that `update` returns.
        noises = (jnp.arange(len(loss_noise)), loss_noise, gradient_noise)
        (x, state), (path, leaders) = jax.lax.scan(step, (x, tx.init(x)), noises)
        return path, METHODS[name].center(x, state, AXES), leaders

    return train


def test_every_method_is_tried():
    assert set(OPTIONS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_have_one_shape_and_options_that_are_told_of(name):
    first, *options = inspect.signature(METHODS[name].build).parameters.values()
    assert first.name == "optimizer"
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    names = [option.name for option in options]
    assert names[0] == "axis_name"
    told = {option: help_text for option, _, help_text in fields_of({name: METHODS[name]})}
    assert set(told) == set(METHODS[name].options)
    assert all(re.match(rf"{name}: ..+\.$", text) for text in told.values())
    assert set(METHODS[name].grid) <= set(names)
    assert set(METHODS[name].in_groups) <= set(names)
    assert all(set(options) <= set(names) for options in METHODS[name].asynchronous.values())
    update = list(inspect.signature(build(name).update).parameters)
    assert update[:3] == ["updates", "state", "params"]
    center = list(inspect.signature(METHODS[name].center).parameters)
    assert center[:3] == ["params", "state", "axis_name"]
    assert center[3:] in ([], ["model_axis_name"])
    assert "Args:" in METHODS[name].build.__doc__
    assert "NaN" in METHODS[name].build.__doc__


def test_an_option_is_for_a_configuration_what_its_annotation_says():
    def build(
        optimizer,
        *,
        axis_name,
        rate: Array | float | Callable[[int], float] = 0.5,
        count: int | None = None,
        flag: bool = False,
        way: Literal["up", "down"] = "up",
        tree: Array | None = None,
    ):
        """Never called.

        Args:
          rate: how fast,
            in one line.
          count: how many.
        """

    types = option_types(build)
    assert types == {
        "rate": float | None,
        "count": int | None,
        "flag": bool | None,
        "way": Literal["up", "down"] | None,
    }
    found = {name: (hint, text) for name, hint, text in fields_of({"a": Method(build, mean_of_workers, "never")})}
    assert found["rate"] == (float | None, "a: how fast, in one line (default 0.5).")
    assert found["count"] == (int | None, "a: how many.")
    both = {name: text for name, _, text in fields_of(dict.fromkeys("ab", Method(build, mean_of_workers, "never")))}
    assert both["count"] == "a, b: how many."
    with pytest.raises(ValueError, match=r"^flag must be True, False or not given, got 1\.$"):
        check_type("flag", 1, types["flag"])
    check_type("flag", True, types["flag"])


def flat(tree):
    """[group * worker, ...] by layer, in the order of the layers' names."""
    return [np.reshape(tree[k], (GROUPS * WORKERS, *tree[k].shape[2:])) for k in sorted(tree)]


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "changed"),
    [(name, {}) for name in METHODS if name != "lsgd"]
    + [("local_sgd", changed) for changed in ({"delay": 1}, {"wire": "bfloat16"}, {"delay": 1, "wire": "bfloat16"})]
    + [("quorum", {"delay": 1}), ("quorum", {"wire": "bfloat16", "outer_learning_rate": 1.0, "outer_momentum": 0.0})],
    ids=str,
)
def test_follows_its_oracle(name, changed, problem):
    start, loss_noise, gradient_noise = problem
    path, center, _ = training(name, **changed)(*problem)

    # CPUs add what is sent in bfloat16 in float32, as the oracle does; others round every sum.
    tolerance = 0.1 if "wire" in changed and jax.default_backend() != "cpu" else 1e-10
    curvatures = [CURVATURES[k] for k in sorted(CURVATURES)]
    starts = [list(layers) for layers in zip(*flat(start), strict=True)]
    noise, losses = flat(gradient_noise), loss_noise.reshape(-1, STEPS)

    def gradient(x, t, i):
        return [c * layer + n[i, t] for c, layer, n in zip(curvatures, x, noise, strict=True)]

    def loss(x, t, i):
        return losses[i, t] + sum((c * layer**2).sum() / 2 for c, layer in zip(curvatures, x, strict=True))

    expected, expected_center = oracle.peer(
        name, starts, gradient, loss, steps=STEPS, eta=ETA, momentum=MOMENTUM, **OPTIONS[name] | changed
    )
    for k, (got, got_center) in enumerate(zip(flat(path), flat(center), strict=True)):
        for i in range(GROUPS * WORKERS):
            want = np.array([expected[t][i][k] for t in range(STEPS)])
            np.testing.assert_allclose(got[i], want, rtol=1e-9, atol=tolerance)
            np.testing.assert_allclose(got_center[i], expected_center[k], rtol=1e-9, atol=tolerance)


@pytest.mark.optimized
def test_lsgd_follows_its_oracle_leaders_first(problem):
    """In one layer; the oracle of Algorithm 1 has no momentum."""
    start, loss_noise, gradient_noise = ({"a": p["a"]} if isinstance(p, dict) else p for p in problem)
    path, center, leaders = training("lsgd", inner=optax.sgd(ETA))(start, loss_noise, gradient_noise)
    everyone = (1, GROUPS * WORKERS)
    expected = oracle.lsgd(
        start["a"].reshape(*everyone, -1),
        lambda x, t, worker: CURVATURES["a"] * x + gradient_noise["a"].reshape(*everyone, STEPS, -1)[(*worker, t)],
        lambda x, t, worker: loss_noise.reshape(*everyone, STEPS)[(*worker, t)] + np.sum(CURVATURES["a"] * x**2) / 2,
        steps=STEPS,
        eta=ETA,
        pull=lambda *_: OPTIONS["lsgd"]["pull"],
        period=3,
        window=4,
    )
    np.testing.assert_array_equal(leaders[0, 0, 2::3], np.ravel(expected.local_leaders))
    np.testing.assert_allclose(flat(path)[0].swapaxes(0, 1), expected.x[:, 0], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(center["a"][1, 2], expected.x[-1, 0].mean(0), rtol=1e-9, atol=1e-10)


@pytest.mark.optimized
@pytest.mark.parametrize("mapping", [mapping for mapping in MAPPINGS if mapping != "vmap"])
@pytest.mark.parametrize("name", METHODS)
def test_every_mapping_gives_the_same(name, mapping, problem):
    one, other = (training(name, m)(*problem)[:2] for m in ("vmap", mapping))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), one, other)


@pytest.mark.optimized
@pytest.mark.parametrize("name", METHODS)
def test_permuting_workers_permutes_the_result(name, problem):
    permute = np.ix_([1, 0], [2, 0, 3, 1])
    path, center, _ = training(name)(*problem)
    permuted, same, _ = training(name)(*jax.tree.map(lambda a: a[permute], problem))
    for k in path:
        np.testing.assert_allclose(permuted[k], path[k][permute], rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(same[k], center[k], rtol=1e-9, atol=1e-11)


ALONE = {
    "diloco": {"outer_learning_rate": 1.0, "outer_momentum": 0.0},
    "mgrawa": {"prox": 0.0},
    "lgrawa": {"prox": 0.0},
    "quorum": {"outer_learning_rate": 1.0, "outer_momentum": 0.0},
}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "easgd"])
def test_one_worker_is_the_plain_optimiser(name, problem):
    """But for EASGD, whose one worker is drawn to its centre; DiLoCo with an outer step of 1, GRAWA without prox."""
    tx, axis_of_one = METHODS[name].build, "worker"
    tx = tx(optimizer(), axis_name=axis_of_one, **(OPTIONS[name] | ALONE.get(name, {})))
    plain = optax.with_extra_args_support(optimizer())
    start, _, gradient_noise = jax.tree.map(lambda a: a[0, :1], problem)

    def train(tx, x, noise):
        def step(carry, noise):
            x, state = carry
            grads = {k: CURVATURES[k] * x[k] + noise[k] for k in x}
            updates, state = tx.update(grads, state, x, value=jnp.sum(x["a"] ** 2))
            x = optax.apply_updates(x, updates)
            return (x, state), x

        return jax.lax.scan(step, (x, tx.init(x)), noise)[1]

    one, other = (jax.jit(jax.vmap(partial(train, t), axis_name="worker"))(start, gradient_noise) for t in (tx, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), one, other)


# How many of 8 workers are not finite after the step on which worker 5's gradient is NaN, the second of a period of 3,
# then after the exchange that follows, and after the next one.
NAN_SPREADS = {
    "lsgd": (1, 1, 1),
    "easgd": (1, 1, 8),
    "downpour": (1, 8, 8),
    "local_sgd": (1, 8, 8),
    "data_parallel": (8, 8, 8),
    "diloco": (1, 8, 8),
    "mgrawa": (1, 8, 8),
    "lgrawa": (1, 8, 8),
    "quorum": (1, 1, 1),
    "coordinate_median": (1, 1, 1),
    "trimmed_mean": (1, 1, 1),
    "independent": (1, 1, 1),
}


@pytest.mark.optimized
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_spreads_as_documented(name, problem):
    start, loss_noise, gradient_noise = problem
    gradient_noise["a"][1, 1, 4, 0] = gradient_noise["b"][1, 1, 4, 0] = np.nan
    path = training(name)(start, loss_noise, gradient_noise)[0]
    broken = ~np.isfinite(path["a"]).all(axis=-1).reshape(8, -1)
    assert not broken[:, :4].any()
    assert broken[5, 4:].all()
    assert tuple(broken[:, (4, 5, 8)].sum(axis=0)) == NAN_SPREADS[name]


@pytest.mark.optimized
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_loss_moves_nobody_and_is_not_reported(name, problem):
    start, loss_noise, gradient_noise = problem
    loss_noise[0, 3, 10:] = np.nan
    path, center, _ = training(name)(start, loss_noise, gradient_noise)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((path, center)))
    if name == "independent":
        assert (np.abs(center["a"][0, 0] - path["a"][0, 3, -1]) > 1e-6).all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.grid])
def test_what_is_tuned_may_be_known_only_when_a_program_runs(name, problem):
    def train(values, *problem):
        return mapped(train_with(name, build(name, **values)), "vmap")(*problem)[0]

    tuned = {option: OPTIONS[name][option] for option in METHODS[name].grid}
    path = jax.jit(train)(tuned, *problem)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), path, training(name)(*problem)[0])


def test_independent_reports_the_best_worker_who_is_finite():
    """The best losses are of a worker whose parameters have gone, and the next best have a NaN among them."""
    tx = build("independent")
    losses = np.array([[0.1, 0.4, 0.3, 0.6], [np.nan, 0.2, 0.5, 0.7]])
    x = np.arange(8.0).reshape(GROUPS, WORKERS)
    x[0, 0] = np.nan

    def report(x, loss):
        _, state = tx.update(x, tx.init(x), x, value=loss)
        return METHODS["independent"].center(x, state, AXES)

    np.testing.assert_array_equal(over_workers(report, "shard_map")(x, losses), np.full((GROUPS, WORKERS), x[1, 1]))


@pytest.mark.parametrize(("name", "mapping"), [*zip(METHODS, itertools.cycle(["vmap", "shard_map"]), strict=False)])
def test_no_recompilation_at_exchanges_or_for_other_learning_rates(name, mapping, problem):
    static = {"static_args": ("axis_name",)}
    rates = optax.inject_hyperparams(scale_by_worker, **static)(rate_factors("linear", (2, 4)), axis_name=AXES)
    tx = build(name, optax.chain(optimizer(), rates))
    traces = 0

    def step(x, state, grads):
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, x, value=jnp.sum(x["a"]))
        return optax.apply_updates(x, updates), state

    step = over_workers(step, mapping)
    x, _, gradient_noise = problem
    x, state = over_workers(lambda x: (x, tx.init(x)), mapping)(x)
    for t in range(7):
        if t == 5:  # The first calls' arguments may be weakly typed, which is another signature.
            before = traces
            state = optax.tree.set(state, factors=2 * optax.tree.get(state, "factors"))
        x, state = step(x, state, jax.tree.map(lambda a, t=t: a[:, :, t], gradient_noise))
    assert traces == before <= 2


@pytest.mark.parametrize(("kind", "factors"), [("linear", range(1, 9)), ("powers", 2.0 ** np.arange(8))])
def test_learning_rates_differ_by_worker(kind, factors):
    tx = optax.chain(optax.sgd(0.5), scale_by_worker(rate_factors(kind, (2, 4)), axis_name=AXES))
    x = np.ones((2, 4))
    updates, _ = over_workers(lambda g: tx.update(g, tx.init(g)), "shard_map")(x)
    np.testing.assert_array_equal(np.ravel(updates), -0.5 * np.array(factors))


def test_learning_rates_of_another_shape_are_one_sentence():
    tx = scale_by_worker(np.ones(8), axis_name=AXES)
    with pytest.raises(ValueError, match=r"shape of the axes \('group', 'worker'\), \(2, 4\), got \(8,\)"):
        over_workers(lambda g: tx.update(g, tx.init(g)), "vmap")(np.ones((2, 4)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("easgd", {"period": 0}, "period must be a whole number of updates, at least 1, got 0"),
        ("easgd", {"center_pull": 1.5}, r"center_pull must be in \[0, 1\], got 1\.5"),
        ("easgd", {"pull": 1.5}, r"pull must be in \[0, 1\], got 1\.5"),
        ("diloco", {"outer_momentum": -0.1}, r"outer_momentum must be in \[0, 1\], got -0\.1"),
        ("mgrawa", {"prox": 2.0}, r"prox must be in \[0, 1\], got 2\.0"),
        ("local_sgd", {"wire": "int8"}, "the wire of an average must be None or \"bfloat16\", got 'int8'"),
        ("local_sgd", {"delay": 2}, "delay must be 0 or 1, got 2"),
        ("quorum", {"kappa": -1.0}, r"kappa must be at least 0, got -1\.0"),
        ("quorum", {"outer_learning_rate": 0.0}, r"outer_learning_rate must be positive, got 0\.0"),
        ("quorum", {"wire": "int8"}, "the wire of an average must be None or \"bfloat16\", got 'int8'"),
        ("quorum", {"global_period": 6}, "global_pull and global_period need groups: pass group_axis_name too"),
        ("trimmed_mean", {"trim": 0.6}, r"trim must be in \[0, 0\.5\], got 0\.6"),
        ("independent", {"window": 0}, "window must be a whole number of losses, at least 1, got 0"),
    ],
)
def test_an_option_out_of_range_is_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", ["easgd", "downpour", "local_sgd", "diloco", "mgrawa", "lsgd", "quorum"])
def test_missing_params_are_one_sentence(name):
    x = {"a": np.ones((2, 4, 2))}
    tx = build(name)
    with pytest.raises(ValueError, match="moves parameters: pass them"):
        over_workers(lambda x: tx.update(x, tx.init(x), value=jnp.sum(x["a"])), "vmap")(x)
