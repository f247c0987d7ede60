"""What is sent rounded: equal on all workers, finite, and within the bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax import NOBODY, broadcast_from
from lsgd_jax.exchange import broadcast_rounded
from tests import oracle
from tests.mapping import GROUPS, MAPPINGS, WORKERS, over_workers

EVERYONE = ("group", "worker")
METHODS = ("all_reduce", "ring", "chain", "hierarchical")
FLOATS = (np.float16, jnp.bfloat16, np.float32, np.float64)
SHAPES = ((), (3,), (2, 300), (0,), (5, 0, 2))


@pytest.mark.optimized
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_bfloat16_is_the_leader_rounded_once(mapping, method):
    x = np.random.default_rng(0).normal(size=(GROUPS, WORKERS, 5)).astype(np.float32)
    send = over_workers(lambda x: broadcast_rounded(x, 6, EVERYONE, wire="bfloat16", method=method), mapping)
    expected = np.asarray(x[1, 2]).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(send(x), np.broadcast_to(expected, x.shape))


@pytest.mark.optimized
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_int8_is_a_closed_loop(mapping):
    """All ends hold the same, the error is a 254th of the largest difference, and it does not add up."""
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(GROUPS, WORKERS, 50)), "b": 1e-3 * rng.normal(size=(GROUPS, WORKERS, 2, 3))}
    x = jax.tree.map(np.float32, x)
    send = over_workers(lambda x, r, root: broadcast_rounded(x, root, EVERYONE, wire="int8", last=r), mapping)
    r = jax.tree.map(np.zeros_like, x)
    for exchange in range(200):
        root = int(rng.integers(GROUPS * WORKERS)) if exchange < 190 else 3  # At last one leader, who stands still.
        last, r = r, jax.tree.map(np.asarray, send(x, r, np.full((GROUPS, WORKERS), root, np.int32)))
        for name in x:
            leader = x[name].reshape(GROUPS * WORKERS, -1)[root]
            assert (r[name] == r[name][:1, :1]).all()
            largest = np.abs(leader - last[name][0, 0].reshape(-1)).max()
            error = np.abs(leader - r[name][0, 0].reshape(-1)).max()
            assert error <= largest / 254 * (1 + 1e-5) + 1e-6 * np.abs(leader).max()
        if exchange < 190:
            x = jax.tree.map(lambda a: np.float32(a + 1e-2 * np.abs(a).max() * rng.normal(size=a.shape)), x)
    np.testing.assert_allclose(r["a"][0, 0], x["a"][0, 3], rtol=1e-6)
    same = over_workers(lambda r: broadcast_rounded(r, NOBODY, EVERYONE, wire="int8", last=r), mapping)(r)
    jax.tree.map(np.testing.assert_array_equal, same, r)


def test_int8_has_a_scale_for_each_block_of_256_numbers():
    """As the oracle has them: an outlier erases small numbers of its own block, and no others."""
    rng = np.random.default_rng(0)
    shapes = ((1000,), (2, 700), (40, 10), (3, 300, 2), (2, 3, 4))
    x = [1e-2 * rng.normal(size=(2, *shape)).astype(np.float32) for shape in shapes]
    x[0][1, 600] = 100
    send = jax.vmap(lambda x, r: broadcast_rounded(x, 1, "worker", wire="int8", last=r), axis_name="worker")
    received = jax.jit(send)(x, [np.zeros_like(of_shape) for of_shape in x])
    for got, sent, runs in zip(received, x, (1, 2, 1, 3, 1), strict=True):  # What of an array is cut into blocks.
        for got_run, run in zip(got[0].reshape(runs, -1), sent[1].reshape(runs, -1), strict=True):
            np.testing.assert_allclose(got_run, oracle.sent(run, np.zeros_like(run), "int8"), rtol=1e-5, atol=1e-8)
    kept = np.asarray(received[0][0] != 0)
    assert np.flatnonzero(kept[500:750]).tolist() == [100]
    assert kept[:500].mean() > 0.95 < kept[750:].mean()


@pytest.mark.optimized
def test_int8_of_equal_trees_changes_nothing():
    x = {"a": jnp.ones((4, 3)), "b": jnp.zeros((4, 0))}
    send = jax.vmap(lambda x: broadcast_rounded(x, 1, "worker", wire="int8", last=x), axis_name="worker")
    jax.tree.map(np.testing.assert_array_equal, send(x), x)


def drawn(dtype, shape, rng, exponent):
    """[GROUPS, WORKERS, *shape]: numbers of one size, maybe with zeros and the largest of either sign among them."""
    if dtype == np.complex64:
        return drawn(np.float32, shape, rng, exponent) + 1j * drawn(np.float32, shape, rng, -exponent)
    shape = (GROUPS, WORKERS, *shape)
    if dtype == np.bool:
        return rng.random(shape) < 0.5
    if dtype == np.int32:
        return rng.integers(-(2**31), 2**31, shape, dtype)
    largest = float(jnp.finfo(dtype).max)
    x = np.clip(rng.normal(size=shape) * 10.0**exponent, -largest, largest)
    special = rng.choice([0.0, largest, -largest], size=shape)
    return np.where(rng.random(shape) < rng.choice([0, 0.02]), special, x).astype(dtype)


@functools.cache
def rounded_over_devices(wire):
    return over_workers(lambda x, r, root: broadcast_rounded(x, root, EVERYONE, wire=wire, last=r), "shard_map")


@pytest.mark.optimized
@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@given(
    seed=st.integers(0, 2**32 - 1),
    exponents=st.tuples(*[st.integers(-3, 3) | st.integers(-44, 38)] * 2),
    root=st.integers(-1, GROUPS * WORKERS - 1),
)
@settings(max_examples=20)
def test_whatever_is_sent_rounded_is_equal_on_all_finite_and_within_the_bound(wire, seed, exponents, root):
    """Every dtype and shape, in two exchanges with two roots, also with the largest numbers of opposite signs."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        send = rounded_over_devices(wire)
        arrays = [(dtype, shape) for dtype in (*FLOATS, np.complex64, np.int32, np.bool) for shape in SHAPES]
        first, second = ([drawn(*array, rng, exponent) for array in arrays] for exponent in exponents)
        zeros = [np.zeros_like(x) for x in first]
        roots = np.full((2, GROUPS, WORKERS), [[[(root + 3) % (GROUPS * WORKERS)]], [[root]]], np.int32)
        last = [np.asarray(x) for x in send(first, zeros, roots[0])]
        received = [np.asarray(x) for x in send(second, last, roots[1])]
    for got, x, r in zip(received, second, last, strict=True):
        assert got.dtype == x.dtype
        assert got.tobytes() == got[:1, :1].tobytes() * (GROUPS * WORKERS)
        got, r = got[0, 0], r[0, 0]
        if root == NOBODY:
            np.testing.assert_array_equal(got, r if wire == "int8" else np.zeros_like(r))
        elif x.dtype.kind in "ib":
            np.testing.assert_array_equal(got, x.reshape(GROUPS * WORKERS, *got.shape)[root])
        else:
            check_within_the_bound(wire, got, x.reshape(GROUPS * WORKERS, *got.shape)[root], r)


