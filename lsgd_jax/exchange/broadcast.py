"""One worker's arrays to all others, bit for bit."""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Int

from lsgd_jax import spelling
from lsgd_jax.checks import check_whole
from lsgd_jax.exchange.axes import AxisName, axis_names, check_bound, worker_count, worker_index
from lsgd_jax.exchange.shards import Shard, ShardSpecs, by_shard, inner_axes, specs_of
from lsgd_jax.exchange.trees import varying_axes

BroadcastMethod: TypeAlias = Literal["auto", "all_reduce", "ring", "chain", "hierarchical"]
"""How `broadcast_from` sends."""
Tree = TypeVar("Tree")

SMALL = 2**17
"""Bytes up to which an array is joined with others on CPUs: that saves a wait per array, and costs memory per byte."""
CHUNKS = 32
"""Into how many pieces a ring or a chain cuts what it sends: enough to come near half of an all-reduce's time."""


def broadcast_from(
    tree: Tree,
    root: Int[ArrayLike, ""],
    axis_name: AxisName,
    *,
    method: BroadcastMethod = "auto",
    chunks: int = CHUNKS,
    shard_specs: ShardSpecs | None = None,
) -> Tree:
    r"""Give every worker the root's copy of a tree, bit for bit.

    Arrays travel as their bits in unsigned integers, zero on all but the root: masked and not multiplied, so that no
    value of another worker, NaN or not, can leak; and on floats a sum would lose the sign of zeros and the payload of
    NaNs. All methods give the same bits. With :math:`|x|` the size of the tree, each of n workers sends

    - "all_reduce": a sum of the masked bits, :math:`2 (n - 1) / n \, |x|`: what averaging the tree costs. (On GPUs,
      where XLA widens 16-bit integers, twice that for 16-bit arrays.) On CPUs, small arrays of a dtype are sent as one.
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
      with 32 chunks) and it is known how sharded workers lie; otherwise an all-reduce.

    Over axes of `jax.vmap`, whose workers share a device, and axes of size 1 nothing is sent, whatever the method.

    A worker may be a model that is sharded over further mesh axes, which the `jax.shard_map` over the workers leaves to
    the compiler. Each device then sends its own shards, by any method, and :math:`|x|` is what one device has of the
    tree. How arrays lie over Explicit axes, their types say. Over Auto axes `shard_specs` says it; without it the
    all-reduce leaves it to the compiler, and the other methods take arrays to lie as `largest_axis` of
    `lsgd_jax.exchange` has it: right wherever they lie, but those that lie otherwise are moved there first.

    Args:
      tree: arrays of any shape and dtype, of the same shapes and dtypes on every worker; no worker axis.
      root: the sender's position on the (flattened) axis, the same on all workers; it may be traced.
      axis_name: the axis, or the axes, on which the workers lie.
      method: how it is sent.
      chunks: into how many pieces a ring or a chain cuts the tree.
      shard_specs: from the tree to the PartitionSpecs of its arrays over Auto axes of the mesh.

    Returns:
      The root's tree; zeros if the root is not a position on the axis, as `NOBODY` is not. With "all_reduce" alone
      `jax.shard_map` knows that it is the same on all workers; with other methods it is typed as each worker's own.

    Raises:
      NameError: if the axis is not bound where this is called.
      ValueError: if there is no such method, or chunks is no whole number of pieces.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([10.0, 11.0, 12.0])
      >>> print(jax.vmap(lambda x: broadcast_from(x, 1, "worker"), axis_name="worker")(x))
      [11. 11. 11.]
    """
    check_broadcast(method)
    check_whole("chunks", chunks, "pieces")
    check_bound(axis_name)
    tree = jax.tree.map(jnp.asarray, tree)
    leaves, structure = jax.tree.flatten(tree)
    specs = specs_of(tree, axis_name, shard_specs, by_largest_axis=method not in ("auto", "all_reduce"))

    def send(method: BroadcastMethod, shards: list[Shard], root: Array, leaves: list[Array]) -> list[Array]:
        inner = {name for shard in shards for name in shard.all_names}
        return broadcast_leaves(leaves, root, axis_name, method=method, chunks=chunks, inner=inner)

    return jax.tree.unflatten(structure, by_shard(send, specs, method, jnp.asarray(root), leaves))


