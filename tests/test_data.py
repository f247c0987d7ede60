import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.data import BatchIndices, hold_out, load
from lsgd_jax.errors import UsageError


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 30), st.integers(0, 99))
@settings(deadline=None, derandomize=True)
def test_shards_of_an_epoch_are_disjoint(workers, batch_size, spare, seed):
    examples = workers * batch_size * 3 + spare
    batches = BatchIndices(examples=examples, workers=workers, batch_size=batch_size, sampling="shards", seed=seed)
    epoch = np.concatenate([batches(step) for step in range(batches.steps_per_epoch)])
    assert epoch.shape == (batches.steps_per_epoch * workers, batch_size)
    assert len(np.unique(epoch)) == epoch.size > examples - workers * batch_size
    assert epoch.min() >= 0
    assert epoch.max() < examples


def test_epochs_are_dealt_out_anew():
    batches = BatchIndices(examples=100, workers=4, batch_size=5, sampling="shards", seed=0)
    first, second = ([batches(5 * epoch + step) for step in range(5)] for epoch in range(2))
    assert (np.stack(first) != np.stack(second)).any()


def test_held_out_examples_are_training_examples_and_always_the_same():
    data = load("digits")
    one, other = hold_out(data, 0.25), hold_out(data, 0.25)
    assert (len(one.train_y), len(one.test_y)) == (1078, 359)
    rows = {row.tobytes() for row in data.train_x}
    assert all(row.tobytes() in rows for row in one.test_x)
    both = np.sort(np.concatenate([one.train_y, one.test_y]))
    np.testing.assert_array_equal(both, np.sort(data.train_y))
    np.testing.assert_array_equal(one.test_x, other.test_x)


def test_independent_workers_each_see_all_the_data():
    batches = BatchIndices(examples=12, workers=3, batch_size=4, sampling="independent", seed=0)
    epoch = np.stack([batches(step) for step in range(batches.steps_per_epoch)], axis=1)
    np.testing.assert_array_equal(np.sort(epoch.reshape(3, -1)), [range(12)] * 3)
    assert (epoch[0] != epoch[1]).any()


@pytest.mark.parametrize("sampling", ["shards", "independent"])
def test_a_step_depends_on_the_seed_and_itself_alone(sampling):
    make = {"examples": 100, "workers": 4, "batch_size": 5, "sampling": sampling}
    forward, anywhere = BatchIndices(**make, seed=3), BatchIndices(**make, seed=3)
    expected = [forward(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        np.testing.assert_array_equal(anywhere(step), expected[step])
    assert (BatchIndices(**make, seed=4)(0) != expected[0]).any()


def test_too_few_examples_are_one_sentence():
    with pytest.raises(UsageError, match="4 workers with a batch_size of 8 takes 32 examples, but there are 31"):
        BatchIndices(examples=31, workers=4, batch_size=8, sampling="shards", seed=0)


@pytest.mark.parametrize(
    ("name", "train", "test", "shape"), [("mnist1d", 4000, 1000, (40, 1)), ("digits", 1437, 360, (8, 8, 1))]
)
def test_embedded_data(name, train, test, shape):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    data, again = load(name), load(name)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert (data.train_x.shape, data.test_x.shape) == ((train, *shape), (test, *shape))
    assert (data.train_x.dtype, data.train_y.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(np.unique(data.test_y), range(data.classes))
    for one, other in zip(data[:4], again[:4], strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match=r"no data set 'mnist'; there are mnist1d, digits"):
        load("mnist")
