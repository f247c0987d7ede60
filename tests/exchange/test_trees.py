"""Which arrays are exchanged, and arithmetic on them; every transformation on trees that are not plain floats."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lsgd_jax import exchange, leader_pull, leader_sgd, lsgd
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.exchange import trees
from lsgd_jax.methods import METHODS
from tests.mapping import GROUPS, WORKERS, mapped, need_devices

AXES = ("group", "worker")
LSGD = {"easgd": {}, "lsgd": {}, "delayed": {"delay": 1}, "stale": {"stale_pull": 0.5}, "int8": {"wire": "int8"}}
LSGD |= {"revived": {"revive": "from_leader"}}
TRANSFORMATIONS = {name: partial(METHODS[name].build, axis_name=AXES) for name in METHODS} | {
    name: partial(leader_sgd, axis_name=AXES, period=1, pull=0.5, **options)
    for name, options in LSGD.items()
    if name != "easgd"
}
TRANSFORMATIONS |= {
    f"local_sgd {option}": partial(METHODS["local_sgd"].build, axis_name=AXES, **{option: value})
    for option, value in (("delay", 1), ("wire", "bfloat16"))
}


def steps_of(tx, count=2, mapping="vmap"):
    """Some updates from a tree, [group, worker, ...], with gradients of ones where there are floats."""

    def train(x, loss):
        def step(carry, number):
            x, state = carry
            updates, state = tx.update(jax.tree.map(jnp.ones_like, x), state, x, value=loss, step=number)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), jnp.arange(count))[0][0]

    losses = np.arange(8, dtype=np.float32).reshape(GROUPS, WORKERS)
    return jax.jit(lambda x: mapped(train, mapping)(x, losses))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_trees_without_leaves_are_taken(name):
    tx = TRANSFORMATIONS[name](optax.sgd(0.1))
    assert steps_of(tx)({"nothing": None}) == {"nothing": None}
    masked = optax.masked(TRANSFORMATIONS[name](optax.sgd(0.1)), {"w": False})
    x = jnp.ones((GROUPS, WORKERS, 3))
    np.testing.assert_array_equal(steps_of(masked, 1)({"w": x})["w"], x + 1)  # As it came, the gradient is the update.


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_state_can_be_mapped_over_as_optax_does(name):
    """With a tree in the shape of the parameters, such as their shardings, and with whatever stands for one array."""
    tx, params = TRANSFORMATIONS[name](optax.adam(0.1)), {"w": jnp.ones(3), "b": jnp.ones((2, 2))}
    state, dimensions = tx.init(params), {"w": 1, "b": 2}
    mapped = optax.tree.map_params(tx, lambda x, dimension: jnp.full(x.shape, dimension), state, dimensions)
    of_params = [leaf for leaf in jax.tree.leaves(mapped) if leaf.shape in ((3,), (2, 2))]
    assert len(of_params) >= 4  # Two moments for each array.
    assert all((leaf == leaf.ndim).all() for leaf in of_params)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def steps_in_a_scan(tx):
    """What `jax.lax.scan` takes only if all types, shardings among them, are after an update as at the start."""

    def train(x, loss):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, x), state, x, value=loss)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=2)[0][0]

    return train


@pytest.mark.parametrize("x", [{"nothing": None}, {"count": jnp.zeros((GROUPS, WORKERS, 3), jnp.int32)}], ids=list)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_state_keeps_its_types_if_nothing_is_exchanged(name, x):
    program = mapped(steps_in_a_scan(TRANSFORMATIONS[name](optax.sgd(0.1))), "shard_map")
    after = jax.eval_shape(program, x, jnp.zeros((GROUPS, WORKERS)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), x)


def over_spread_workers(function, kind):
    """A function and a mesh for 4 workers of 2 devices each, of which it sees one with its arrays sharded over both."""
    need_devices(8)
    mesh = jax.make_mesh((1, 4, 2), (*AXES, "model"), axis_types=(AxisType.Auto, AxisType.Auto, kind))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(*AXES), out_specs=P(*AXES), axis_names=set(AXES))
    def on_devices(*stacked):
        return jax.tree.map(lambda x: x[None, None], function(*jax.tree.map(lambda x: x[0, 0], stacked)))

    return jax.jit(on_devices), mesh


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_arrays_may_be_sharded_over_an_explicit_axis(name, dtype):
    program, mesh = over_spread_workers(steps_in_a_scan(TRANSFORMATIONS[name](optax.sgd(0.1))), AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = {"w": jax.device_put(jnp.ones((1, 4, 3, 2), dtype), NamedSharding(mesh, P(*AXES, None, "model")))}
        after = jax.eval_shape(program, x, jnp.zeros((1, 4)))
    assert (after["w"].shape, after["w"].dtype) == (x["w"].shape, dtype)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sums_of_bfloat16_where_a_worker_is_spread_over_devices(kind):
    """XLA's own, on CPUs, end the process."""
    program, mesh = over_spread_workers(lambda x: (exchange.total(x, AXES), exchange.mean(x, AXES)), kind)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(8, dtype=jnp.bfloat16).reshape(1, 4, 2), NamedSharding(mesh, P(*AXES, "model")))
        total, mean = program(x)
    assert total.dtype == mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(total[0], np.float32), np.tile([12, 16], (4, 1)))
    np.testing.assert_array_equal(np.asarray(mean[0], np.float32), np.tile([3, 4], (4, 1)))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_parameters_may_be_numbers_of_python_at_the_start(name):
    tx = TRANSFORMATIONS[name](optax.sgd(0.1))
    of_numbers, of_arrays = (tx.init(x) for x in ({"w": 1.0, "n": 2}, {"w": jnp.ones(()), "n": jnp.array(2)}))
    assert jax.tree.structure(of_numbers) == jax.tree.structure(of_arrays)


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name not in ("independent", "data_parallel")])
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"w": 3}, r"at \['b'\] they have nothing in place of \(2,\)"),
        ({"w": 3, "b": None}, r"at \['b'\] they have nothing in place of \(2,\)"),
        ({"w": 3, "b": 1}, r"at \['b'\] they have \(1,\) in place of \(2,\)"),
        ({"w": 3, "b": 2, "c": 2}, r"at \['c'\] they have \(2,\) in place of nothing"),
    ],
    ids=str,
)
def test_gradients_of_another_structure_are_one_sentence(name, grads, message):
    tx, x = TRANSFORMATIONS[name](optax.sgd(0.1)), {"w": jnp.ones(3), "b": jnp.ones(2), "n": jnp.array(1)}
    grads = jax.tree.map(jnp.ones, grads) | {"n": None}
    with pytest.raises(ValueError, match=f"the structure and the shapes of the parameters, but {message}"):
        tx.update(grads, tx.init(x), x, value=jnp.float32(1))


