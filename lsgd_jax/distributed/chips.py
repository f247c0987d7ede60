"""A worker of several chips: its parameters and optimizer state are sharded over them, and so are its batches (FSDP).

The worker axes of the mesh are manual, and the axis of a worker's chips is left to the compiler (Auto), so that one
training step serves workers of one chip and of many. The constraints that the compiler needs are here.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr_consts, dce_rules
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lsgd_jax.config import Config
from lsgd_jax.exchange import ShardSpecs, largest_axis

CHIP = "chip"
"""The mesh axis of a worker's chips."""
Tree = TypeVar("Tree")


def shard_specs(config: Config) -> ShardSpecs:
    """Sharding of a worker's parameters over its chips: each array along its largest axis that the chips divide."""
    return partial(largest_axis, axis_name=CHIP, size=config.chips_per_worker)


def specs_of_state(shard_specs: ShardSpecs, params: Any, state: Any) -> Any:
    """Sharding of one worker's state over its chips: each array as the parameter it belongs to, all others replicated.

    An array belongs to the parameter of its shape whose path its own path ends with, as a momentum does.

    Args:
      shard_specs: how the parameters lie.
      params: one worker's, or their shapes and dtypes.
      state: any tree of arrays, or their shapes and dtypes, such as an optimizer's state.

    Returns:
      A tree of PartitionSpecs over `CHIP`.
    """
    specs = jax.tree.leaves(shard_specs(params))
    of_params = {
        (path, x.shape): spec
        for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True)
    }

    def spec(path: tuple, x: Any) -> PartitionSpec:
        ends = ((path[start:], x.shape) for start in range(len(path) + 1))
        return next((of_params[end] for end in ends if end in of_params), PartitionSpec())

    return jax.tree_util.tree_map_with_path(spec, state)


def over_chips(batch: Tree) -> Tree:
    """A worker's batch, its examples sharded over the worker's chips; as it is for workers of one chip."""
    return jax.lax.with_sharding_constraint(batch, PartitionSpec(CHIP)) if _has_chips() else batch


def gathered(params: Tree) -> Tree:
    """A worker's sharded parameters, each array whole where it is used; as they are for workers of one chip.

    Parameters of all layers, stacked for a loop over the layers, would be whole all at once: an
    `nnx.Param(x, stacked=True)` stays sharded here, and the network calls this function on a layer's in the loop.
    """
    if not _has_chips():
        return params

    def whole(part: Any) -> Any:
        is_stacked = isinstance(part, nnx.Variable) and part.get_metadata().get("stacked")
        return part if is_stacked else jax.lax.with_sharding_constraint(part, PartitionSpec())

    return jax.tree.map(whole, params, is_leaf=lambda part: isinstance(part, nnx.Variable))


def value_and_gradient(
    function: Callable[[Tree], tuple[Array, Any]],
) -> Callable[[Tree], tuple[tuple[Array, Any], Tree]]:
    """`jax.value_and_grad` of a function with auxiliary data, for parameters that are sharded over chips (FSDP).

    The function computes with gathered arrays. Residuals of the forward pass that depend on the parameters alone, as
    gathered arrays and their casts do, are computed again for the backward pass, so that no chip keeps all of them.
    All other residuals are those of the function itself, which may choose them with `jax.checkpoint`. (An outer
    `jax.checkpoint` whose policy keeps all but the gathered arrays would override that choice.)
    """
    if not _has_chips():
        return jax.value_and_grad(function, has_aux=True)

    def forward(params: Tree) -> tuple:
        loss, pullback, auxiliary = jax.vjp(lambda params: function(gathered(params)), params, has_aux=True)
        return (loss, auxiliary), pullback

    def loss_and_gradient(params: Tree) -> tuple[tuple[Array, Any], Tree]:
        program, shapes = jax.make_jaxpr(forward, return_shape=True)(params)
        outputs = jaxpr_as_fun(program)(*jax.tree.leaves(params))
        results = len(jax.tree.leaves(shapes[0]))
        again = [i for i, alone in enumerate(_of_arguments_alone(program)) if alone and i >= results]
        # Without the barrier, which nothing passes before the forward pass is over, XLA would gather once and keep it.
        kept = [None if i in again else output for i, output in enumerate(outputs)]
        params, kept = jax.lax.optimization_barrier((params, kept))
        for i, output in zip(again, jaxpr_as_fun(_pruned(program, again))(*jax.tree.leaves(params)), strict=True):
            kept[i] = output
        (loss, auxiliary), pullback = jax.tree.unflatten(jax.tree.structure(shapes), kept)
        return (loss, auxiliary), pullback(jnp.ones_like(loss))[0]

    return loss_and_gradient


def _of_arguments_alone(program: ClosedJaxpr) -> list[bool]:
    """For each output of a program, whether it depends on none of the traced values that the program closes over."""
    closed_over = {
        variable
        for variable, value in zip(program.jaxpr.constvars, program.consts, strict=True)
        if isinstance(value, jax.core.Tracer)
    }

    def depends(equation: JaxprEqn, output: int) -> bool:
        used = [True] * len(equation.invars)
        if rule := dce_rules.get(equation.primitive):  # Loops and calls do not need all inputs for each output.
            used, _ = rule([i == output for i in range(len(equation.outvars))], equation)
        inputs = itertools.compress(equation.invars, used)
        return any(isinstance(variable, Var) and variable in closed_over for variable in inputs)

    for equation in program.jaxpr.eqns:
        closed_over.update([variable for i, variable in enumerate(equation.outvars) if depends(equation, i)])
    return [not isinstance(variable, Var) or variable not in closed_over for variable in program.jaxpr.outvars]


def _pruned(program: ClosedJaxpr, outputs: Sequence[int]) -> ClosedJaxpr:
    """A program of some of a program's outputs; all arguments stay."""
    wanted = [i in outputs for i in range(len(program.jaxpr.outvars))]
    kept = [False] * len(program.consts) + [True] * len(program.jaxpr.invars)
    jaxpr, used, _ = dce_jaxpr_consts(program.jaxpr, wanted, instantiate=kept)
    return ClosedJaxpr(jaxpr, list(itertools.compress(program.consts, used)))


def _has_chips() -> bool:
    return CHIP in jax.sharding.get_abstract_mesh().axis_names
