"""Networks of other libraries as modules of Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class Adapted(nnx.Module):
    """Parameters of another library, or of your own, with the function that applies them.

    Call it with the arguments of the function that come after the parameters.

    Args:
      apply: function of the parameters and further arguments, such as `network.apply` of Flax Linen or Haiku.
      params: any tree of floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> network = Adapted(lambda params, x: x @ params["w"], {"w": jnp.ones((3, 2))})
      >>> network(jnp.ones((4, 3))).shape
      (4, 2)
    """

    def __init__(self, apply: Callable, params: Any) -> None:
        leaves, self.structure = jax.tree.flatten(params)
        self.apply = apply
        self.leaves: nnx.List = nnx.List(nnx.Param(leaf) for leaf in leaves)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Apply the function to the parameters and these arguments."""
        params = jax.tree.unflatten(self.structure, [leaf[...] for leaf in self.leaves])
        return self.apply(params, *arguments, **options)
