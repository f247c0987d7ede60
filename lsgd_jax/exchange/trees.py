"""Which arrays of a tree are exchanged, and arithmetic on such trees.

Floats and complex numbers are exchanged. Integers, booleans and PRNG keys can't be pulled anywhere and are left alone,
and so is what the worker's own optimizer freezes. In a tree of what is exchanged, `optax.MaskedNode` stands in for
whatever is not, as it does within `optax.masked` and `optax.partition`; like None, it has no leaves.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

Tree = TypeVar("Tree")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def inexact(tree: Any) -> Any:
    """The tree with `optax.MaskedNode` in place of arrays that are neither floats nor complex numbers."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else optax.MaskedNode(), tree)


def like(masked: Any, tree: Any) -> Any:
    """The tree, masked where the first one is."""
    return jax.tree.map(lambda m, x: m if _is_masked(m) else x, masked, tree, is_leaf=_is_masked)


def merged(masked: Any, tree: Any) -> Any:
    """The first tree, with the second one's arrays where it is masked."""
    return jax.tree.map(lambda m, x: x if _is_masked(m) else m, masked, tree, is_leaf=_is_masked)


def check_updates(updates: Any, params: Any) -> None:
    """Raise ValueError unless updates have the structure and shapes of parameters where these are not masked."""

    def shapes(tree: Any) -> dict[str, Any]:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_masked)
        return {jax.tree_util.keystr(path): None if _is_masked(x) else jnp.shape(x) for path, x in leaves}

    wanted, got = shapes(params), shapes(updates)
    for name in wanted | got:
        shape, other = wanted.get(name, "nothing"), got.get(name, "nothing")
        if shape is not None and shape != other:
            raise ValueError(
                "updates must have the structure and the shapes of the parameters,"
                f" but at {name or 'the root'} they have {other} in place of {shape}."
            )


def exchanged_with(optimizer: optax.GradientTransformation, axis_name: str | tuple[str, ...]) -> Callable[[Any], Any]:
    """A function that masks in a tree of parameters whatever is not exchanged if this optimizer trains it.

    Parameters are frozen if their update is zero whatever the gradients, the state and the parameters are, as
    `optax.set_to_zero` makes it within `optax.partition`. An optimizer that can't be traced by itself, since its
    `update` asks for extra arguments other than `value`, is taken to train everything.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
    """

    def trains(jaxpr: Jaxpr) -> list[bool]:
        return [not zero for zero in _zeros(jaxpr, [False] * len(jaxpr.invars))]

    return _masking(optimizer, axis_name, trains)


def read_by(optimizer: optax.GradientTransformation, axis_name: str | tuple[str, ...]) -> Callable[[Any], Any]:
    """A function that masks in a tree of gradients whatever this optimizer does not look at.

    Args:
      optimizer: the worker's own.
      axis_name: the axis, or the axes, on which the workers lie.
    """

    def reads(jaxpr: Jaxpr) -> list[bool]:
        used = {v for equation in jaxpr.eqns for v in equation.invars if not isinstance(v, Literal)}
        used |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        return [v in used for v in jaxpr.invars]

    return _masking(optimizer, axis_name, reads)


def _masking(
    optimizer: optax.GradientTransformation, axis_name: str | tuple[str, ...], keeps: Callable[[Jaxpr], list[bool]]
) -> Callable[[Any], Any]:
    """A function that masks a tree, by which of the first leaves of the optimizer's program are kept."""
    answers: dict[Any, list[bool]] = {}

    def masked(tree: Any) -> Any:
        tree = inexact(tree)
        leaves, treedef = jax.tree.flatten(tree)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        key = (treedef, tuple((x.shape, x.dtype) for x in shapes))
        if key not in answers:
            jaxpr = _program(optimizer, jax.tree.unflatten(treedef, shapes), axis_name)
            answers[key] = [True] * len(leaves) if jaxpr is None else keeps(jaxpr)[: len(leaves)]
        kept = [x if keep else optax.MaskedNode() for x, keep in zip(leaves, answers[key], strict=True)]
        return jax.tree.unflatten(treedef, kept)

    return masked


