"""Averages, and the axes that they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsgd_jax import broadcast_from, elect
from lsgd_jax.exchange import mean
from tests.mapping import GROUPS, MAPPINGS, WORKERS, over_workers

EVERYONE = ("group", "worker")


@pytest.mark.optimized
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_mean(mapping):
    x = np.arange(8, dtype=np.float32).reshape(GROUPS, WORKERS)
    np.testing.assert_array_equal(over_workers(lambda x: mean(x, "worker"), mapping)(x), [[1.5] * 4, [5.5] * 4])
    np.testing.assert_array_equal(over_workers(lambda x: mean(x, EVERYONE), mapping)(x), np.full((2, 4), 3.5))


@pytest.mark.parametrize(
    "function", [lambda x: elect(x, "host"), lambda x: broadcast_from(x, 0, "host"), lambda x: mean(x, "host")]
)
def test_an_axis_that_does_not_exist_is_named(function):
    with pytest.raises(NameError, match=r"no axis 'host' here: .* axis_name='host'"):
        jax.vmap(function, axis_name="worker")(jnp.zeros(2))
