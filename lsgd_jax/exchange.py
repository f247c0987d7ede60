"""Collectives over named worker axes: whatever moves bytes between workers lives here.

A worker is a position on a named axis, or on several flattened in row-major order. The same lines run inside
`jax.vmap(..., axis_name=...)`, nested `jax.vmap`, `jax.pmap` and `jax.shard_map`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lsgd_jax.checks import check_whole
from lsgd_jax.trees import inexact, select, wide

AxisName: TypeAlias = str | tuple[str, ...]
BroadcastMethod: TypeAlias = Literal["auto", "all_reduce", "ring", "chain", "hierarchical"]
"""How `broadcast_from` sends."""
Wire: TypeAlias = Literal["bfloat16", "int8"]
"""In what numbers `broadcast_rounded` sends."""
Tree = TypeVar("Tree")

NOBODY = -1
"""The leader's position when no worker could be elected."""
CHUNKS = 32
"""Into how many pieces a ring or a chain cuts what it sends: enough to come near half of an all-reduce's time."""
BLOCK = 256
"""The most numbers that share one scale on an int8 wire: an outlier erases small numbers of its own block only, and the
scales are 1 to 3 % of what is sent."""


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names of one or several axes as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def worker_index(axis_name: AxisName) -> Int[Array, ""]:
    """The calling worker's position on the (flattened) axis.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    _check_bound(axis_name)
    return lax.axis_index(axis_names(axis_name))


def worker_count(axis_name: AxisName) -> int:
    """The number of workers on the (flattened) axis.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    _check_bound(axis_name)
    return lax.axis_size(axis_names(axis_name))


def elect(
    score: Float[Array, ""],
    axis_name: AxisName,
    *,
    eligible: Bool[ArrayLike, ""] = True,
) -> Int[Array, ""]:
    """Elect the worker with the lowest finite score; ties go to the lowest position.

    Two scalar all-reduces, no matter how many workers: the lowest score, then the lowest position that has it.

    Args:
      score: this worker's scalar score, the lower the better. NaN and infinities are never elected.
      axis_name: the axis, or the axes, on which the candidates lie.
      eligible: whether this worker may be elected at all.

    Returns:
      The leader's int32 position on the (flattened) axis, the same for all workers, or `NOBODY` if no worker is
      eligible with a finite score.

    Raises:
      NameError: if the axis is not bound where this is called.
      ValueError: if the score is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scores = jnp.array([0.3, jnp.nan, 0.1, 0.1])
      >>> print(jax.vmap(lambda score: elect(score, "worker"), axis_name="worker")(scores))
      [2 2 2 2]
    """
    if jnp.shape(score) != ():
        raise ValueError(f"elect needs one scalar score a worker, got the shape {jnp.shape(score)}.")
    position, workers = worker_index(axis_name), worker_count(axis_name)
    names = axis_names(axis_name)
    candidate = jnp.isfinite(score) & eligible
    score = jnp.where(candidate, score, jnp.inf)
    best = candidate & (score == lax.pmin(score, names))
    leader = lax.pmin(jnp.where(best, position, workers), names)
    return jnp.where(leader == workers, NOBODY, leader)


