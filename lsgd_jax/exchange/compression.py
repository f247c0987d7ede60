"""One worker's arrays to all others in fewer bytes: rounded to bfloat16, or int8 differences in a closed loop."""

import math
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Int

from lsgd_jax.exchange.axes import AxisName, axis_names, check_bound
from lsgd_jax.exchange.broadcast import BroadcastMethod, broadcast_from, broadcast_leaves, check_broadcast
from lsgd_jax.exchange.shards import Shard, ShardSpecs, by_shard, specs_of
from lsgd_jax.exchange.trees import wide

Wire: TypeAlias = Literal["bfloat16", "int8"]
"""In what numbers `broadcast_rounded` sends."""
Tree = TypeVar("Tree")

BLOCK = 256
"""The most numbers that share one scale on an int8 wire: an outlier erases small numbers of its own block only, and the
scales are 1 to 3 % of what is sent."""


def broadcast_rounded(
    tree: Tree,
    root: Int[ArrayLike, ""],
    axis_name: AxisName,
    *,
    wire: Wire | None,
    last: Tree | None = None,
    method: BroadcastMethod = "auto",
    shard_specs: ShardSpecs | None = None,
) -> Tree:
    r"""Give every worker the root's copy of a tree, its floats in fewer bytes: rounded, and the same on all workers.

    - None: not rounded, as `broadcast_from` does it.
    - "bfloat16": each number is rounded to bfloat16, a relative error of at most :math:`2^{-8}`.
    - "int8": a closed loop. All hold the same reconstruction r of what was received last, the root sends the rounded
      difference :math:`q = \mathrm{round}((x - r) / s)` with one scale :math:`s = \max |x - r| / 127` per block of at
      most `BLOCK` neighboring numbers, and all go on from :math:`r + s q`. The error is at most
      :math:`\max |x - r| / 254` over the block, and the rounding of float32 (float64 for float64) and to the array's
      dtype. It enters the next difference, so that errors do not add up. The first is the difference to zeros: the
      parameters themselves, no finer than that.

    Finite numbers stay finite: beyond a dtype's largest number, they become that. What lies within :math:`10^{-37}` of
    zero (bfloat16), or differs by less than :math:`10^{-35}` (int8), may be lost. Complex numbers are rounded as two
    floats; integers and booleans are sent exactly.

    Of a sharded worker (see `broadcast_from`) each device sends its own shards, and the numbers are those of a worker
    that is whole: where a block crosses shards, its devices agree on the scale. If nobody knows how arrays lie over
    Auto axes, the compiler gathers those of which blocks cross shards.

    Args:
      tree: arrays, as for `broadcast_from`; floats are finite.
      root: the sender's position, as for `broadcast_from`.
      axis_name: the axis, or the axes, on which the workers lie.
      wire: in what numbers it is sent.
      last: for "int8", the reconstruction r, the same on all workers: what this function returned before, or zeros.
      method: how it is sent, as for `broadcast_from`; the scales are sent by an all-reduce.
      shard_specs: how a sharded worker's arrays lie, as for `broadcast_from`.

    Returns:
      What was received, in the tree's dtypes. If the root is not a position on the axis, the last reconstruction for
      "int8", otherwise zeros.

    Raises:
      NameError: if the axis is not bound where this is called.
      ValueError: as `broadcast_from` does.
    """
    if wire is None:
        return broadcast_from(tree, root, axis_name, method=method, shard_specs=shard_specs)
    check_broadcast(method)
    check_bound(axis_name)
    tree = jax.tree.map(jnp.asarray, tree)
    leaves, structure = jax.tree.flatten(tree)
    specs = specs_of(tree, axis_name, shard_specs, by_largest_axis=method not in ("auto", "all_reduce"))

    def send(method: BroadcastMethod, shards: list[Shard], root: Array, x: list[Array], *r: list[Array]) -> list[Array]:
        inner = {name for shard in shards for name in shard.all_names}
        real = [_real_parts(leaf) for leaf in x]
        of_real = [(shard, shard) if jnp.iscomplexobj(leaf) else shard for leaf, shard in zip(x, shards, strict=True)]

        def broadcast(numbers: Any, method: BroadcastMethod) -> Any:
            arrays, structure = jax.tree.flatten(numbers)
            received = broadcast_leaves(arrays, root, axis_name, method=method, inner=inner)
            return jax.tree.unflatten(structure, received)

        if wire == "bfloat16":
            rounded = jax.tree.map(lambda x: _saturated(x, jnp.bfloat16) if _is_float(x) else x, real)
            received = broadcast(rounded, method)
            parts = jax.tree.map(lambda x, y: _saturated(y, x.dtype) if _is_float(x) else y, real, received)
        else:
            last = [_real_parts(leaf) for leaf in r[0]]
            differences = jax.tree.map(_difference, real, last)
            scales = jax.tree.map(
                lambda d, of: _scales(d, of) if _is_float(d) and d.size else None, differences, of_real
            )
            numbers = jax.tree.map(
                lambda d, of, s: d if s is None else _in_int8(d, s, of), differences, of_real, scales
            )
            numbers, scales = broadcast(numbers, method), broadcast(scales, "all_reduce")
            parts = jax.tree.map(_reconstructed, last, of_real, numbers, scales)
        return [lax.complex(*part) if jnp.iscomplexobj(leaf) else part for leaf, part in zip(x, parts, strict=True)]

    lists = [leaves] if wire == "bfloat16" else [leaves, jax.tree.leaves(last)]
    return jax.tree.unflatten(structure, by_shard(send, specs, method, jnp.asarray(root), *lists))