def _program(optimizer: optax.GradientTransformation, params: Any, axis_name: str | tuple[str, ...]) -> Jaxpr | None:
    """The optimizer's update, from gradients, state and parameters; None if it needs more than that."""

    def update(grads: Any, state: Any, params: Any) -> Any:
        return optax.with_extra_args_support(optimizer).update(grads, state, params, value=jnp.zeros(()))[0]

    # A worker alone on its axes, wherever this is called: `init` and `update` have to agree.
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name:
        update = jax.vmap(update, axis_name=name, axis_size=1, in_axes=None, out_axes=None)
    try:
        return jax.make_jaxpr(update)(params, jax.eval_shape(optimizer.init, params), params).jaxpr
    except Exception:
        return None


def _zeros(jaxpr: Jaxpr, inputs: list[bool]) -> list[bool]:
    """Which outputs of a program are zero because of what it computes, given which of its inputs are."""
    zero = {v for v, is_zero in zip(jaxpr.invars, inputs, strict=True) if is_zero}

    def is_zero(v: Any) -> bool:
        return not np.any(v.val) if isinstance(v, Literal) else v in zero

    for equation in jaxpr.eqns:
        operands, name = [is_zero(v) for v in equation.invars], equation.primitive.name
        if name in ("jit", "pjit"):
            results = _zeros(equation.params["jaxpr"].jaxpr, operands)
        elif name == "mul":  # Not by a number that happens to be 0, as a learning rate can.
            results = [
                any(
                    zero_operand and getattr(v.aval, "shape", ())
                    for zero_operand, v in zip(operands, equation.invars, strict=True)
                )
            ]
        elif name in ("div", "select_n"):
            results = [operands[0] if name == "div" else all(operands[1:])]
        else:
            results = [name in _ZERO_OF_ZEROS and all(operands)] * len(equation.outvars)
        zero.update(v for v, result in zip(equation.outvars, results, strict=True) if result)
    return [is_zero(v) for v in jaxpr.outvars]


_ZERO_OF_ZEROS = {
    "add",
    "add_any",
    "sub",
    "neg",
    "convert_element_type",
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "copy",
}
"""Operations that make zeros of zeros."""


def scalar_like(tree: Any, value: Any, dtype: Any) -> Array:
    """A scalar that `jax.shard_map` types as varying where all arrays of a tree do, or everywhere if there are none."""
    leaves = jax.tree.leaves(inexact(tree))
    varying = [varying_axes(x) for x in leaves] or [frozenset(jax.sharding.get_abstract_mesh().manual_axes)]
    if leaves and varying[0] == frozenset.intersection(*varying):
        return jnp.full_like(leaves[0], value, dtype, shape=())
    scalar, axes = jnp.asarray(value, dtype), tuple(sorted(frozenset.intersection(*varying)))
    return select(lax.axis_index(axes) >= 0, scalar, scalar) if axes else scalar


def checks_replication(names: tuple[str, ...]) -> bool:
    """Whether a `jax.shard_map` over these axes types arrays by those over which they may differ."""
    return bool(varying_axes(lax.axis_index(names)))


def varying_axes(x: ArrayLike) -> frozenset[str]:
    """The axes over which an array may differ as `jax.shard_map` types it; none where it does not check replication."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())


def select(condition: Bool[Array, ""], chosen: Tree, otherwise: Tree) -> Tree:
    """One tree or the other, each array in the dtype of the latter."""

    def choose(x: Array, y: Array) -> Array:
        # `jnp.where` makes a constant of arrays without numbers, which `jax.shard_map` types as equal on all.
        return lax.select(condition, x.astype(y.dtype), y)

    return jax.tree.map(choose, chosen, otherwise)


def promoted(updates: Any, params: Any) -> Any:
    """Updates in dtypes that are at least as wide as the parameters', so that moves are not rounded more coarsely."""
    return jax.tree.map(lambda u, p: jnp.asarray(u, jnp.promote_types(u.dtype, p.dtype)), updates, params)


