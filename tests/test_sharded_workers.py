"""Workers that are models sharded over a further mesh axis, which the shard_map over the workers leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lsgd_jax import broadcast_from, leader_pull
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.exchange import sending

WORKERS, SHARDS, STEPS = 4, 2, 3
SPECS = {"a": P("worker", None, "model"), "b": P("worker", "model"), "c": P("worker"), "d": P("worker", "model")}
SHAPES = {"a": (8, 512), "b": (600, 3), "c": (5,), "d": (514,)}  # Blocks of d cross its shards.


def over_sharded_workers(function, kind):
    """Map a function over the workers, on devices between which each worker's arrays are sharded; jitted."""
    mesh = jax.make_mesh((WORKERS, SHARDS), ("worker", "model"), axis_types=(kind,) * 2)

    def on_devices(*stacked):
        result = function(*jax.tree.map(lambda x: x[0], stacked))
        return jax.tree.map(lambda x: x[None], result)

    worker = P("worker")
    return mesh, jax.jit(jax.shard_map(on_devices, mesh=mesh, in_specs=worker, out_specs=worker, axis_names={"worker"}))


def put(tree, mesh):
    return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}


def arrays(seed, *shape):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(WORKERS, *shape, *of)).astype(np.float32) for name, of in SHAPES.items()}


def train(tx, x, losses):
    """A few steps of one worker, who goes its own way between the exchanges."""
    state = tx.init(x)
    for loss in losses:
        updates, state = tx.update(jax.tree.map(lambda x: 0.1 * loss * x, x), state, x, value=loss)
        x = optax.apply_updates(x, updates)
    return x, state.leader.position, state.leader.distance


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("wire", [None, "bfloat16", "int8"])
def test_sharded_workers_are_pulled_as_others_are(wire, kind):
    function = functools.partial(train, leader_pull(0.3, axis_name="worker", window=1, sending=sending(wire)))
    x, losses = arrays(0), np.random.default_rng(1).uniform(size=(WORKERS, STEPS)).astype(np.float32)
    expected = jax.jit(jax.vmap(function, axis_name="worker"))(x, losses)
    mesh, program = over_sharded_workers(function, kind)
    with jax.set_mesh(mesh):
        found = program(put(x, mesh), jax.device_put(losses, NamedSharding(mesh, P("worker"))))
    np.testing.assert_array_equal(found[1], expected[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.parametrize("wire", [None, "int8"])
def test_the_default_broadcast_gathers_no_worker(wire, monkeypatch):
    """Also on GPUs, where it is a ring for workers of one device, and a megabyte of parameters."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    function = functools.partial(train, leader_pull(0.3, axis_name="worker", sending=sending(wire)))
    mesh, program = over_sharded_workers(function, AxisType.Auto)
    x = {"a": jnp.zeros((WORKERS, 1024, 512))}
    found = collectives(program.lower(put(x, mesh), jnp.zeros((WORKERS, 1))).compile().as_text())
    assert {each.kind for each in found} == {"all-reduce"}
    shard = 1024 * 512 * (1 if wire else 4) / SHARDS
    assert shard <= sum(each.bytes for each in found if each.group_size == WORKERS) < 1.05 * shard


def test_methods_that_flatten_still_work_over_auto_axes():
    x = arrays(0)
    for method in ("ring", "chain", "hierarchical"):
        mesh, program = over_sharded_workers(
            lambda x, m=method: broadcast_from(x, 2, "worker", method=m), AxisType.Auto
        )
        received = program(put(x, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.broadcast_to(b[2], b.shape)), received, x)


@pytest.mark.parametrize("method", ["ring", "chain", "hierarchical"])
def test_methods_that_flatten_refuse_explicit_axes(method):
    mesh, program = over_sharded_workers(
        lambda x: broadcast_from(x, 2, "worker", method=method, chunks=2), AxisType.Explicit
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=f"'{method}' .* Explicit mesh axis 'model': use 'all_red"):
        program(put(arrays(0), mesh))
