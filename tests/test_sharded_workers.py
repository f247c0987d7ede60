"""Workers that are models sharded over a further mesh axis: the same numbers, and each device sends its own shards."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lsgd_jax import broadcast_from, leader_pull, leader_sgd
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.costs.ledger import rounded_collectives
from lsgd_jax.exchange import broadcast_rounded, largest_axis, sending
from lsgd_jax.methods import METHODS, mean_of_workers
from lsgd_jax.methods.independent import center, independent
from lsgd_jax.variants import links
from tests.mapping import mapped, quickest

AXES, MODEL = ("group", "worker"), "model"
LAYOUTS = {"4 workers of 2": (2, 2, 2), "2 workers of 4": (1, 2, 4)}
"""Groups, workers in each, and devices of each worker."""
BROADCASTS, WIRES = ("all_reduce", "ring", "chain", "hierarchical"), (None, "bfloat16", "int8")
WAYS = [(method, wire, AXES) for method in BROADCASTS for wire in WIRES]
WAYS += [("ring", "int8", "worker"), ("chain", None, "worker")]  # From a root in each group.
SHAPES = {"a": (8, 512), "b": (600, 3), "c": (5,), "d": (516,), "e": (10, 40), "z": (4, 6)}
"""Blocks of d cross its shards, blocks of e those of all devices, and c can't be sharded."""
STEPS = 4


