"""Examples in memory and in streams, and how feeds give them to workers."""

import jax
import numpy as np
import pytest

from lsgd_jax.data import BatchIndices, BlankStream, Data, InMemory, Stream, Streamed, blank, count, feed_of, hold_out
from lsgd_jax.data.examples import take
from lsgd_jax.errors import UsageError


class Squares(Stream):
    """The numbers below a limit, their squares, and for training something random."""

    def __init__(self, limit):
        self.limit = limit

    def __len__(self):
        return self.limit

    def read(self, indices):
        return {"x": indices.astype(float), "y": np.stack([indices**2] * 2, 1)}

    def sample(self, indices, rngs):
        return self.read(indices) | {"x": np.array([rng.random() for rng in rngs])}


def in_memory(limit):
    return take(Squares(limit), np.arange(limit))


def feed(train, test, *, workers=2, batch_size=3, rows=None, processes=0):
    indices = BatchIndices(examples=count(train), workers=workers, batch_size=batch_size, sampling="shards", seed=4)
    return feed_of(Data(train, test), indices, range(workers) if rows is None else rows, processes)


def test_a_stream_gives_the_examples_that_memory_does():
    streamed, memory = feed(Squares(20), Squares(5)), feed(in_memory(20), in_memory(5))
    assert (type(streamed), type(memory)) == (Streamed, InMemory)
    assert streamed.shared == ()
    for step in range(8):
        [batch], [indices] = streamed.batches(step, step + 1), memory.batches(step, step + 1)
        np.testing.assert_array_equal(batch["y"], np.stack([indices**2] * 2, -1))
        for worker in range(2):
            examples = memory.training(memory.shared, indices[worker])
            np.testing.assert_array_equal(examples["x"], indices[worker])
            np.testing.assert_array_equal(examples["y"], batch["y"][worker])
    for of_stream, of_memory in zip(streamed.test_chunks(4), memory.test_chunks(4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, of_stream, of_memory)


def test_what_is_random_depends_on_seed_step_worker_and_place():
    [batch] = feed(Squares(20), Squares(5)).batches(2, 3)
    for worker, place in np.ndindex(2, 3):
        assert batch["x"][worker, place] == np.float32(np.random.default_rng([4, 2, worker, place]).random())
    [alone] = feed(Squares(20), Squares(5), rows=[1]).batches(2, 3)
    [ahead] = feed(Squares(20), Squares(5), processes=1).batches(2, 3)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one[0], other[1]), alone, batch)
    jax.tree.map(np.testing.assert_array_equal, ahead, batch)


def test_the_last_chunk_is_padded_and_says_so():
    chunks = list(feed(in_memory(20), in_memory(5)).test_chunks(4))
    assert [real.tolist() for _, real in chunks] == [[True] * 4, [True, False, False, False]]
    np.testing.assert_array_equal(chunks[1][0]["y"], [[16, 16], [0, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize("train", [Squares(20), in_memory(20)], ids=["streamed", "in memory"])
def test_shapes_are_those_of_a_device(train):
    """Which has no 64 bits."""
    found = feed(train, Squares(5))
    shapes = {"x": jax.ShapeDtypeStruct((), np.float32), "y": jax.ShapeDtypeStruct((2,), np.int32)}
    assert found.example == found.test_example == shapes
    [batch] = found.batches(0, 1)
    for array, like in zip(jax.tree.leaves(batch), jax.tree.leaves(found.batch), strict=True):
        assert (array.shape[1:], array.dtype) == (like.shape, like.dtype)
    examples = jax.eval_shape(found.training, found.shared, found.batch)
    assert {name: (x.shape, x.dtype) for name, x in examples.items()} == {
        "x": ((3,), np.float32),
        "y": ((3, 2), np.int32),
    }


@pytest.mark.parametrize("train", [Squares(20), in_memory(20)], ids=["streamed", "in memory"])
def test_held_out_examples_are_tested_and_not_trained_on(train):
    data = hold_out(Data(train, in_memory(3)), 0.25)
    assert (count(data.train), count(data.test)) == (15, 5)
    kept, held = (take(part, np.arange(count(part)))["x"] for part in data)
    np.testing.assert_array_equal(np.sort(np.append(kept, held)), range(20))
    _, again = hold_out(Data(train, in_memory(3)), 0.25)
    np.testing.assert_array_equal(take(again, np.arange(5))["x"], held)
    with pytest.raises(UsageError, match="validation holds out none or all of 20 examples"):
        hold_out(data._replace(train=train), 0.001)


def test_blank_examples_take_no_memory():
    like = jax.ShapeDtypeStruct((2,), np.int32)
    examples = blank(10**12, like)
    assert (examples.shape, examples.dtype, set(examples.strides)) == ((10**12, 2), np.int32, {0})
    stream = BlankStream(10**12, like)
    assert (len(stream), stream.read(np.arange(3)).tolist()) == (10**12, [[0, 0]] * 3)


@pytest.mark.parametrize("examples", [(), {"x": np.zeros(3), "y": np.zeros(4)}, np.zeros((0, 2)), np.zeros(()), [1, 2]])
def test_what_are_no_examples_is_one_sentence(examples):
    with pytest.raises(UsageError, match=r"^examples must be arrays with one number of examples, at least 1, got \["):
        count(examples)


def test_what_is_not_held_out_can_stay_in_its_order():
    data = Data(np.arange(50), np.arange(3))
    shuffled, in_order = (hold_out(data, 0.2, in_order=in_order) for in_order in (False, True))
    np.testing.assert_array_equal(in_order.train, np.sort(shuffled.train))
    np.testing.assert_array_equal(in_order.test, shuffled.test)
    assert (shuffled.train != in_order.train).any()