def check_within_the_bound(wire, got, x, r):
    if x.dtype == np.complex64:
        check_within_the_bound(wire, got.real, x.real, r.real)
        check_within_the_bound(wire, got.imag, x.imag, r.imag)
        return
    assert np.isfinite(got.astype(np.float64)).all()
    rounding = float(jnp.finfo(jnp.promote_types(x.dtype, np.float32)).eps)  # Of the numbers in which it is computed.
    stored = float(jnp.finfo(x.dtype).eps) / 2
    smallest = float(jnp.finfo(x.dtype).smallest_subnormal)  # Of float16, which rounds to it.
    dtype, (got, x, r) = x.dtype, (a.astype(np.longdouble) for a in (got, x, r))
    if wire == "bfloat16":
        x = np.clip(x, -3.3895e38, 3.3895e38) if dtype == np.float64 else x
        bound = 2.0**-8 * np.abs(x) + max(smallest, 1e-37)
    else:
        blocks = np.abs(x - r).reshape(-1, 150) if x.size == 600 else np.abs(x - r).reshape(1, -1)
        largest = np.repeat(blocks.max(axis=1, initial=0), blocks.shape[1]).reshape(x.shape)
        size = np.maximum(np.abs(x), np.abs(r))
        bound = largest / 254 + stored * np.abs(got) + 4 * rounding * (size + largest) + max(smallest, 1e-35)
    assert (np.abs(got - x) <= bound).all()


@pytest.mark.optimized
def test_nobody_sends_zeros_and_no_nan_leaks():
    x = jnp.full((4, 2), jnp.nan).at[2].set(7.0)
    send = jax.vmap(lambda x, root: broadcast_from({"x": x}, root, "worker"), axis_name="worker", in_axes=(0, None))
    np.testing.assert_array_equal(send(x, NOBODY)["x"], np.zeros((4, 2)))
    np.testing.assert_array_equal(send(x, 2)["x"], np.full((4, 2), 7.0))


@pytest.mark.optimized
def test_float64_and_mixed_trees():
    with jax.enable_x64(True):
        tree = {"a": np.arange(8.0) / 3, "b": (np.arange(8, dtype=np.int64), np.arange(8) > 3)}
        received = jax.vmap(lambda tree: broadcast_from(tree, 5, "worker"), axis_name="worker")(tree)
        assert received["a"].dtype == np.float64
    jax.tree.map(lambda got, sent: np.testing.assert_array_equal(got, np.full(8, sent[5])), received, tree)
