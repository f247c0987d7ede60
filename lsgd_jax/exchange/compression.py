"""One worker's arrays to all others in fewer bytes: rounded to bfloat16, or int8 differences in a closed loop."""

import math
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Int

from lsgd_jax.exchange.axes import AxisName, axis_names
from lsgd_jax.exchange.broadcast import BroadcastMethod, broadcast_from
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
    floats; integers and booleans are sent exactly. An array of a sharded worker (see `broadcast_from`) is gathered for
    "int8" only along an axis of which blocks would cross the shards.

    Args:
      tree: arrays, as for `broadcast_from`; floats are finite.
      root: the sender's position, as for `broadcast_from`.
      axis_name: the axis, or the axes, on which the workers lie.
      wire: in what numbers it is sent.
      last: for "int8", the reconstruction r, the same on all workers: what this function returned before, or zeros.
      method: how it is sent, as for `broadcast_from`; the scales are sent by an all-reduce.

    Returns:
      What was received, in the tree's dtypes. If the root is not a position on the axis, the last reconstruction for
      "int8", otherwise zeros.

    Raises:
      NameError: if the axis is not bound where this is called.
      ValueError: as `broadcast_from` does.
    """
    if wire is None:
        return broadcast_from(tree, root, axis_name, method=method)
    whole = jax.tree.map(jnp.asarray, tree)
    x = jax.tree.map(_real_parts, whole)
    if wire == "bfloat16":
        rounded = jax.tree.map(lambda x: _saturated(x, jnp.bfloat16) if _is_float(x) else x, x)
        received = broadcast_from(rounded, root, axis_name, method=method)
        parts = jax.tree.map(lambda x, y: _saturated(y, x.dtype) if _is_float(x) else y, x, received)
    else:
        r = jax.tree.map(_real_parts, last)
        differences = jax.tree.map(_difference, x, r)
        scales = jax.tree.map(lambda d: _scales(d) if _is_float(d) else None, differences)
        numbers = jax.tree.map(lambda d, s: d if s is None else _in_int8(d, s), differences, scales)
        numbers = broadcast_from(numbers, root, axis_name, method=method)
        scales = broadcast_from(scales, root, axis_name, method="all_reduce")
        parts = jax.tree.map(_reconstructed, r, numbers, scales)
    return jax.tree.map(lambda x, part: lax.complex(*part) if jnp.iscomplexobj(x) else part, whole, parts)


def scale_count(shape: tuple[int, ...]) -> int:
    """The number of blocks into which an int8 wire cuts an array of floats: each is sent with a scale."""
    axis, count, _ = _cut(shape)
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


def _reconstructed(r: Array, numbers: Array, scales: Array | None) -> Array:
    """What `_difference`, rounded, was taken from."""
    if scales is None:
        return r ^ numbers
    return _saturated(2 * (wide(r) / 2 + _spread(scales, r.shape) * numbers.astype(scales.dtype)), r.dtype)


def _in_int8(x: Array, scales: Array) -> Array:
    """Numbers in units of their scales, rounded."""
    scales = _spread(scales, x.shape)
    return jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)


def _cut(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How an array is cut into blocks: along which axis, into how many, and how long they are there.

    A block has all of the later axes and one entry of the earlier ones. All are equally long, the last one may be
    shorter. So no axes are joined, and an array that is sharded is gathered only if blocks would cross its shards.
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


def _scales(x: Array) -> Array:
    """The largest magnitude of each block, over 127; 0 where so small a number can't be divided by.

    Returns:
      An array of the axes before the one that is cut, and the blocks.
    """
    axis, count, length = _cut(x.shape)
    x = jnp.abs(jnp.atleast_1d(x))
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is not None:  # Over Explicit mesh axes. Over Auto ones the compiler does the same.
        shards = math.prod(sharding.mesh.shape[name] for name in axis_names(sharding.spec[axis]))
        if count % shards or x.shape[axis] % count:
            x = jax.sharding.reshard(x, jax.P(*sharding.spec[:axis], None, *sharding.spec[axis + 1 :]))
    ends = [(0, count * length - size if i == axis else 0) for i, size in enumerate(x.shape)]
    blocks = jnp.pad(x, ends).reshape(*x.shape[:axis], count, length, *x.shape[axis + 1 :])
    scales = blocks.max(axis=range(axis + 1, blocks.ndim), initial=0) / 127
    return jnp.where(scales < jnp.finfo(x.dtype).tiny, 0, scales)


def _spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """The scale of every number of an array of that shape, of size 1 along axes on which they do not differ."""
    axis, _, length = _cut(shape)
    if not shape:
        return scales[0]
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, length)).reshape(*scales.shape[:-1], -1)
    each = each[..., : shape[axis]]
    return lax.expand_dims(each, range(axis + 1, len(shape)))