def broadcast_from(
    tree: Tree,
    root: Int[ArrayLike, ""],
    axis_name: AxisName,
    *,
    method: BroadcastMethod = "auto",
    chunks: int = CHUNKS,
) -> Tree:
    r"""Give every worker the root's copy of a tree, bit for bit.

    Arrays travel as their bits in unsigned integers, zero on all but the root: masked and not multiplied, so that no
    value of another worker, NaN or not, can leak; and on floats a sum would lose the sign of zeros and the payload of
    NaNs. All methods give the same bits. With :math:`|x|` the size of the tree, each of n workers sends

    - "all_reduce": a sum of the masked bits, :math:`2 (n - 1) / n \, |x|`: what averaging the tree costs. (On GPUs,
      where XLA widens 16-bit integers, twice that for 16-bit arrays.)
    - "ring": the tree in K `chunks`, which each worker hands to the next, :math:`(K + n - 2) / K \, |x|`. Towards half
      of an all-reduce for many chunks, but in K + n - 2 messages one after the other, for each width of numbers in the
      tree.
    - "chain": the same without what nobody wants: all but the last worker send the tree once, on average
      :math:`(n - 1) / n \, |x|`. Which links are used depends on the root, so that a program is compiled for each: for
      a few workers. Where the root may differ among the mesh's devices, as a local leader does among groups, it is the
      ring.
    - "hierarchical", over axes of G groups of n workers each (the slower the links, the earlier the axis): the root's
      group parts the tree among its workers, each sends its part to its peers in the other groups by a ring, and the
      groups gather the parts: :math:`(n - 1) / n \, |x|` in the group, :math:`(K + G - 2) / K \, |x| / n` between
      groups, :math:`(n - 1) / n \, |x|` in the group. Over one axis it is the ring.
    - "auto": a ring on GPUs for trees of a megabyte and more, if it sends less than an all-reduce (of 3 to 31 workers,
      with 32 chunks) and each worker is one device; otherwise an all-reduce.

    Over axes of `jax.vmap`, whose workers share a device, and axes of size 1 nothing is sent, whatever the method.

    A worker may be a model that is sharded over further mesh axes, which the `jax.shard_map` over the workers leaves to
    the compiler. "all_reduce", and therefore "auto", then sends each device's shards among the workers. All other
    methods flatten the tree: over Auto axes they are right, but first gather the model on each of the worker's devices;
    arrays that are sharded over Explicit axes they refuse.

    Args:
      tree: arrays of any shape and dtype, of the same shapes and dtypes on every worker; no worker axis.
      root: the sender's position on the (flattened) axis, the same on all workers; it may be traced.
      axis_name: the axis, or the axes, on which the workers lie.
      method: how it is sent.
      chunks: into how many pieces a ring or a chain cuts the tree.

    Returns:
      The root's tree; zeros if the root is not a position on the axis, as `NOBODY` is not. With "all_reduce" alone
      `jax.shard_map` knows that it is the same on all workers; with other methods it is typed as each worker's own.

    Raises:
      NameError: if the axis is not bound where this is called.
      ValueError: if there is no such method, or chunks is no whole number of pieces, or a method that flattens the tree
        is asked for and an array is sharded over an Explicit mesh axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([10.0, 11.0, 12.0])
      >>> print(jax.vmap(lambda x: broadcast_from(x, 1, "worker"), axis_name="worker")(x))
      [11. 11. 11.]
    """
    check_broadcast(method)
    check_whole("chunks", chunks, "pieces")
    is_root = worker_index(axis_name) == root
    names = axis_names(axis_name)
    tree = jax.tree.map(jnp.asarray, tree)
    leaves = jax.tree.leaves(tree)
    bits = [jnp.where(is_root, _bits(x), 0) for x in leaves]
    mesh = jax.sharding.get_abstract_mesh()
    on_mesh = mesh.manual_axes
    sending = tuple(name for name in names if name in on_mesh and lax.axis_size(name) > 1)
    if method == "auto" and any(mesh.shape[name] > 1 for name in mesh.axis_names if name not in on_mesh):
        method = "all_reduce"  # The only one that leaves a model sharded.
    method = chosen_broadcast(method, sum(x.nbytes for x in leaves), worker_count(sending), chunks)
    if method == "all_reduce" or not sending:
        received = lax.psum(bits, names)
    else:
        _check_not_explicit(method, leaves)
        sender = jnp.zeros((), jnp.int32)  # The position on the axes that are sent over.
        for name, coordinate in zip(names, _coordinates(root, names), strict=True):
            if name in sending:
                sender = sender * lax.axis_size(name) + coordinate
        elsewhere = math.prod(lax.axis_size(name) for name in on_mesh if name not in names)
        send = {"ring": _ring, "chain": _chain if elsewhere == 1 else _ring, "hierarchical": _hierarchical}[method]
        bits = lax.psum(bits, tuple(name for name in names if name not in on_mesh))
        received = _flattened(lambda x: send(x, sender, sending, chunks), bits)
    values = [_from_bits(x, leaf.dtype) for x, leaf in zip(received, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def check_broadcast(method: str) -> None:
    """Raise ValueError unless it is a method of `broadcast_from`."""
    if method not in get_args(BroadcastMethod):
        raise ValueError(f"a broadcast must be one of {', '.join(get_args(BroadcastMethod))}, got {method!r}.")


def chosen_broadcast(method: BroadcastMethod, size: int, workers: int, chunks: int = CHUNKS) -> BroadcastMethod:
    """The method that "auto" stands for; any other is itself.

    Args:
      method: of `broadcast_from`.
      size: of the tree in bytes.
      workers: among how many it is sent.
      chunks: of a ring.
    """
    if method != "auto":
        return method
    # A TPU's all-reduce uses links in all directions at once, and on CPUs both are bound by the cores.
    less = workers * (chunks + workers - 2) < 2 * (workers - 1) * chunks
    return "ring" if jax.default_backend() == "gpu" and size >= 1_000_000 and less else "all_reduce"


def _check_not_explicit(method: BroadcastMethod, leaves: list[Array]) -> None:
    """Raise ValueError if an array is sharded over an Explicit mesh axis, along which it can't be flattened."""
    spread = {name for x in leaves for axes in jax.typeof(x).sharding.spec if axes for name in axis_names(axes)}
    if spread:
        raise ValueError(
            f"the broadcast {method!r} flattens arrays, but here they are sharded over the Explicit mesh axis"
            f" {min(spread)!r}: use 'all_reduce', or make it an Auto axis."
        )


def _bits(x: Array) -> Array:
    """The bits of an array in unsigned integers."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool:
        return x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _from_bits(bits: Array, dtype: Any) -> Array:
    """The array of which these are the bits."""
    if jnp.issubdtype(dtype, jnp.bool):
        return bits.astype(bool)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.complex(*lax.bitcast_convert_type(bits, jnp.finfo(dtype).dtype))
    return lax.bitcast_convert_type(bits, dtype)


def _coordinates(position: Int[ArrayLike, ""], names: tuple[str, ...]) -> list[Int[Array, ""]]:
    """Where a position on the flattened axes lies on each of them."""
    coordinates, position = [], jnp.asarray(position)
    for name in reversed(names):
        coordinates.append(position % lax.axis_size(name))
        position = position // lax.axis_size(name)
    return coordinates[::-1]


def _flattened(function: Callable[[Array], Array], leaves: list[Array]) -> list[Array]:
    """Apply a function of one flat array to all arrays of a dtype at once; those of size 0 stay as they are."""
    results = list(leaves)
    for dtype in sorted({x.dtype for x in leaves if x.size}, key=str):
        of_dtype = [i for i, x in enumerate(leaves) if x.size and x.dtype == dtype]
        flat = function(jnp.concatenate([leaves[i].reshape(-1) for i in of_dtype]))
        ends = np.cumsum([leaves[i].size for i in of_dtype])[:-1]
        for i, part in zip(of_dtype, jnp.split(flat, ends), strict=True):
            results[i] = part.reshape(leaves[i].shape)
    return results


def _ring(bits: Array, root: Int[Array, ""], names: tuple[str, ...], chunks: int) -> Array:
    """Every worker sends at all times, also what is not wanted, so that one program serves all roots."""
    workers = worker_count(names)
    distance = (worker_index(names) - root) % workers
    links = [(i, (i + 1) % workers) for i in range(workers)]

    def pass_on(time: Array, rows: Array) -> Array:
        return _pass_on(rows, time, distance, names, links)

    return lax.fori_loop(0, chunks + workers - 2, pass_on, _rows(bits, chunks)).reshape(-1)[: bits.size]


def _chain(bits: Array, root: Int[Array, ""], names: tuple[str, ...], chunks: int) -> Array:
    """A ring for each root, of the links over which a chunk goes at that time."""
    workers = worker_count(names)

    def send_from(root: int, rows: Array) -> Array:
        distance = (worker_index(names) - root) % workers

        def pass_on(time: ArrayLike, rows: Array, first: int, last: int) -> Array:
            links = [((root + d) % workers, (root + d + 1) % workers) for d in range(first, last + 1)]
            return _pass_on(rows, time, distance, names, links)

        full = workers - 2  # From this time to the last chunk's start all links are used.
        for time in range(full):
            rows = pass_on(time, rows, max(0, time - chunks + 1), time)
        rows = lax.fori_loop(full, max(full, chunks), partial(pass_on, first=0, last=workers - 2), rows)
        for time in range(max(full, chunks), chunks + workers - 2):
            rows = pass_on(time, rows, time - chunks + 1, workers - 2)
        return rows

    branches = [partial(send_from, root) for root in range(workers)]
    rows = lax.switch(jnp.clip(root, 0, workers - 1), branches, _rows(bits, chunks))
    return rows.reshape(-1)[: bits.size]


def _rows(bits: Array, chunks: int) -> Array:
    """An array in chunks, and a row more for what arrives too early, too late or at the root, and is forgotten."""
    width = -(-bits.size // chunks)
    padding = jnp.zeros((chunks + 1) * width - bits.size, bits.dtype)  # Faster than jnp.pad on CPUs.
    return jnp.concatenate([bits, padding]).reshape(chunks + 1, width)


def _pass_on(
    rows: Array, time: ArrayLike, distance: Int[Array, ""], names: tuple[str, ...], links: list[tuple[int, int]]
) -> Array:
    """Each worker hands chunk after chunk to the next; at distance d from the root it sends chunk t - d at time t."""
    chunks = len(rows) - 1
    leaving = lax.dynamic_index_in_dim(rows, jnp.clip(time - distance, 0, chunks), keepdims=False)
    row = lax.ppermute(leaving, names, links)
    arriving = time - distance + 1
    wanted = (distance > 0) & (arriving >= 0) & (arriving < chunks)
    return lax.dynamic_update_index_in_dim(rows, row, jnp.where(wanted, arriving, chunks), 0)


def _hierarchical(bits: Array, root: Int[Array, ""], names: tuple[str, ...], chunks: int) -> Array:
    """Part the array within the last axis, send the parts over the axes before it, and gather them."""
    if len(names) == 1:
        return _ring(bits, root, names, chunks)
    *outer, inner = names
    workers = lax.axis_size(inner)
    parts = jnp.pad(bits, (0, -bits.size % workers)).reshape(workers, -1)
    # No reduce-scatter: gloo's, among CPU processes, can give wrong numbers for parts of 8 MiB and more.
    received = lax.all_to_all(parts, inner, 0, 0)
    part = lax.dynamic_index_in_dim(received, root % workers, keepdims=False)  # Zeros, but for the root's group.
    part = _hierarchical(part, root // workers, tuple(outer), chunks)
    return lax.all_gather(part, inner, tiled=True)[: bits.size]


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


def total(tree: Tree, axis_name: AxisName) -> Tree:
    """The sum of a tree over the workers: one all-reduce.

    Args:
      tree: arrays of the same shapes on every worker; no worker axis.
      axis_name: the axis, or the axes, on which the workers lie.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    _check_bound(axis_name)
    add = partial(lax.psum, axis_name=axis_names(axis_name))

    def add_wide(tree: Tree) -> Tree:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), add(wide), tree)

    # On CPUs XLA itself adds bfloat16 in float32, but aborts at it where a worker is spread over several devices.
    return lax.platform_dependent(tree, cpu=add_wide, default=add)