@pytest.mark.optimized
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_arrays_without_numbers_and_integers_are_left_alone(name):
    tx = TRANSFORMATIONS[name](
        optax.partition(
            {"train": optax.sgd(0.1), "not": optax.set_to_zero()},
            {"w": "train", "empty": "train", "count": "not", "flag": "not"},
        )
    )
    x = {
        "w": jnp.arange(24.0).reshape(GROUPS, WORKERS, 3),
        "empty": jnp.zeros((GROUPS, WORKERS, 0)),
        "count": jnp.arange(8).reshape(GROUPS, WORKERS) * 30030,
        "flag": (jnp.arange(8).reshape(GROUPS, WORKERS) % 2).astype(bool),
    }
    after = jax.block_until_ready(steps_of(tx, 4, "shard_map")(x))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
    np.testing.assert_array_equal(after["count"], x["count"])
    np.testing.assert_array_equal(after["flag"], x["flag"])
    assert (np.asarray(after["w"]) != np.asarray(x["w"])).any()


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name not in ("independent", "data_parallel")])
def test_a_frozen_parameter_is_neither_moved_nor_sent_nor_stored(name):
    """As in LoRA: a large base that the optimizer freezes beside small adapters."""
    freeze = optax.partition(
        {"train": optax.sgd(0.1), "frozen": optax.set_to_zero()}, {"lora": "train", "base": "frozen"}
    )
    tx = TRANSFORMATIONS[name](freeze)
    rng = np.random.default_rng(0)
    x = {"lora": rng.normal(size=(GROUPS, WORKERS, 10)), "base": rng.normal(size=(GROUPS, WORKERS, 5000))}
    x = {name: a.astype(np.float32) for name, a in x.items()}
    steps = steps_of(tx, 4, "shard_map").lower(x).compile()
    after = jax.block_until_ready(steps(x))
    np.testing.assert_array_equal(after["base"], x["base"])
    assert (np.asarray(after["lora"]) != x["lora"]).all()
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, {k: a[0, 0] for k, a in x.items()}))]
    assert max(sizes) <= 10
    sent = sum(each.sent * (each.times or 1) for each in collectives(steps.as_text()))
    assert 0 < sent < 4 * 1000  # Bytes, in 4 steps.


