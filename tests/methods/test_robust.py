"""The mean of the values in the middle, beside sorting them."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lsgd_jax.methods.robust import _mean_between

FEW_VALUES = st.sampled_from([-2.0, 0.0, 1.0, 4.0, np.inf])
"""Of several workers' values some are equal."""


@settings(deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 6))
def test_the_middle_is_that_of_the_sorted_values(data, workers):
    row = st.lists(FEW_VALUES, min_size=workers, max_size=workers)
    x = np.array(data.draw(st.lists(row, min_size=3, max_size=3)), np.float32).T
    first = data.draw(st.integers(0, workers - 1))
    end = data.draw(st.integers(first + 1, workers))
    mean = _mean_between(jnp.asarray(x), jnp.int32(first), jnp.int32(end))
    np.testing.assert_allclose(mean, np.sort(x, axis=0)[first:end].mean(0), rtol=1e-6)
