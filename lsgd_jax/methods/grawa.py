r"""GRAWA: workers are pulled towards their average weighted by inverse gradient norms, which favors flat regions.

Every `period` updates

.. math:: x^i \leftarrow x^i - \text{pull} \, (x^i - c), \qquad
    c = \sum_i w^i x^i, \quad w^i \propto 1 / \|g^i\|,

with the norm of the gradient of the whole model (MGRAWA) or of each layer, weighting each on its own (LGRAWA). Every
update also pulls the worker towards the last such c, by `prox` / `period`.

Dimlioglu, Choromanska, "GRAWA: Gradient-based weighted averaging for distributed training of deep learning models",
https://arxiv.org/abs/2403.04206. Period, pull and prox are by default as in the authors' code. The norms here are of
the gradients of the update on which the exchange falls; that code smooths them over exchanges, and for MGRAWA adds up
the norms of the layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lsgd_jax.checks import check_strengths
from lsgd_jax.exchange import AxisName, total
from lsgd_jax.exchange.trees import like, norm, scalar_like
from lsgd_jax.link import AT_ONCE, Attractor, Target, chained
from lsgd_jax.streaming import Streaming, streamed
from lsgd_jax.variants import stale


def mgrawa(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 32,
    pull: float = 0.5,
    prox: float = 0.01,
    fragments: int | None = None,
    overlap: int | None = None,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GRAWA with one weight a worker, from the norm of its whole gradient.

    A NaN in one worker's parameters or gradients reaches all at the next exchange; a NaN loss has no effect.

    Args:
      optimizer: the worker's own; the norms are those of the raw gradients that enter it.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      pull: strength of the pull towards the weighted average, in [0, 1].
      prox: strength of the pull towards the last average, in [0, 1]; spread over the updates of a period.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread: norms are those of all parts.

    Raises:
      ValueError: if an option is out of range.
    """
    streaming, norms_of = Streaming(fragments, overlap), partial(_model_norms, model_axis_name=model_axis_name)
    return _grawa(optimizer, norms_of, streaming, axis_name=axis_name, period=period, pull=pull, prox=prox)


def lgrawa(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    period: int = 32,
    pull: float = 0.5,
    prox: float = 0.01,
    fragments: int | None = None,
    overlap: int | None = None,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GRAWA with a weight for each layer of each worker; a layer is one array of parameters.

    A NaN in one worker's parameters or gradients reaches all at the next exchange; a NaN loss has no effect.

    Args:
      optimizer: the worker's own; the norms are those of the raw gradients that enter it.
      axis_name: the axis, or the axes, on which the workers lie.
      period: updates between exchanges.
      pull: strength of the pull towards the weighted average, in [0, 1].
      prox: strength of the pull towards the last average, in [0, 1]; spread over the updates of a period.
      fragments: in how many parts parameters are sent, one at a time, evenly over the period; None: all at once.
      overlap: updates between sending and applying, less than period / fragments; None: 0.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread: norms are those of all parts.

    Raises:
      ValueError: if an option is out of range.
    """
    streaming, norms_of = Streaming(fragments, overlap), partial(_layer_norms, model_axis_name=model_axis_name)
    return _grawa(optimizer, norms_of, streaming, axis_name=axis_name, period=period, pull=pull, prox=prox)


def one_norm(arrays: int, workers: int) -> tuple[int, ...]:
    """The scalars that `mgrawa` all-reduces in an exchange."""
    return (1,)


def norm_per_array(arrays: int, workers: int) -> tuple[int, ...]:
    """The scalars that `lgrawa` all-reduces in an exchange, one by one."""
    return (1,) * arrays


def _model_norms(grads: optax.Updates, x: optax.Params, model_axis_name: AxisName | None) -> optax.Updates:
    total = norm(grads, model_axis_name)
    return jax.tree.map(lambda _: total, x)


def _layer_norms(grads: optax.Updates, x: optax.Params, model_axis_name: AxisName | None) -> optax.Updates:
    return jax.tree.map(partial(norm, model_axis_name=model_axis_name), like(x, grads))


def _grawa(
    optimizer: optax.GradientTransformation,
    norms_of: Callable[[optax.Updates, optax.Params], optax.Updates],
    streaming: Streaming,
    *,
    axis_name: AxisName,
    period: int,
    pull: float,
    prox: float,
) -> optax.GradientTransformationExtraArgs:
    check_strengths(pull=pull, prox=prox)
    sum_of = partial(total, axis_name=axis_name)

    def weight(norm: Float[Array, ""]) -> Float[Array, ""]:
        # A gradient of zero has all the weight there is, not an infinite one.
        inverse = 1 / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny ** 0.5)
        return inverse / sum_of(inverse)

    def init(params: optax.Params) -> Array:
        dtype = jnp.result_type(jnp.float32, *(jnp.finfo(x.dtype).dtype for x in jax.tree.leaves(params)))
        return jnp.zeros_like(scalar_like(params, 0, dtype), shape=len(jax.tree.leaves(params)))

    def choose(x: optax.Params, state: Array, *, gradient: optax.Updates, **signals: Any) -> Array:
        weights = [weight(norm).astype(state.dtype) for norm in jax.tree.leaves(norms_of(gradient, x))]
        return jnp.stack(weights) if weights else state

    def locate(x: optax.Params, weights: Array) -> tuple[Target, Array]:
        leaves, treedef = jax.tree.flatten(x)
        average = [sum_of(w.astype(leaf.dtype) * leaf) for w, leaf in zip(weights, leaves, strict=True)]
        return Target(jax.tree.unflatten(treedef, average)), weights

    attractor, exchange = Attractor(init, locate, choose), stale(prox / period) if prox else AT_ONCE
    moving = streamed(attractor, pull, streaming, axis_name=axis_name, period=period, exchange=exchange)
    return chained(optimizer, moving, axis_name=axis_name)