def tree(seed, workers, shapes=SHAPES):
    """An array for every worker by name, [*workers, ...], of which z is complex."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(*workers, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return arrays | ({"z": arrays["z"] * np.complex64(1 + 2j)} if "z" in arrays else {})


def specs_for(devices):
    return partial(largest_axis, axis_name=MODEL, size=devices)


def over_workers(function, layout, kind=AxisType.Auto):
    """Map a function of one sharded worker's arrays over all workers; returns the jitted program and a function that
    puts trees where they belong, by `largest_axis`."""
    devices = jax.devices()[: math.prod(layout)]
    mesh = jax.make_mesh(layout, (*AXES, MODEL), axis_types=(AxisType.Auto, AxisType.Auto, kind), devices=devices)

    def on_devices(*stacked):
        return jax.tree.map(lambda x: x[None, None], function(*jax.tree.map(lambda x: x[0, 0], stacked)))

    def put(stacked):
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), stacked)
        specs = largest_axis(own, MODEL, layout[-1])
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*AXES, *spec))), stacked, specs)

    program = jax.shard_map(on_devices, mesh=mesh, in_specs=P(*AXES), out_specs=P(*AXES), axis_names=set(AXES))
    return mesh, jax.jit(program), put


def assert_close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found, expected)


def received(devices, x, last, roots):
    """What every worker receives in each of these ways."""
    options = {"last": last, "shard_specs": devices and specs_for(devices)}
    return [
        broadcast_rounded(x, roots[0 if axes == AXES else 1], axes, wire=wire, method=method, **options)
        for method, wire, axes in WAYS
    ]


@functools.cache
def to_send(groups, workers):
    """What workers hold and have received last, the roots of all and of each group, and what whole workers receive."""
    x, last = (tree(seed, (groups, workers)) for seed in range(2))
    roots = np.stack([np.full((groups, workers), groups * workers - 1), np.mgrid[:groups, :workers][0]], -1)
    shape = groups, workers
    return x, last, roots, mapped(partial(received, None), quickest(shape), shape)(x, last, roots)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("4 workers of 2", AxisType.Auto),
        ("2 workers of 4", AxisType.Auto),
        ("4 workers of 2", AxisType.Explicit),
    ],
)
def test_every_broadcast_gives_what_whole_workers_receive(name, kind):
    layout = LAYOUTS[name]
    groups, workers, devices = layout
    x, last, roots, expected = to_send(groups, workers)
    mesh, program, put = over_workers(partial(received, devices if kind == AxisType.Auto else None), layout, kind)
    with jax.set_mesh(mesh):
        found = program(put(x), put(last), jax.device_put(roots, NamedSharding(mesh, P(*AXES))))
    for (_, wire, _), of_shards, of_whole in zip(WAYS, found, expected, strict=True):
        if wire is None:
            jax.tree.map(np.testing.assert_array_equal, of_shards, of_whole)
        assert_close(of_shards, of_whole)


def test_how_arrays_lie_need_not_be_known():
    """Without specs they are taken to lie along their largest axes; where they do not, the numbers are right, too."""
    layout = LAYOUTS["4 workers of 2"]
    mesh, program, _ = over_workers(
        lambda x: [
            broadcast_rounded(x, 2, AXES, wire=wire, last=x, method=m) for m in BROADCASTS for wire in WIRES[:2]
        ],
        layout,
    )
    x = {"a": np.random.default_rng(0).normal(size=(2, 2, 4, 12)).astype(jnp.bfloat16)}
    for spec in (P(*AXES), P(*AXES, MODEL)):
        for found in program(jax.device_put(x, NamedSharding(mesh, spec))):
            np.testing.assert_array_equal(found["a"], np.broadcast_to(x["a"][1, 0], x["a"].shape))


OPTIONS = {
    "lsgd": {
        "period": 2,
        "pull": 0.3,
        "global_pull": 0.2,
        "global_period": 4,
        "window": 1,
        "broadcast": "ring",
        "wire": "int8",
    },
    "local_sgd": {"period": 2, "wire": "bfloat16"},
    "independent": {},
    "data_parallel": {},
}


OF_EACH_EXCHANGE = ["lsgd", "local_sgd", "lgrawa", "quorum", "coordinate_median", "data_parallel"]
"""One method per kind of exchange."""
TRAINED = [("4 workers of 2", method) for method in METHODS]
TRAINED += [("2 workers of 4", method) for method in OF_EACH_EXCHANGE]


def trained(methods, devices, x, losses):
    """By method, where a few steps take a worker, the evaluated model, and for LSGD leaders and distances."""
    results = {}
    for name in methods:
        method = METHODS[name]
        options = OPTIONS.get(name, {"period": 2})
        optimizer = optax.sgd(0.1, momentum=0.9)
        tx = method.built(
            optimizer, options, groups=("group",), workers=("worker",), shard_specs=devices and specs_for(devices)
        )

        def step(carry, now, tx=tx):
            x, state = carry
            number, loss = now
            grads = jax.tree.map(lambda x: (0.1 + loss) * jnp.conj(x), x)
            updates, state = tx.update(grads, state, x, value=loss, step=number)
            leaders = [(link.leader.position, link.leader.distance) for link in links(state)]
            return (optax.apply_updates(x, updates), state), leaders

        (after, state), leaders = jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(STEPS), losses))
        results[name] = after, method.center(after, state, AXES), leaders
    return results


@functools.cache
def results(layout):
    """What the methods come to with sharded workers and with whole ones: one program each."""
    groups, workers, devices = LAYOUTS[layout]
    methods = [method for of, method in TRAINED if of == layout]
    x = tree(2, (groups, workers), {"c": (5,), "d": (3, 516)})  # Not on shards, and with blocks that cross them.
    losses = np.random.default_rng(3).uniform(size=(groups, workers, STEPS)).astype(np.float32)

    def on_devices(devices):
        mesh, program, put = over_workers(partial(trained, methods, devices), (groups, workers, devices))
        # On simulated devices, one program at a time.
        return jax.block_until_ready(program(put(x), jax.device_put(losses, NamedSharding(mesh, P(*AXES)))))

    # Not vmapped: XLA leaves some roundings to bfloat16 out where nothing is sent.
    return on_devices(devices), on_devices(1)


@pytest.mark.parametrize(("layout", "method"), TRAINED)
def test_sharded_workers_of_every_method_go_where_whole_ones_go(layout, method):
    found, expected = (result[method] for result in results(layout))
    assert_close(found, expected)
    for (positions, _), (same, _) in zip(found[2], expected[2], strict=True):
        np.testing.assert_array_equal(positions, same)


TRANSFORMER = {
    "embedding": (512, 64),
    "attention": (2, 64, 4, 16),
    "up": (2, 64, 256),
    "down": (2, 256, 64),
    "scale": (2, 64),
    "head": (1,),
}
"""Parameters of a language model, its layers stacked."""


def exchange_of(method, wire, shapes=TRANSFORMER):
    """The collectives of one exchange among 4 workers of 2 devices, and how many bytes whole workers send."""
    specs = specs_for(2)
    tx = leader_pull(0.3, axis_name=AXES, window=1, sending=sending(wire, method, specs))

    def step(x, state, loss):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, x), state, x, value=loss)
        return optax.apply_updates(x, updates), state

    layout = (1, 4, 2)
    mesh, program, _ = over_workers(step, layout)

    def stacked(x):
        spec = P(*AXES, *largest_axis(x, MODEL, 2))
        return jax.ShapeDtypeStruct((1, 4, *x.shape), x.dtype, sharding=NamedSharding(mesh, spec))

    x = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(tx.init, x)
    arguments = jax.tree.map(stacked, (x, state, jax.ShapeDtypeStruct((), np.float32)))
    found = collectives(program.lower(*arguments).compile().as_text(), chips=2)
    resolved = "ring" if method == "auto" else method
    return found, sum(each.sent * each.times for each in rounded_collectives(list(x.values()), (4,), resolved, wire))


@pytest.mark.parametrize(
    ("method", "wire"),
    [
        ("all_reduce", None),
        ("ring", None),
        ("ring", "int8"),
        ("chain", None),
        ("hierarchical", "bfloat16"),
        ("auto", None),
    ],
)
def test_each_device_sends_its_share_and_gathers_nothing(method, wire, monkeypatch):
    """Also if "auto" is a ring, as on GPUs for a megabyte of parameters."""
    shapes = TRANSFORMER
    if method == "auto":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        shapes = TRANSFORMER | {"embedding": (8192, 64)}
    found, of_whole = exchange_of(method, wire, shapes)
    within, among = ([each for each in found if each.within_worker is kind] for kind in (True, False))
    scalars = 2 * 4 * len(shapes)  # Finiteness and distance.
    assert {each.kind for each in within} <= {"all-reduce"}
    assert sum(each.bytes for each in within) <= scalars + (0 if wire is None else 0.05 * of_whole)
    # A chain has a branch for each of the 4 roots, of which one is taken.
    sent = sum(
        each.sent * each.times * (1 if method != "chain" or each.kind == "all-reduce" else 1 / 4) for each in among
    )
    assert of_whole / 2 * 0.95 <= sent <= 1.05 * (of_whole / 2)
    expected = {"all_reduce": {"all-reduce"}}.get(method, {"all-reduce", "collective-permute"})
    assert {each.kind for each in among} == expected


def test_the_default_broadcast_gathers_no_worker_of_which_nobody_knows_how_it_lies(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, program, put = over_workers(lambda x: broadcast_from(x, 1, AXES), (1, 4, 2))
    found = collectives(program.lower(put({"a": jnp.zeros((1, 4, 1024, 512))})).compile().as_text())
    assert {each.kind for each in found} == {"all-reduce"}
    shard = 1024 * 512 * 4 / 2
    assert shard <= sum(each.bytes for each in found if each.group_size == 4) < 1.05 * shard


def test_specs_may_be_of_more_than_what_is_exchanged():
    """Of masked parameters, here an integer's, the specs are left out."""
    fixed = {"w": P(MODEL), "steps": P()}
    tx = leader_sgd(optax.sgd(0.1), axis_name=AXES, period=1, broadcast="ring", shard_specs=lambda tree: fixed)

    def step(x, loss):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, x), tx.init(x), x, value=loss)
        return optax.apply_updates(x, updates)

    x = {"w": np.arange(16, dtype=np.float32).reshape(1, 4, 4), "steps": np.zeros((1, 4), np.int32)}
    losses = np.array([[3, 1, 2, 4]], np.float32)
    mesh, program, put = over_workers(step, (1, 4, 2))
    found = program(put(x), jax.device_put(losses, NamedSharding(mesh, P(*AXES))))
    np.testing.assert_allclose(found["w"], x["w"] - 0.1 * (x["w"] - x["w"][:, 1:2]), rtol=1e-6)


