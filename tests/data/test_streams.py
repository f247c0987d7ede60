import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.data import BatchIndices
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
