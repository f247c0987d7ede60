import subprocess
import sys

import jax
import numpy as np
import pytest
from mnist1d.data import get_dataset_args, make_dataset
from mnist1d.utils import ObjectView
from sklearn.datasets import load_digits

from lsgd_jax.data import hold_out, load, sources
from lsgd_jax.errors import UsageError
from lsgd_jax.tasks import Classification


def test_more_test_signals_of_mnist1d_are_like_the_others_and_none_is_among_them():
    data, more = load("mnist1d"), load("mnist1d-10k")
    np.testing.assert_array_equal(more.train_x, data.train_x)
    np.testing.assert_array_equal(more.train_y, data.train_y)
    seen = {row.tobytes() for x in (data.train_x, data.test_x) for row in x}
    own = {row.tobytes() for row in more.test_x}
    assert len(own) == 10_000
    assert not own & seen
    assert np.bincount(more.test_y).tolist() == [1000] * 10
    means = [[x[y == label].mean(0) for label in range(10)] for x, y in (more[:2], more[2:4])]
    np.testing.assert_allclose(*means, atol=0.25)


def test_signals_of_mnist1d_are_those_of_its_package_to_the_bit():
    few = get_dataset_args(as_dict=True) | {"num_samples": 50}
    expected = make_dataset(ObjectView(few))
    x, y, *_ = sources._mnist1d_signals(num_samples=50)
    np.testing.assert_array_equal(x[:, :, 0], expected["x"].astype(np.float32))
    np.testing.assert_array_equal(y, expected["y"])


def test_held_out_examples_are_training_examples_and_always_the_same():
    data = Classification("digits", "mlp").data()
    one, other = hold_out(data, 0.25), hold_out(data, 0.25)
    assert (len(one.train[1]), len(one.test[1])) == (1078, 359)
    rows = {row.tobytes() for row in data.train[0]}
    assert all(row.tobytes() in rows for row in one.test[0])
    both = np.sort(np.concatenate([one.train[1], one.test[1]]))
    np.testing.assert_array_equal(both, np.sort(data.train[1]))
    np.testing.assert_array_equal(one.test[0], other.test[0])


def test_digits_are_those_of_scikit_learn():
    data, (x, y) = load("digits"), load_digits(return_X_y=True)
    ours = np.concatenate([data.train_x, data.test_x]).reshape(-1, 64), np.concatenate([data.train_y, data.test_y])
    order = np.random.default_rng(0).permutation(len(y))
    np.testing.assert_array_equal(ours[0] * 16, x[order])
    np.testing.assert_array_equal(ours[1], y[order])


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "dtype"),
    [
        ("mnist1d", 4000, 1000, (40, 1), np.float32),
        ("mnist1d-10k", 4000, 10_000, (40, 1), np.float32),
        ("digits", 1437, 360, (8, 8, 1), np.float32),
        ("mnist5k", 4000, 1000, (28, 28, 1), np.uint8),
    ],
)
def test_embedded_data(name, train, test, shape, dtype):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    data, again = load(name), load.__wrapped__(name)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert (data.train_x.shape, data.test_x.shape) == ((train, *shape), (test, *shape))
    assert (data.train_x.dtype, data.train_y.dtype) == (dtype, np.int32)
    np.testing.assert_array_equal(np.unique(data.test_y), range(data.classes))
    for one, other in zip(data[:4], again[:4], strict=True):
        np.testing.assert_array_equal(one, other)
    assert (data.preprocessing is None) == (dtype == np.float32)


def test_an_unknown_data_set_is_named():
    with pytest.raises(ValueError, match=r"there is no data set 'mnist2d'; did you mean mnist1d\?"):
        load("mnist2d")
    with pytest.raises(ValueError, match=r"no data set 'x'; there are mnist1d, mnist1d-10k, digits, mnist5k, cifar10"):
        load("x")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_prepared_data(name, prepared):
    data_dir, truth = prepared
    data = load(name, data_dir)
    for x, y, (true_x, true_y) in zip(data[0:4:2], data[1:4:2], truth[name], strict=True):
        assert (x.dtype, y.dtype) == (np.uint8, np.int32)
        order = {row.tobytes(): i for i, row in enumerate(true_x)}
        found = [order[row.tobytes()] for row in x]
        assert sorted(found) == list(range(len(true_x)))
        np.testing.assert_array_equal(y, true_y[found])
    assert data.classes == (100 if name == "cifar100" else 10)
    assert data.preprocessing.training(data.train_x[:2], jax.random.key(0)).shape[1:3] == (28, 28)


def test_data_that_are_not_prepared_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"cifar10 is not prepared in .*: run lsgd data prepare cifar10 with this"):
        load("cifar10", tmp_path)


def test_a_folder_for_data_that_come_with_a_package_is_refused(tmp_path):
    with pytest.raises(UsageError, match="data_dir has no effect with digits, which comes with a package"):
        load("digits", tmp_path / "nowhere")


def test_the_default_folder_is_that_of_tensorflow_datasets(prepared, monkeypatch):
    data_dir, truth = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load.__wrapped__("mnist").train_y) == len(truth["mnist"][0][1])


def test_embedded_data_need_nothing_of_the_prepared_ones():
    code = (
        "import sys, lsgd_jax, lsgd_jax.data; lsgd_jax.data.load('digits');"
        "print({'tensorflow_datasets', 'grain', 'requests'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
