"""Which arrays of a tree are exchanged, and arithmetic on such trees.

Floats and complex numbers are exchanged. Integers, booleans and PRNG keys can't be pulled anywhere and are left alone,
and so is what the worker's own optimizer freezes. In a tree of what is exchanged, `optax.MaskedNode` stands in for
whatever is not, as it does within `optax.masked` and `optax.partition`; like None, it has no leaves.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import Literal
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


def exchanged_with(optimizer: optax.GradientTransformation) -> Callable[[Any], Any]:
    """A function that masks in a tree of parameters whatever is not exchanged if this optimizer trains it.

    An update that depends on nothing, neither gradients nor state nor parameters, is that of a frozen parameter, as
    `optax.set_to_zero` makes it within `optax.partition`. An optimizer that can't be traced by itself, since it calls
    collectives or asks for extra arguments, is taken to train everything.
    """
    answers: dict[Any, list[bool]] = {}  # `init` and `update` must agree, though only `update` may have the axes bound.

    def exchanged(params: Any) -> Any:
        params = inexact(params)
        leaves, treedef = jax.tree.flatten(params)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        key = (treedef, tuple((x.shape, x.dtype) for x in shapes))
        if key not in answers:
            answers[key] = _trains(optimizer, jax.tree.unflatten(treedef, shapes))
        kept = [x if trains else optax.MaskedNode() for x, trains in zip(leaves, answers[key], strict=True)]
        return jax.tree.unflatten(treedef, kept)

    return exchanged


def _trains(optimizer: optax.GradientTransformation, params: Any) -> list[bool]:
    def update(grads: Any, state: Any, params: Any) -> Any:
        return optax.with_extra_args_support(optimizer).update(grads, state, params, value=jnp.zeros(()))[0]

    count = len(jax.tree.leaves(params))
    try:
        jaxpr = jax.make_jaxpr(update)(params, jax.eval_shape(optimizer.init, params), params).jaxpr
    except Exception:  # Whatever is wrong with it, its real update will say.
        return [True] * count
    depends = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in depends for v in equation.invars):
            depends.update(equation.outvars)
    return [not isinstance(v, Literal) and v in depends for v in jaxpr.outvars]


def scalar_like(tree: Any, value: Any, dtype: Any, axis_name: str | tuple[str, ...]) -> Array:
    """A scalar that `jax.shard_map` types as the arrays of a tree, or as a worker's own if there are none."""
    leaves = jax.tree.leaves(inexact(tree))
    if leaves:
        return jnp.full_like(leaves[0], value, dtype, shape=())
    scalar = jnp.asarray(value, dtype)
    try:
        return select(lax.axis_index(axis_name) >= 0, scalar, scalar)
    except NameError:  # Outside of the axes, where only `update` has to be within them.
        return scalar


def select(condition: Bool[Array, ""], chosen: Tree, otherwise: Tree) -> Tree:
    """One tree or the other, each array in the dtype of the latter."""

    def choose(x: Array, y: Array) -> Array:
        # `jnp.where` makes a constant of arrays without numbers, which `jax.shard_map` types as equal on all.
        return lax.select(condition, x.astype(y.dtype), y)

    return jax.tree.map(choose, chosen, otherwise)


def promoted(updates: Any, params: Any) -> Any:
    """Updates in dtypes that are at least as wide as the parameters', so that moves are not rounded more coarsely."""
    return jax.tree.map(lambda u, p: jnp.asarray(u, jnp.promote_types(u.dtype, p.dtype)), updates, params)


def norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all numbers in a tree, at least in float32, which float16 would overflow early."""
    return optax.tree.norm(jax.tree.map(_wide, tree))


def distance(x: optax.Params, y: optax.Params) -> Float[Array, ""]:
    """||x - y||, over all arrays."""
    return norm(jax.tree.map(lambda x, y: _wide(x) - _wide(y), x, y))


def moved(updates: optax.Updates, params: optax.Params, move: optax.Updates, step: Int[ArrayLike, ""]) -> optax.Updates:
    """Updates that also make a move.

    Where parameters have 16 bits, moves smaller than half their last place would be lost, and a worker would never get
    near what it is pulled to. There the point of arrival is rounded stochastically, up or down with the probabilities
    that make it right on average; the random numbers depend on the step and the array alone.

    Args:
      updates: of one worker, no narrower than the params.
      params: to which they will be added.
      move: to be added, too.
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
        arrival = _rounded(_wide(p) + _wide(u) + _wide(m), p.dtype, key)
        results.append((_wide(arrival) - _wide(p)).astype(u.dtype))
    return jax.tree.unflatten(treedef, results)


def towards(x: optax.Params, point: optax.Params, strength: ArrayLike) -> optax.Updates:
    """The move -strength (x - point), at least in float32."""

    def move(x: Array, point: Array) -> Array:
        x, point = _wide(x), _wide(point)
        return -(jnp.asarray(strength).astype(x.dtype) * (x - point))

    return jax.tree.map(move, x, point)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rounded(x: Float[Array, "*shape"], dtype: Any, key: PRNGKeyArray) -> Float[Array, "*shape"]:
    """Round to one of the two neighbors in a narrower dtype, so that the mean over keys is x."""
    nearest = x.astype(dtype)
    error = x - _wide(nearest)
    other = jnp.nextafter(nearest, jnp.copysign(jnp.inf, error).astype(dtype))
    gap = jnp.abs(_wide(other) - _wide(nearest))
    return jnp.where(jax.random.uniform(key, x.shape) * gap < jnp.abs(error), other, nearest)
