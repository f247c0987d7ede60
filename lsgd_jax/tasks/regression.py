"""Regression on scikit-learn's diabetes: ten measurements of 442 patients, and how the disease progressed in a year."""

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lsgd_jax.data import Data
from lsgd_jax.errors import UsageError
from lsgd_jax.task import Headline, Task

if TYPE_CHECKING:
    from flax import nnx

TEST = 88
"""Number of patients held out for testing, a fifth."""


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Network with one hidden layer, trained by squared error and tested by the share of variance that it leaves."""

    headline: ClassVar[Headline] = Headline("unexplained_variance", "unexplained variance", percent=True)

    width: int = 32
    """Units of the hidden layer."""

    def data(self, data_dir: Path | str | None = None) -> Data:
        """Load measurements and outcomes, with the mean 0 and the variance 1."""
        if data_dir is not None:
            raise UsageError("data_dir has no effect with diabetes, which comes with a package.")
        # Reads what `sklearn.datasets.load_diabetes` does; importing that takes longer than training.
        folder = Path(str(metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data")))
        x, y = (np.loadtxt(folder / f"diabetes_{name}.csv.gz") for name in ("data_raw", "target"))
        rows = np.random.default_rng(0).permutation(np.column_stack([x, y]))
        rows = ((rows - rows.mean(0)) / rows.std(0)).astype(np.float32)
        train, test = ({"x": part[:, :-1], "y": part[:, -1]} for part in (rows[:-TEST], rows[-TEST:]))
        return Data(train, test)

    def network(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Make the network from ten numbers to one."""
        from flax import nnx

        return nnx.Sequential(nnx.Linear(10, self.width, rngs=rngs), jax.nn.tanh, nnx.Linear(self.width, 1, rngs=rngs))

    def measures(self, network: Any, examples: Any) -> dict[str, Float[Array, " examples"]]:
        """Return half the squared error as the loss, and all of it: the unexplained part of a variance of 1."""
        error = (network(examples["x"])[:, 0] - examples["y"]) ** 2
        return {"loss": error / 2, "unexplained_variance": error}

    def with_random_targets(self, batch: Any, key: PRNGKeyArray) -> Any:
        """Return the batch with its outcomes in another order."""
        return batch | {"y": jax.random.permutation(key, batch["y"])}

    def check(self) -> None:
        """Raise ValueError if a field is out of range."""
        if not 1 <= self.width < 2**16:
            raise ValueError(f"width must be in [1, 2^16), got {self.width}.")