WHOLE_NORMS = {
    "lsgd": {"pull": 0.3, "period": 2, "window": 2, "revive": "from_leader", "stale_pull": 0.1},
    "quorum": {"period": 2, "window": 2, "revive": "from_leader"},
    "coordinate_median": {"period": 2},
    "mgrawa": {"period": 2},
    "lgrawa": {"period": 2},
}


@pytest.mark.parametrize("checked", [True, False])
def test_workers_spread_over_manual_axes_have_the_norms_of_all_their_parts(checked):
    """Arrays that all devices have count once where replication is checked; one part of one worker is not finite."""
    shapes = {"w": (4, 6), "v": (2, 3)} | ({"b": (3,)} if checked else {})
    x, losses = tree(4, (4,), shapes), np.random.default_rng(5).uniform(size=(4, 6)).astype(np.float32)
    gradients = tree(6, (4, 6), shapes)
    gradients["w"][1, 1, 3, 0] = np.nan  # In the second device's part.

    def train(model_axis_name, x, gradients, losses):
        results = {}
        for name, options in WHOLE_NORMS.items():
            tx = METHODS[name].build(optax.sgd(0.1), axis_name="worker", model_axis_name=model_axis_name, **options)
            own = gradients if "revive" in options else jax.tree.map(jnp.nan_to_num, gradients)

            def step(carry, now, tx=tx):
                x, state = carry
                gradient, loss = now
                updates, state = tx.update(gradient, state, x, value=loss)
                x = optax.apply_updates(x, updates)
                return (x, state), [link.leader.distance for link in links(state)]

            (after, state), distances = jax.lax.scan(step, (x, tx.init(x)), (own, losses))
            results[name] = after, [link.leader.position for link in links(state)], distances
        return results

    expected = jax.jit(jax.vmap(partial(train, None), axis_name="worker"))(x, gradients, losses)
    mesh = jax.make_mesh((4, 2), ("worker", MODEL), axis_types=(AxisType.Auto,) * 2)
    own = {name: P("worker") if name == "b" else P("worker", MODEL) for name in shapes}
    of_steps = {name: P("worker") if name == "b" else P("worker", None, MODEL) for name in shapes}
    out = {name: (own, P("worker"), P("worker")) for name in WHOLE_NORMS}

    def on_devices(*stacked):
        result = train(MODEL, *jax.tree.map(lambda x: x[0], stacked))
        return jax.tree.map(lambda x: x[None], result)

    program = jax.shard_map(
        on_devices, mesh=mesh, in_specs=(own, of_steps, P("worker")), out_specs=out, check_vma=checked
    )
    found = jax.jit(program)(x, gradients, losses)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected["lsgd"][0]))
    assert_close(found, expected)


