"""Networks of other libraries as modules: as the page on tasks makes them, trained as any others."""

import dataclasses
from pathlib import Path

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lsgd_jax.config import Config
from lsgd_jax.models import Adapted
from lsgd_jax.task import Data, Task
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.trained import load_trained
from tests.test_docs import sections

PAGE = Path(__file__).parents[2] / "docs" / "own_task.md"
MAKERS = sections(PAGE)["Linen, Equinox, Haiku, or a tree of parameters"]
X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Sums(Task):
    kind: str = "linen"

    def data(self, data_dir=None):
        return Data((X, np.sin(X).sum(1)), (X[:16], np.sin(X[:16]).sum(1)))

    def network(self, rngs):
        return MAKERS[self.kind](rngs)

    def measures(self, network, examples):
        x, y = examples
        return {"loss": (network(x)[:, 0] - y) ** 2}


def test_they_are_called_as_their_libraries_call_them():
    params = {"in": jnp.ones((3, 2)), "out": [jnp.ones(2), jnp.zeros(())]}
    network = Adapted(lambda params, x, scale=1.0: scale * (x @ params["in"] @ params["out"][0]), params)
    np.testing.assert_allclose(network(X, scale=2.0), 4 * X.sum(1), rtol=1e-5)
    assert [x.shape for x in jax.tree.leaves(nnx.state(network, nnx.Param))] == [(3, 2), (2,), ()]
    key = nnx.Rngs(0).params()
    dense = linen.Sequential([linen.Dense(16), jnp.tanh, linen.Dense(1)])
    np.testing.assert_array_equal(MAKERS["linen"](nnx.Rngs(0))(X), dense.apply(dense.init(key, X[:8]), X))
    mlp = eqx.nn.MLP(3, 1, width_size=16, depth=1, activation=jnp.tanh, key=key)
    np.testing.assert_allclose(MAKERS["equinox"](nnx.Rngs(0))(X), jax.vmap(mlp)(X), rtol=1e-6)
    of_haiku = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 1], activation=jnp.tanh)(x)))
    np.testing.assert_array_equal(MAKERS["haiku"](nnx.Rngs(0))(X), of_haiku.apply(of_haiku.init(key, X[:8]), X))


@pytest.mark.parametrize("library", ["linen", "equinox", "haiku", "tree"])
def test_they_are_trained_and_loaded(library, tmp_path):
    config = Config(task=Sums(library), steps=8, learning_rate=0.05, momentum=0.0, groups=1, workers=2, eval_every=4)
    loss = train_and_evaluate(config, tmp_path / "run", lines=False)
    first, last = read_metrics(tmp_path / "run", "evaluation")
    assert last["center_loss"] == loss < first["center_loss"]
    np.testing.assert_allclose(
        np.mean((load_trained(tmp_path / "run").center(X[:16])[:, 0] - np.sin(X[:16]).sum(1)) ** 2), loss, rtol=1e-4
    )