def mean(tree: Tree, axis_name: AxisName) -> Tree:
    """The mean of a tree over the workers: one all-reduce.

    Args:
      tree: arrays of the same shapes on every worker; no worker axis.
      axis_name: the axis, or the axes, on which the workers lie.

    Raises:
      NameError: if the axis is not bound where this is called.
    """
    workers = worker_count(axis_name)
    return jax.tree.map(lambda x: x / workers, total(tree, axis_name))


def own_entry(values: ArrayLike, axis_name: AxisName) -> Array:
    """The calling worker's own entry of an array with the shape of the worker axes; a scalar is everybody's.

    Raises:
      NameError: if an axis is not bound where this is called.
      ValueError: if the array has another shape.
    """
    values, names = jnp.asarray(values), axis_names(axis_name)
    sizes = tuple(worker_count(name) for name in names)
    if values.ndim == 0:
        return values
    if values.shape != sizes:
        raise ValueError(f"values a worker must have the shape of the axes {names}, {sizes}, got {values.shape}.")
    return values[tuple(worker_index(name) for name in names)]


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers in a worker's tree are finite; no collective."""
    # Zero times a number is 0 if it is finite, otherwise NaN; a sum is several times faster than a reduction of bools.
    sums = [jnp.sum(x * 0) for x in jax.tree.leaves(inexact(tree))]
    return jnp.isfinite(jnp.stack(sums).sum()) if sums else jnp.array(True)


