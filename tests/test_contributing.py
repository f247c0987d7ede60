"""The worked example of CONTRIBUTING.md is a method."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax


def test_the_example_method_works():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    module: dict = {}
    exec(re.search(r"```python\n(r\"\"\".*?)```", text, re.DOTALL)[1], module)
    tx = module["soft_averaging"](optax.sgd(0.0), axis_name="worker", period=1, pull=0.5)
    x = jnp.array([0.0, 4.0, 8.0])
    updates, _ = jax.vmap(lambda x: tx.update(x, tx.init(x), x), axis_name="worker")(x)
    np.testing.assert_array_equal(x + updates, [2, 4, 6])