def norm(tree: Any, model_axis_name: str | tuple[str, ...] | None = None) -> Float[Array, ""]:
    """The Euclidean norm of all numbers in a tree, at least in float32, which float16 would overflow early.

    Args:
      tree: arrays or, over manual axes, the parts of them that a device has.
      model_axis_name: the axis, or the axes, over which the parts lie. Arrays that are the same on all of them count
        once, where `jax.shard_map` checks replication.
    """
    tree = jax.tree.map(wide, tree)
    if model_axis_name is None:
        return optax.tree.norm(tree)
    names = (model_axis_name,) if isinstance(model_axis_name, str) else model_axis_name

    def squares(x: Array) -> Float[Array, ""]:
        over = tuple(name for name in names if name in varying_axes(x) or not checks_replication(names))
        return lax.psum(optax.tree.norm(x, squared=True), over) if over else optax.tree.norm(x, squared=True)

    return jnp.sqrt(optax.tree.sum(jax.tree.map(squares, tree)))


def distance(
    x: optax.Params, y: optax.Params, model_axis_name: str | tuple[str, ...] | None = None
) -> Float[Array, ""]:
    """||x - y||, over all arrays; of parts of arrays as `norm` has it."""
    return norm(jax.tree.map(lambda x, y: wide(x) - wide(y), x, y), model_axis_name)


def moved(updates: optax.Updates, params: optax.Params, move: optax.Updates, step: Int[ArrayLike, ""]) -> optax.Updates:
    """Updates that also make a move.

    Where parameters have 16 bits, moves smaller than half their last place would be lost, and a worker would never get
    near what it is pulled to. There the point of arrival is rounded stochastically, up or down with the probabilities
    that make it right on average; the random numbers depend on the step and the array alone.

    Args:
      updates: of one worker, no narrower than the params.
      params: to which they will be added.
      move: from the point to which the updates alone lead.
      step: the number of the update.

    Returns:
      Updates in their own dtypes.
    """
    leaves, treedef = jax.tree.flatten(updates)
    results = []
    for i, (u, p, m) in enumerate(zip(leaves, jax.tree.leaves(params), jax.tree.leaves(move), strict=True)):
        if p.dtype.itemsize > 2:
            results.append((u + m).astype(u.dtype))
            continue
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), i)
        arrival = _rounded(nearest(wide(p + u), p.dtype) + wide(m), p.dtype, key)
        results.append((wide(arrival) - wide(p)).astype(u.dtype))
    return jax.tree.unflatten(treedef, results)


def towards(x: optax.Params, point: optax.Params, strength: ArrayLike = 1.0) -> optax.Updates:
    """The move -strength (x - point), at least in float32."""

    def move(x: Array, point: Array) -> Array:
        x, point = wide(x), wide(point)
        return -(jnp.asarray(strength).astype(x.dtype) * (x - point))

    return jax.tree.map(move, x, point)


def wide(x: Array) -> Array:
    """An array in at least float32: the values that it has in its own dtype, not those before it was rounded to it."""
    values = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.dtype.itemsize != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return values
    # XLA may skip a rounding before a conversion back, above all on GPUs, but not this, which keeps what is rounded.
    rounded = nearest(values, x.dtype)
    if x.dtype == jnp.bfloat16:  # There it takes what is subnormal for zero.
        return jnp.where(jnp.abs(values) < float(jnp.finfo(x.dtype).tiny), values, rounded)
    return rounded


def _rounded(x: Float[Array, "*shape"], dtype: Any, key: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Round to one of the two neighbors in a narrower dtype, so that the mean over keys is x."""
    middle = nearest(x, dtype)
    error = x - middle
    other = jnp.nextafter(middle.astype(dtype), jnp.copysign(jnp.inf, error).astype(dtype))
    gap = jnp.abs(wide(other) - middle)
    return jnp.where(jax.random.uniform(key, x.shape) * gap < jnp.abs(error), other, middle.astype(dtype))


def nearest(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """The nearest value of a narrower dtype, in the dtype of x."""
    # XLA may take x.astype(dtype).astype(x.dtype) for x; it keeps this, which takes what is subnormal for zero.
    about = jnp.finfo(dtype)
    normal = lax.reduce_precision(x, about.nexp, about.nmant)
    if about.nexp == jnp.finfo(x.dtype).nexp:
        return normal
    last_place = float(about.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(about.tiny), jnp.round(x / last_place) * last_place, normal)