def test_an_optimizer_that_can_not_be_traced_alone_trains_everything():
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}

    def update(updates, state, params=None, *, temperature, **_):
        return jax.tree.map(lambda u: 0 * temperature * u, updates), state

    optimizer = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    exchanged = trees.exchanged_with(optimizer, "worker")(params)
    assert isinstance(exchanged["n"], optax.MaskedNode)
    np.testing.assert_array_equal(exchanged["w"], params["w"])


FREEZE = optax.partition({"train": optax.sgd(0.1), "frozen": optax.set_to_zero()}, {"lora": "train", "base": "frozen"})
LORA = {"lora": jnp.ones(2), "base": jnp.ones((3, 2))}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(
            optax.clip_by_global_norm(1.0), FREEZE, optax.scale_by_learning_rate(lambda count: 1 / (1 + count))
        ),
        optax.GradientTransformation(FREEZE.init, jax.jit(FREEZE.update)),
        optax.inject_hyperparams(lambda rate: optax.chain(FREEZE, optax.scale(rate)))(0.5),
        optax.chain(optax.stateless(lambda u, _: jax.lax.pmean(u, "worker")), FREEZE),
    ],
    ids=["chained", "jitted", "injected", "with a collective"],
)
def test_what_is_frozen_is_found_whatever_comes_before_and_after(optimizer):
    """The same within the axes and outside of them, since `init` may be called here or there."""
    trained = [trees.exchanged_with(optimizer, "worker")(LORA)]
    worker = jax.tree.map(lambda x: x[None], LORA)
    jax.vmap(lambda x: trained.append(trees.exchanged_with(optimizer, "worker")(x)), axis_name="worker")(worker)
    assert [isinstance(tree["base"], optax.MaskedNode) for tree in trained] == [True, True]
    assert not any(isinstance(tree["lora"], optax.MaskedNode) for tree in trained)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(FREEZE, optax.add_decayed_weights(0.1)),
        optax.sgd(0.0),
        optax.sgd(lambda count: 0.0, momentum=0.9),
        optax.adamw(0.0),
    ],
    ids=["decay", "sgd", "schedule", "adamw"],
)
def test_decay_trains_what_is_frozen_and_a_learning_rate_of_zero_freezes_nothing(optimizer):
    assert jax.tree.structure(trees.exchanged_with(optimizer, "worker")(LORA)) == jax.tree.structure(LORA)


