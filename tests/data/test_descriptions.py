"""What is told of data sets, against the data sets."""

import typing

import pytest

from lsgd_jax.data import DESCRIPTIONS, load
from lsgd_jax.tasks import Classification


def test_every_data_set_is_described():
    assert set(DESCRIPTIONS) == set(typing.get_args(typing.get_type_hints(Classification)["dataset"]))


@pytest.mark.parametrize("name", ["mnist1d", "mnist1d-10k", "digits", "mnist5k"])
def test_embedded_data_sets_are_as_described(name):
    about, data = DESCRIPTIONS[name], load(name)
    assert (data.train_x.shape, data.test_x.shape) == ((about.train, *about.shape), (about.test, *about.shape))
    assert (data.train_x.dtype, data.classes, data.preprocessing) == (about.dtype, about.classes, about.preprocessing)
    assert (len(data.train_y), len(data.test_y)) == (about.train, about.test)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_prepared_data_sets_are_as_described_but_for_their_length(name, prepared):
    about, data = DESCRIPTIONS[name], load(name, prepared[0])
    assert (data.train_x.shape[1:], data.train_x.dtype) == (about.shape, about.dtype)
    assert (data.classes, data.preprocessing) == (about.classes, about.preprocessing)
