"""Regression on scikit-learn's diabetes."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_diabetes

from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Regression
from lsgd_jax.train import train_and_evaluate


def test_the_data_are_those_of_scikit_learn():
    data, (x, y) = Regression().data(), load_diabetes(return_X_y=True, scaled=False)
    assert (data.train["x"].shape, data.test["x"].shape) == ((354, 10), (88, 10))
    order = np.random.default_rng(0).permutation(len(y))
    for name, expected in (("x", x), ("y", y)):
        ours = np.concatenate([data.train[name], data.test[name]])
        np.testing.assert_allclose(ours, ((expected - expected.mean(0)) / expected.std(0))[order], rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="data_dir has no effect with diabetes"):
        Regression().data("nowhere")


def test_a_network_that_tells_the_mean_leaves_all_of_the_variance():
    data = Regression().data()
    both = {name: np.concatenate([data.train[name], data.test[name]]) for name in ("x", "y")}
    measures = Regression().measures(lambda x: jnp.zeros((len(x), 1)), both)
    np.testing.assert_allclose(measures["unexplained_variance"].mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(2 * measures["loss"], measures["unexplained_variance"])


def test_it_learns_as_much_as_a_linear_model(tmp_path):
    data = Regression().data()
    with_bias = [np.column_stack([part["x"], np.ones(len(part["x"]))]) for part in data]
    solution, *_ = np.linalg.lstsq(with_bias[0], data.train["y"])
    linear = np.mean((with_bias[1] @ solution - data.test["y"]) ** 2)
    assert 0.5 < linear < 0.6
    assert train_and_evaluate(PRESETS["diabetes"].replace(steps=100), tmp_path / "run", lines=False) < 1.1 * linear
