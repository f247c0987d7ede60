"""What a broadcast gives and sends."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsgd_jax import broadcast_from
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.exchange import broadcast_rounded, chosen_broadcast
from lsgd_jax.exchange.broadcast import SMALL
from tests.mapping import GROUPS, MAPPINGS, WORKERS, mapped, over_workers

EVERYONE = ("group", "worker")
DTYPES = (np.float32, jnp.bfloat16, np.float16, np.int32, np.int8, np.uint16, bool, np.complex64, np.float64)
METHODS = ("all_reduce", "ring", "chain", "hierarchical")


def values(dtype, rng):
    """[GROUPS, WORKERS, 3] of random bits: NaN payloads, signed zeros and denormals among them."""
    if dtype == np.complex64:
        return (values(np.float32, rng) + 1j * values(np.float32, rng)).astype(dtype)
    if np.dtype(dtype).kind == "b":
        return rng.random((GROUPS, WORKERS, 3)) < 0.5
    return rng.integers(0, 256, (GROUPS, WORKERS, 3 * np.dtype(dtype).itemsize), np.uint8).view(dtype)


@pytest.mark.optimized
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, casting the signalling NaNs.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_root_comes_through_bit_for_bit(mapping, method):
    """A tree of all dtypes, of which some make up several arrays and more numbers than there are chunks.

    Each dtype is a program of its own within a chain, which takes long to compile: two of different widths are sent.
    """
    rng = np.random.default_rng(0)
    x = [values(dtype, rng) for dtype in (*(DTYPES if method != "chain" else ()), *DTYPES[:2])]
    with jax.enable_x64(True):
        send = partial(broadcast_from, method=method, chunks=2)
        local = over_workers(lambda root, x: send(x, root, "worker"), mapping)
        everyone = over_workers(lambda root, x: send(x, root, EVERYONE), mapping)
        for root in range(WORKERS):
            roots = np.array([[root] * WORKERS, [(root + 1) % WORKERS] * WORKERS], np.int32)  # Each group has its own.
            for received, sent in zip(map(np.asarray, local(roots, x)), x, strict=True):
                assert received.dtype == sent.dtype
                for group in range(GROUPS):
                    for worker in range(WORKERS):
                        assert received[group, worker].tobytes() == sent[group, roots[group, 0]].tobytes()
        for root in range(GROUPS * WORKERS):
            for received, sent in zip(everyone(np.full((GROUPS, WORKERS), root, np.int32), x), x, strict=True):
                assert np.asarray(received).tobytes() == sent.reshape(-1, 3)[root].tobytes() * (GROUPS * WORKERS)


@pytest.mark.parametrize("chunks", [1, 3, 16])
@pytest.mark.parametrize("method", ["ring", "chain", "hierarchical"])
def test_any_number_of_chunks(method, chunks):
    """Of arrays that they do not divide, among them one of no numbers and scalars."""
    x = {"a": np.arange(8.0 * 5, dtype=np.float32).reshape(2, 4, 5), "b": np.zeros((2, 4, 0)), "c": np.ones((2, 4))}
    x["c"][1, 2] = 7
    send = over_workers(lambda x: broadcast_from(x, 6, EVERYONE, method=method, chunks=chunks), "shard_map")
    jax.tree.map(lambda got, x: np.testing.assert_array_equal(got, np.broadcast_to(x[1, 2], x.shape)), send(x), x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mapping", ["vmap", "shard_map"])
def test_trees_without_arrays_or_numbers_are_sent(mapping, method):
    def send(x, root):
        received = [broadcast_from(x, root, EVERYONE, method=method)]
        received += [broadcast_rounded(x, root, EVERYONE, wire=w, last=x, method=method) for w in ("bfloat16", "int8")]
        return received, broadcast_from({}, root, EVERYONE, method=method)

    x = {"a": np.zeros((GROUPS, WORKERS, 0, 3), np.float32), "b": np.zeros((GROUPS, WORKERS, 0), np.int32), "c": ()}
    received, nothing = over_workers(send, mapping)(x, np.full((GROUPS, WORKERS), 5, np.int32))
    assert nothing == {}
    for each in received:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), each) == jax.tree.map(lambda x: (x.shape, x.dtype), x)


def test_what_every_method_sends():
    """As the docstring says it: 8 workers and 480 bytes, in 2 groups of 4."""

    def sent(method, axes, chunks=4):
        program = mapped(lambda x: broadcast_from(x, 5, axes, method=method, chunks=chunks), "shard_map")
        text = program.lower(jnp.zeros((GROUPS, WORKERS, 120), np.float32)).compile().as_text()
        return [(each.kind, each.group_size, each.sent * each.times) for each in collectives(text)]

    assert sent("all_reduce", EVERYONE) == sent("auto", EVERYONE) == [("all-reduce", 8, 2 * 7 / 8 * 480)]
    assert sent("ring", EVERYONE) == [("collective-permute", 8, (4 + 8 - 2) / 4 * 480)]
    assert sent("ring", "worker") == sent("hierarchical", "worker") == [("collective-permute", 4, 6 / 4 * 480)]
    assert sent("chain", "worker") == sent("ring", "worker")  # As groups may have different leaders.
    assert sent("hierarchical", EVERYONE) == [
        ("all-to-all", 4, 3 / 4 * 480),
        ("collective-permute", 2, 480 / 4 + 8),  # 30 numbers in 4 chunks are 4 times 8.
        ("all-gather", 4, 3 / 4 * 480),
    ]


def test_on_cpus_small_arrays_are_sent_as_one():
    """Workers wait for each other once for each operand of an all-reduce."""
    sizes = [3, 5, 0, SMALL // 4 + 1, 7]
    x = [np.arange(GROUPS * WORKERS * n, dtype=np.float32).reshape(GROUPS, WORKERS, n) for n in sizes]
    program = mapped(lambda x: broadcast_from(x, 5, EVERYONE), "shard_map").lower(x).compile()
    [sent] = re.findall(r"= (.*?) all-reduce\(", program.as_text())
    assert sorted(map(int, re.findall(r"u32\[(\d+)\]", sent))) == [3 + 5 + 7, SMALL // 4 + 1]
    jax.tree.map(lambda got, x: np.testing.assert_array_equal(got, np.broadcast_to(x[1, 1], x.shape)), program(x), x)


@pytest.mark.parametrize("chunks", [4, 20])
def test_a_chain_sends_what_is_wanted(chunks):
    """All but the last send the array once, from any root, with fewer chunks than links and with more."""

    def send(root, x):
        return broadcast_from(x, root, EVERYONE, method="chain", chunks=chunks)

    x, roots = jnp.zeros((GROUPS, WORKERS, 120), np.float32), jnp.zeros((GROUPS, WORKERS), np.int32)
    text = mapped(send, "shard_map").lower(roots, x).compile().as_text()
    found = [each for each in collectives(text) if each.kind == "collective-permute"]
    assert all(each.conditional for each in found)
    assert sum(each.bytes * each.senders * each.times for each in found) == 8 * 7 * 480  # In the branches of 8 roots.


def test_a_ring_is_chosen_where_it_sends_less(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert chosen_broadcast("auto", 10**9, 4) == "all_reduce"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [n for n in range(1, 100) if chosen_broadcast("auto", 10**9, n) == "ring"] == list(range(3, 32))
    assert chosen_broadcast("auto", 1000, 4) == "all_reduce"
    assert chosen_broadcast("hierarchical", 1000, 4) == "hierarchical"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tree"}, "must be one of auto, all_reduce, ring, chain, hierarchical, got 'tree'"),
        ({"chunks": 0}, "chunks must be a whole number of pieces, at least 1, got 0"),
    ],
)
def test_an_option_of_a_broadcast_out_of_range_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        jax.vmap(lambda x: broadcast_from(x, 0, "worker", **options), axis_name="worker")(jnp.zeros(2))
