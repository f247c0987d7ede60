import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsgd_jax.data import BatchIndices, Stretch
from lsgd_jax.errors import UsageError


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 30), st.integers(0, 99))
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


@pytest.mark.parametrize("sampling", ["shards", "independent", "partitions"])
def test_a_step_depends_on_the_seed_and_itself_alone(sampling):
    make = {"examples": 100, "workers": 4, "batch_size": 5, "sampling": sampling}
    forward, anywhere = BatchIndices(**make, seed=3), BatchIndices(**make, seed=3)
    expected = [forward(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        np.testing.assert_array_equal(anywhere(step), expected[step])
    assert (BatchIndices(**make, seed=4)(0) != expected[0]).any()


def taken(stretches, **options):
    """The steps of these stretches, each with the epochs before it and its batch."""
    for i, (steps, workers, batch_size) in enumerate(stretches):
        batches = BatchIndices(workers=workers, batch_size=batch_size, **options).after(stretches[:i])
        first = sum(stretch.steps for stretch in stretches[:i])
        for step in range(first, first + steps):
            yield batches.epochs(step), batches(step)


STRETCHES = st.lists(st.builds(Stretch, st.integers(0, 25), st.integers(1, 8), st.integers(1, 3)), max_size=6)


@given(STRETCHES, st.integers(24, 90), st.integers(0, 9))
def test_an_epoch_takes_each_example_once_whatever_becomes_of_the_workers(stretches, examples, seed):
    before, epoch, left = 0.0, 0, set(range(examples))
    for epochs, batch in taken(stretches, examples=examples, sampling="shards", seed=seed):
        assert epochs >= before
        before = epochs
        if int(epochs) > epoch:  # It ends when what is left is too little for a step of those who are to take it.
            assert int(epochs) == epoch + 1
            assert len(left) < batch.size
            epoch, left = epoch + 1, set(range(examples))
        examples_of_step = set(batch.ravel().tolist())
        assert len(examples_of_step) == batch.size
        assert examples_of_step <= left
        left -= examples_of_step


@given(STRETCHES, st.integers(24, 90), st.integers(0, 9))
def test_independent_workers_go_on_in_their_own_orders(stretches, examples, seed):
    before, seen = 0.0, {}
    for epochs, batch in taken(stretches, examples=examples, sampling="independent", seed=seed):
        assert epochs >= before
        before = epochs
        for worker, of_worker in enumerate(batch.tolist()):
            seen.setdefault((int(epochs), worker), []).extend(of_worker)
    for (epoch, worker), of_worker in seen.items():
        order = np.random.default_rng([seed, epoch, worker]).permutation(examples).tolist()
        places = [order.index(example) for example in of_worker]
        assert places == sorted(set(places))
        if worker == 0:  # Always there.
            assert places == list(range(len(places)))


def test_other_workers_take_what_is_left_of_an_epoch():
    stretches = [Stretch(25, 8, 10), Stretch(4, 4, 10), Stretch(4, 6, 10), Stretch(5, 8, 10)]
    steps = list(taken(stretches, examples=800, sampling="shards", seed=0))
    counts = np.bincount(np.concatenate([batch.ravel() for _, batch in steps]))
    assert np.bincount(counts).tolist() == [0, 0, 0, 400, 400]
    assert [steps[step][0] for step in (24, 25, 29, 33)] == [2.4, 2.5, 2.7, 3.0]


@pytest.mark.parametrize("sampling", ["shards", "independent"])
@given(step=st.integers(0, 40), cuts=st.lists(st.integers(0, 20), max_size=3))
def test_the_same_workers_go_on_as_if_they_had_not_stopped(sampling, step, cuts):
    batches = BatchIndices(examples=107, workers=4, batch_size=5, sampling=sampling, seed=3)
    resumed = batches.after([Stretch(steps, 4, 5) for steps in cuts])
    step += sum(cuts)
    np.testing.assert_array_equal(resumed(step), batches(step))
    assert resumed.epochs(step) == batches.epochs(step) == step / batches.steps_per_epoch
    if sum(cuts):
        with pytest.raises(ValueError, match="was taken by earlier workers"):
            resumed(sum(cuts) - 1)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 30), st.integers(0, 99))
def test_each_worker_keeps_its_part_of_the_data(workers, batch_size, spare, seed):
    examples = workers * batch_size * 2 + spare
    batches = BatchIndices(examples=examples, workers=workers, batch_size=batch_size, sampling="partitions", seed=seed)
    size = examples // workers
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        of_workers = np.stack([batches(step) for step in steps], axis=1).reshape(workers, -1)
        np.testing.assert_array_equal(of_workers // size, np.arange(workers)[:, None].repeat(of_workers.shape[1], 1))
        assert all(len(set(taken.tolist())) == of_workers.shape[1] > size - batch_size for taken in of_workers)


def test_parts_are_shuffled_every_epoch_and_dealt_anew_to_other_workers():
    batches = BatchIndices(examples=20, workers=2, batch_size=5, sampling="partitions", seed=0)
    first, second = (np.concatenate([batches(2 * epoch), batches(2 * epoch + 1)], 1) for epoch in range(2))
    assert (first != second).any()
    others = BatchIndices(examples=20, workers=4, batch_size=5, sampling="partitions", seed=0)
    others = others.after([Stretch(3, 2, 5)])
    np.testing.assert_array_equal(others(3) // 5, np.arange(4)[:, None].repeat(5, 1))
    assert [others.epochs(step) for step in (3, 4)] == [2, 3]


def test_too_few_examples_are_one_sentence():
    with pytest.raises(UsageError, match="4 workers with a batch_size of 8 takes 32 examples, but there are 31"):
        BatchIndices(examples=31, workers=4, batch_size=8, sampling="shards", seed=0)
    alone = BatchIndices(examples=31, workers=1, batch_size=8, sampling="shards", seed=0)
    with pytest.raises(UsageError, match="takes 32 examples, but there are 31"):
        alone.after([Stretch(1, 4, 8)])
