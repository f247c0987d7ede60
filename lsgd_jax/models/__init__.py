"""Networks in flax.nnx, called with a batch of examples; they return logits."""

from collections.abc import Callable

from flax import nnx

from lsgd_jax.models.small import MLP, Conv1D

MODELS: dict[str, Callable[..., nnx.Module]] = {"conv1d": Conv1D, "mlp": MLP}