def scale_count(shape: tuple[int, ...], whole: tuple[int, ...] | None = None) -> int:
    """The number of blocks into which an int8 wire cuts an array of floats: each is sent with a scale.

    Args:
      shape: of the array or, if it is sharded, of a shard.
      whole: of the array that is sharded.
    """
    axis, count, _ = _window(shape, shape if whole is None else whole)
    return math.prod(shape[:axis]) * count if math.prod(shape) else 0


def _real_parts(x: Array) -> Array | tuple[Array, Array]:
    """An array of complex numbers as two of floats; any other as it is."""
    return (x.real, x.imag) if jnp.iscomplexobj(x) else x


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _saturated(x: Array, dtype: Any) -> Array:
    """Round floats to a dtype; what lies beyond its largest number, infinities too, becomes that."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(wide(x), -largest, largest).astype(dtype)


def _difference(x: Array, r: Array) -> Array:
    """Half of x - r, which is finite wherever they are; for integers and booleans, the bits that differ."""
    return wide(x) / 2 - wide(r) / 2 if _is_float(x) else x ^ r


def _reconstructed(r: Array, shard: Shard, numbers: Array, scales: Array | None) -> Array:
    """What `_difference`, rounded, was taken from."""
    if scales is None:
        return r ^ numbers if r.size else r
    return _saturated(2 * (wide(r) / 2 + _spread(scales, r.shape, shard) * numbers.astype(scales.dtype)), r.dtype)


def _in_int8(x: Array, scales: Array, shard: Shard) -> Array:
    """Numbers in units of their scales, rounded."""
    scales = _spread(scales, x.shape, shard)
    return jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)


def _cut(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How an array is cut into blocks: along which axis, into how many, and how long they are there.

    A block has all of the later axes and one entry of the earlier ones. All are equally long, the last one may be
    shorter. So no axes are joined, and blocks seldom cross the shards of an array that is sharded.
    """
    axis, numbers = len(shape), 1  # The axes from here on have so many numbers.
    while axis > 0 and numbers * shape[axis - 1] <= BLOCK:
        axis -= 1
        numbers *= shape[axis]
    if axis == 0:
        return 0, 1, shape[0] if shape else 1
    axis -= 1
    count = math.ceil(shape[axis] / (BLOCK // numbers))
    return axis, count, math.ceil(shape[axis] / count)


def _window(shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, int, int]:
    """Of how many blocks a shard can have a part: along which axis they are cut, how many, and how long they are.

    Args:
      shape: of the shard.
      whole: of the array.
    """
    axis, count, length = _cut(whole)
    if shape[axis : axis + 1] == whole[axis : axis + 1]:
        return axis, count, length
    size = shape[axis]
    return axis, size // length if size % length == 0 else (size + length - 2) // length + 1, length


def _first_block(shape: tuple[int, ...], shard: Shard) -> tuple[Array, Array] | None:
    """Of which block a shard has the first part, and where in that block it starts; None if no block crosses shards."""
    axis, _, length = _cut(shard.shape)
    if not shard.names(axis) or shape[axis] % length == 0:
        return None
    start = lax.axis_index(shard.names(axis)) * shape[axis]
    return start // length, start % length


def _scales(x: Array, shard: Shard) -> Array:
    """The largest magnitude of each block, over 127; 0 where so small a number can't be divided by.

    Args:
      x: an array, or a device's shard of it.
      shard: which part of it that is.

    Returns:
      An array of the axes before the one that is cut, and the blocks of which `x` has a part.
    """
    first = _first_block(x.shape, shard)
    axis, blocks, length = _window(x.shape, shard.shape)
    x = jnp.abs(jnp.atleast_1d(x))
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is not None:  # Over Explicit mesh axes, where workers are vmapped.
        shards = math.prod(sharding.mesh.shape[name] for name in axis_names(sharding.spec[axis]))
        if blocks % shards or x.shape[axis] % blocks:
            x = jax.sharding.reshard(x, jax.P(*sharding.spec[:axis], None, *sharding.spec[axis + 1 :]))
    x = x.max(axis=tuple(range(axis + 1, x.ndim)), initial=0)
    x = jnp.pad(x, [*[(0, 0)] * axis, (0, blocks * length - x.shape[axis])])
    x = x if first is None else jnp.roll(x, first[1], axis)
    largest = x.reshape(*x.shape[:axis], blocks, length).max(-1, initial=0)
    if first is not None:
        count = _cut(shard.shape)[1]
        of_all = jnp.roll(jnp.pad(largest, [*[(0, 0)] * axis, (0, count)]), first[0], axis)
        of_all = lax.pmax(of_all, shard.names(*range(axis, len(shard.shape))))
        largest = jnp.roll(of_all, -first[0], axis)[..., :blocks]
    elif names := shard.names(*range(axis + 1, len(shard.shape))):
        largest = lax.pmax(largest, names)
    scales = largest / 127
    return jnp.where(scales < jnp.finfo(x.dtype).tiny, 0, scales)


def _spread(scales: Array, shape: tuple[int, ...], shard: Shard) -> Array:
    """The scale of every number of an array or a shard, of size 1 along axes on which they do not differ."""
    first = _first_block(shape, shard)
    axis, _, length = _window(shape, shard.shape)
    if not shape:
        return scales[0]
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, length)).reshape(*scales.shape[:-1], -1)
    each = each if first is None else jnp.roll(each, -first[1], axis)
    each = each[..., : shape[axis]]
    return lax.expand_dims(each, range(axis + 1, len(shape)))
