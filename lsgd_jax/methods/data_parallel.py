"""Synchronous data-parallel training: every step is taken with the mean of the workers' gradients."""

from typing import Any

import optax

from lsgd_jax.exchange import AxisName, mean
from lsgd_jax.exchange.trees import merged, read_by


def data_parallel(
    optimizer: optax.GradientTransformation, *, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Synchronous data-parallel training.

    Workers that start at the same point stay at the same point. A NaN in one worker's gradients reaches all at once; a
    NaN loss has no effect.

    Args:
      optimizer: takes the mean gradient; every worker's copy of it does the same.
      axis_name: the axis, or the axes, on which the workers lie.
    """
    read, optimizer = read_by(optimizer, axis_name), optax.with_extra_args_support(optimizer)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        extra_args.pop("step", None)  # There is nothing to time.
        updates = merged(mean(read(updates), axis_name), updates)
        return optimizer.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