def test_a_worker_of_whom_one_part_is_not_finite_is_not_reported_where_all_axes_are_manual():
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    x[0, 5] = np.nan  # In the second device's part, of the worker with the lowest score.
    start = independent(optax.sgd(0.1), axis_name="worker").init(x[0])
    mesh = jax.make_mesh((3, 2), ("worker", MODEL), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])

    def centers(x, score):
        mean = mean_of_workers(x[0], None, "worker", MODEL)
        return mean, center(x[0], start._replace(score=score[0]), "worker", MODEL)

    program = jax.shard_map(centers, mesh=mesh, in_specs=(P("worker", MODEL), P("worker")), out_specs=P(MODEL))
    mean, best = jax.jit(program)(x, np.array([1, 3, 2], np.float32))
    np.testing.assert_array_equal(mean, (x[1] + x[2]) / 2)
    np.testing.assert_array_equal(best, x[2])


def test_the_largest_axis_that_devices_divide():
    tree = {
        "w": jnp.zeros((3, 8, 8)),
        "b": jnp.zeros(3),
        "n": jnp.zeros(()),
        "none": jnp.zeros((0, 4)),
        "x": jnp.zeros(9),
    }
    specs = {"w": P(None, "chip"), "b": P(), "n": P(), "none": P(None, "chip"), "x": P()}
    assert largest_axis(tree, "chip", 4) == specs
    assert jax.tree.leaves(largest_axis(tree, "chip", 1)) == [P()] * len(tree)
    assert math.prod(LAYOUTS["4 workers of 2"]) == len(jax.devices())
