"""Networks in flax.nnx, called with a batch of examples; they return logits."""

from collections.abc import Callable

from flax import nnx

from lsgd_jax.models.small import MLP, Conv1D

MODELS: dict[str, tuple[Callable[..., nnx.Module], int | None]] = {"conv1d": (Conv1D, 2), "mlp": (MLP, None)}
"""By name: the class, made from an example's shape, the number of classes and `rngs`, and the number of dimensions that
an example must have, or None if it may have any."""