@pytest.mark.parametrize("clips", [False, True])
def test_data_parallel_averages_what_the_optimizer_reads(clips):
    """A norm of all gradients has those of frozen parameters in it, and workers have to stay together."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), FREEZE) if clips else FREEZE
    tx = METHODS["data_parallel"].build(optimizer, axis_name="worker")
    grads = {"lora": jnp.ones((4, 2)), "base": jnp.arange(24.0).reshape(4, 3, 2)}

    def update(grads):
        return tx.update(grads, tx.init(LORA), LORA)[0]

    updates = np.asarray(jax.jit(jax.vmap(update, axis_name="worker"))(grads)["lora"])
    np.testing.assert_array_equal(updates, np.broadcast_to(updates[:1], (4, 2)))
    read = trees.read_by(optimizer, "worker")(LORA)
    assert isinstance(read["base"], optax.MaskedNode) is not clips


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["local_sgd", "downpour", "diloco"])
def test_workers_of_16_bits_that_go_to_one_point_agree(name):
    tx = METHODS[name].build(optax.sgd(0.01), axis_name="worker", period=1)
    x = jax.random.normal(jax.random.key(0), (4, 1000)).astype(jnp.bfloat16)

    def train(x):
        state = tx.init(x)
        for step in range(2):
            updates, state = tx.update(x.astype(jnp.float32), state, x, value=jnp.float32(0), step=step)
            x = optax.apply_updates(x, updates)
        return x

    after = np.asarray(jax.jit(jax.vmap(train, axis_name="worker"))(x))
    np.testing.assert_array_equal(after, np.broadcast_to(after[:1], after.shape))


def test_independent_reports_keys_and_integers_of_its_own():
    tx = METHODS["independent"].build(optax.sgd(0.1), axis_name="worker")

    def center(x, loss):
        _, state = tx.update({"w": x["w"]}, tx.init({"w": x["w"]}), {"w": x["w"]}, value=loss)
        return METHODS["independent"].center(x, state, "worker")

    keys = jax.random.split(jax.random.key(0), 3)
    x = {"w": jnp.arange(3.0), "n": jnp.arange(3), "key": keys}
    found = jax.jit(jax.vmap(center, axis_name="worker"))(x, jnp.array([2.0, 1.0, 3.0]))
    np.testing.assert_array_equal(found["w"], [1, 1, 1])
    np.testing.assert_array_equal(found["n"], [0, 1, 2])
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(keys))


def test_masks_go_in_and_out():
    tree = {"w": 1.0, "n": 2, "none": None}
    masked = trees.inexact(tree)
    assert masked == {"w": 1.0, "n": optax.MaskedNode(), "none": None}
    assert trees.like(masked, {"w": 5, "n": 6, "none": None}) == {"w": 5, "n": optax.MaskedNode(), "none": None}
    assert trees.merged({"w": 7, "n": optax.MaskedNode(), "none": None}, tree) == {"w": 7, "n": 2, "none": None}


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_is_widened_has_been_rounded(dtype):
    x = jax.random.normal(jax.random.key(0), (1000,))
    found = jax.jit(lambda x: trees.wide((x + 1).astype(dtype)))(x)
    np.testing.assert_array_equal(found, (np.asarray(x) + 1).astype(dtype).astype(np.float32))
    least = np.finfo(np.float32).smallest_normal if dtype == jnp.bfloat16 else np.float32(2**-24)
    assert jax.jit(trees.wide)(jnp.array(least, dtype)) == least


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    x, rounding = np.float32(1.00123), jax.jit(lambda x, key: trees._rounded(x, dtype, key))
    rounded = rounding(np.full(100_000, x), jax.random.key(0))
    assert rounded.dtype == dtype
    places = np.unique(np.asarray(rounded, np.float32))
    assert len(places) == 2
    assert places[0] < x < places[1]
    spread = (places[1] - places[0]) / 2 / np.sqrt(100_000)
    assert abs(np.asarray(rounded, np.float64).mean() - x) < 4 * spread
    exact = np.resize(np.array([1.5, 0.0, -2.0, np.inf], np.float32), 100_000)
    np.testing.assert_array_equal(np.asarray(rounding(exact, jax.random.key(1)), np.float32), exact)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_nearest_value_is_that_of_numpy(dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    x = np.concatenate([values[np.isfinite(values)] * np.float32(scale) for scale in (0.999, 1, 1.0007)])
    x = x[(x == 0) | (np.abs(x) >= np.finfo(np.float32).tiny)]  # CPUs take others for zero.
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(trees.nearest(jnp.asarray(x), dtype), x.astype(dtype).astype(np.float32))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_is_not_compiled_away(dtype):
    """XLA may keep more digits than a cast leaves, and does on GPUs: no conversion there and back may matter."""
    lowered = jax.jit(lambda x: trees._rounded(x, dtype, jax.random.key(0))).lower(jnp.ones(4))
    assert "reduce_precision" in lowered.as_text()
    assert "reduce-precision" in lowered.compile().as_text()


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_workers_reach_their_leader_whatever_the_dtype(dtype):
    tx = leader_pull(0.1, axis_name="worker")
    x = jnp.asarray([1.0, 1.03125, 1.0625, 0.97], dtype)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jnp.zeros_like(x), state, x, value=jax.lax.axis_index("worker").astype(float))
        return (optax.apply_updates(x, updates), state), None

    def train(x):
        return jax.lax.scan(step, (x, tx.init(x)), length=300)[0][0]

    after = jax.jit(jax.vmap(train, axis_name="worker"))(x)
    assert after.dtype == dtype
    np.testing.assert_allclose(np.asarray(after, np.float64), 1.0, rtol=1e-6)


def test_a_distance_in_float16_does_not_overflow():
    tx = leader_pull(0.1, axis_name="worker")

    def exchange(x, loss):
        return tx.update(jnp.zeros_like(x), tx.init(x), x, value=loss)[1].leader.distance

    x = np.array([[0], [632]], np.float16).repeat(100, axis=1)
    distances = jax.jit(jax.vmap(exchange, axis_name="worker"))(x, np.arange(2, dtype=np.float32))
    np.testing.assert_allclose(distances, [0, 6320])


def test_complex_parameters_are_pulled_in_both_parts():
    tx = leader_pull(0.5, axis_name="worker")
    x = jnp.array([1 + 1j, 2 + 2j, 3 + 3j, 5 + 5j], jnp.complex64)

    def step(x, loss):
        updates, state = tx.update(jnp.zeros_like(x), tx.init(x), x, value=loss)
        return optax.apply_updates(x, updates), state.leader.distance

    after, distance = jax.jit(jax.vmap(step, axis_name="worker"))(x, jnp.array([3.0, 2.0, 1.0, 4.0]))
    np.testing.assert_array_equal(after, [2 + 2j, 2.5 + 2.5j, 3 + 3j, 4 + 4j])
    np.testing.assert_allclose(distance, np.sqrt([8, 2, 0, 8]), rtol=1e-6)


@pytest.mark.parametrize(
    ("params", "grads", "updates"),
    [
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_dtypes_of_parameters_stay_whatever_those_of_gradients(name, params, grads, updates):
    tx = TRANSFORMATIONS[name](optax.sgd(0.1))

    def train(x):
        def step(carry, number):
            x, state = carry
            moves, state = tx.update(jnp.ones_like(x, grads), state, x, value=jnp.float32(1), step=number)
            return (optax.apply_updates(x, moves), state), moves

        (x, _), moves = jax.lax.scan(step, (x, tx.init(x)), jnp.arange(3))
        return x, moves

    x, moves = jax.eval_shape(mapped(train, "shard_map"), jax.ShapeDtypeStruct((GROUPS, WORKERS, 3), params))
    assert x.dtype == params
    assert name in ("independent", "data_parallel") or moves.dtype == updates


def test_lsgd_can_be_injected_with_hyperparameters():
    import inspect

    static = set(inspect.signature(lsgd).parameters) - {"learning_rate", "pull"}
    tx = optax.inject_hyperparams(lsgd, static_args=static)(0.1, axis_name="worker", period=1, pull=0.5)
    x = jnp.arange(4.0)
    state = jax.jit(jax.vmap(tx.init))(x)
    assert set(state.hyperparams) == {"learning_rate", "pull"}
    state.hyperparams["pull"] = jnp.ones(4)
    state.hyperparams["learning_rate"] = jnp.zeros(4)
    update = jax.vmap(lambda x, s: tx.update(x, s, x, value=x)[0], axis_name="worker")
    np.testing.assert_array_equal(x + jax.jit(update)(x, state), np.zeros(4))


@pytest.mark.parametrize("mapping", ["alone", "vmap"])
@pytest.mark.parametrize("missing", ["period", "window", "delay", "global_period"])
def test_an_injected_option_that_has_to_be_static_is_one_sentence(missing, mapping):
    static = {"period", "window", "delay", "global_period"} - {missing}
    options = {"axis_name": "worker", "group_axis_name": "group", "period": 2, "global_period": 4}
    init = optax.inject_hyperparams(lsgd, static_args=static)(0.1, **options).init
    with pytest.raises(ValueError, match=rf'^{missing} can\'t .*, got an array: .* list "{missing}" in static_args\.'):
        (jax.vmap(init) if mapping == "vmap" else init)(jnp.ones(2))
