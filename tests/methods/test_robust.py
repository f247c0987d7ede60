"""The mean of the values in the middle, beside sorting them."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lsgd_jax.methods.robust import _mean_between, middle_of

FEW_VALUES = st.sampled_from([-2.0, 0.0, 1.0, 4.0, np.inf])
"""Of several workers' values some are equal."""


@given(st.data(), st.integers(1, 6))
def test_the_middle_is_that_of_the_sorted_values(data, workers):
    row = st.lists(FEW_VALUES, min_size=workers, max_size=workers)
    x = np.array(data.draw(st.lists(row, min_size=3, max_size=3)), np.float32).T
    first = data.draw(st.integers(0, workers - 1))
    end = data.draw(st.integers(first + 1, workers))
    mean = _mean_between(jnp.asarray(x), jnp.int32(first), jnp.int32(end))
    np.testing.assert_allclose(mean, np.sort(x, axis=0)[first:end].mean(0), rtol=1e-6)


def test_as_many_are_left_out_as_the_share_says():
    """A product such as 0.29 * 100 is rounded to less than the whole number that it is."""
    x = np.random.default_rng(0).normal(size=100).astype(np.float32) ** 3
    attractor = middle_of("worker", 0.29)
    middle = jax.vmap(lambda x: attractor.locate(x, ())[0].point, axis_name="worker")(x)
    np.testing.assert_allclose(middle, np.sort(x)[29:71].mean(), rtol=1e-6)