def broadcast_leaves(
    leaves: list[Array],
    root: Int[Array, ""],
    axis_name: AxisName,
    *,
    method: BroadcastMethod,
    chunks: int = CHUNKS,
    inner: Collection[str] = (),
) -> list[Array]:
    """Give every worker the root's copy of some arrays, of which a device has the whole or, in `by_shard`, its shards.

    Args:
      leaves: arrays.
      root: the sender's position, as for `broadcast_from`.
      axis_name: the axis, or the axes, on which the workers lie.
      method: of `broadcast_from`.
      chunks: of a ring or a chain.
      inner: the axes over which a worker is spread here; the root is the same on them.
    """
    is_root = worker_index(axis_name) == root
    names = axis_names(axis_name)
    bits = [jnp.where(is_root, _bits(x), 0) for x in leaves]
    on_mesh = jax.sharding.get_abstract_mesh().manual_axes
    sending = tuple(name for name in names if name in on_mesh and lax.axis_size(name) > 1)
    if method == "auto" and inner_axes():
        method = "all_reduce"  # The only one that leaves a model sharded of which nobody knows how it lies.
    method = chosen_broadcast(method, sum(x.nbytes for x in leaves), worker_count(sending), chunks)
    if method == "all_reduce" or not sending:
        is_whole = not inner and not inner_axes()
        received = _summed(bits, names) if sending and is_whole else lax.psum(bits, names)
    else:
        sender = jnp.zeros((), jnp.int32)  # The position on the axes that are sent over.
        for name, coordinate in zip(names, _coordinates(root, names), strict=True):
            if name in sending:
                sender = sender * lax.axis_size(name) + coordinate
        elsewhere = math.prod(lax.axis_size(name) for name in on_mesh if name not in {*names, *inner})
        send = {"ring": _ring, "chain": _chain if elsewhere == 1 else _ring, "hierarchical": _hierarchical}[method]
        bits = lax.psum(bits, tuple(name for name in names if name not in on_mesh))
        flat, apart = _joined(bits)
        received = apart([send(x, sender, sending, chunks) if x.size else x for x in flat])
    return [_from_bits(x, leaf.dtype) for x, leaf in zip(received, leaves, strict=True)]


def check_broadcast(method: str) -> None:
    """Raise ValueError unless it is a method of `broadcast_from`."""
    if method not in get_args(BroadcastMethod):
        raise ValueError(spelling.must_be_one("a broadcast", method, get_args(BroadcastMethod)))


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


def _summed(leaves: list[Array], names: tuple[str, ...]) -> list[Array]:
    """All-reduce whole arrays: on CPUs, where workers wait for each other array by array, the small ones as one."""
    add = partial(lax.psum, axis_name=names)

    def add_small_together(leaves: list[Array]) -> list[Array]:
        flat, apart = _joined(leaves, SMALL)
        return apart(add(flat))

    return lax.platform_dependent(leaves, cpu=add_small_together, default=add)


def _joined(leaves: list[Array], largest: float = math.inf) -> tuple[list[Array], Callable[[list[Array]], list[Array]]]:
    """All arrays of a kind as one flat array, but those of size 0 or of more bytes than `largest` each as its own.

    Returns:
      The flat arrays, and a function that makes the arrays of such ones again.
    """
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        kinds.setdefault((x.dtype, varying_axes(x)) if 0 < x.nbytes <= largest else i, []).append(i)
    flat = [jnp.concatenate([leaves[i].reshape(-1) for i in of_kind]) for of_kind in kinds.values()]

    def apart(flat: list[Array]) -> list[Array]:
        parts: dict[int, Array] = {}
        for of_kind, joined in zip(kinds.values(), flat, strict=True):
            ends = np.cumsum([leaves[i].size for i in of_kind])[:-1]
            parts |= zip(of_kind, jnp.split(joined, ends), strict=True)
        return [parts[i].reshape(x.shape) for i, x in enumerate(leaves)]

    return flat, apart


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