def when(due: Bool[Array, ""], exchange: Callable[[Tree], Tree], tree: Tree, axis_name: AxisName) -> Tree:
    """The tree after the exchange if one is due, and as it is otherwise.

    A real branch, so that nothing is sent in between; a select only where `due` is batched by `jax.vmap`.

    Args:
      due: whether the workers exchange now; the same on all workers, or they wait for each other for ever.
      exchange: takes the tree to one of the same shapes and dtypes; it may call collectives.
      tree: what an exchange changes; no worker axis.
      axis_name: all axes on which workers lie.
    """
    return lax.cond(due, lambda t: _as_own(exchange(t), axis_name), lambda t: _as_own(t, axis_name), tree)


def _as_own(tree: Tree, axis_name: AxisName) -> Tree:
    """Type values that are equal on all workers as each worker's own.

    Under `jax.shard_map` a collective's result is typed as unvarying over its axis, and the branches of a `lax.cond`
    must agree on that. The select is free: both its sides are the same array. (`lax.pcast` is meant for this, but
    fails under `jax.vmap`.)
    """
    return select(worker_index(axis_name) >= 0, tree, tree)


def _check_bound(axis_name: AxisName) -> None:
    for name in axis_names(axis_name):
        try:
            lax.axis_size(name)
        except NameError:
            raise NameError(
                f"there is no axis {name!r} here: call this inside jax.shard_map or jax.pmap over an axis of that"
                f" name, or inside jax.vmap(..., axis_name={name!r})."
            ) from None
