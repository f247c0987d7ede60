"""Communication ledger: the collectives of a method by formula, known before anything is compiled."""

from collections import Counter
from math import ceil, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsgd_jax.config import Config
from lsgd_jax.costs.collectives import Collective
from lsgd_jax.distributed.chips import shard_specs
from lsgd_jax.exchange import CHUNKS, BroadcastMethod, Wire, chosen_broadcast, scale_count
from lsgd_jax.methods import METHODS
from lsgd_jax.streaming import cut, schedule

_NUMBER = 4
"""Bytes of a score, an index, a norm or a scale."""


class Share(NamedTuple):
    """What one chip of a worker holds of an array."""

    shape: tuple[int, ...]
    dtype: Any
    whole: tuple[int, ...]
    """Shape of the array."""

    @property
    def size(self) -> int:
        """Number of its elements."""
        return prod(self.shape)

    @property
    def is_sharded(self) -> bool:
        """Whether other chips hold the rest."""
        return self.shape != self.whole


class Exchange(NamedTuple):
    """Exchange of a method at one level: of all parameters or, if they are streamed, of a fragment."""

    period: int
    """Local steps between exchanges."""
    collectives: list[Collective]
    """Collectives of the exchange among workers, with one worker per device or, of sharded workers, per chip."""
    first: int
    """Local steps before the first exchange."""
    at_first: list[Collective]
    """Further collectives of the first exchange: an average of the starts."""

    @property
    def bytes_sent(self) -> float:
        """Bytes sent per exchange by each worker or, of sharded workers, by each of its chips."""
        return sum(each.sent * (each.times or 0) for each in self.collectives)


def shares(config: Config, params: Any) -> list[Share]:
    """What one chip holds of each of a worker's parameters.

    Args:
      config: configuration of the run.
      params: parameters of one worker, or their shapes and dtypes.
    """
    found = []
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(shard_specs(config)(params)), strict=True):
        parts = [*(1 if name is None else config.chips_per_worker for name in spec), *[1] * len(leaf.shape)]
        shape = tuple(n // part for n, part in zip(leaf.shape, parts, strict=False))
        found.append(Share(shape, leaf.dtype, tuple(leaf.shape)))
    return found


def share_bytes(config: Config, params: Any) -> int:
    """Bytes of a worker's parameters on each of its chips.

    Args:
      config: configuration of the run.
      params: parameters of one worker, or their shapes and dtypes.
    """
    return _size(shares(config, params))


def exchanges(config: Config, params: Any) -> list[Exchange]:
    """List the exchanges of a run, those in groups first, fragment by fragment: parameters and, with some, scalars.

    Args:
      config: configuration of the run.
      params: parameters of one worker, or their shapes and dtypes.

    Raises:
      UsageError: if there are fewer arrays of parameters than fragments.
    """
    row, options = METHODS[config.method], config.options
    fragments = [shares(config, part) for part in cut(params, options.get("fragments", 1))]
    everyone, found = config.groups * config.workers, []
    for among, period, _ in config.levels:
        method: BroadcastMethod = options.get("broadcast", "all_reduce")
        if method == "chain" and among < everyone:  # A group's leader is one of several that are sent at once.
            method = "ring"
        sizes = (among,) if among == config.workers else (config.groups, config.workers)
        for leaves, first in zip(fragments, schedule(len(fragments), period), strict=True):
            scalars = row.scalars(len(leaves), among)
            parts = [Collective("all-reduce", _NUMBER * together, among) for together in scalars]
            if row.gathers:
                parts += _gathering(_size(leaves), sizes)
            else:
                # Where some arrays are sharded, those that are not go by an all-reduce.
                sharded, whole = ([leaf for leaf in leaves if leaf.is_sharded is kind] for kind in (True, False))
                parts += rounded_collectives(sharded or whole, sizes, method, options.get("wire"))
                if sharded and whole:
                    parts += rounded_collectives(whole, sizes, "all_reduce", options.get("wire"))
            averages = row.averages_start(options, among == everyone)
            start = [Collective("all-reduce", _size(leaves), among)] * averages
            found.append(Exchange(period, parts, first, start))
    return found


def bytes_sent(config: Config, params: Any, steps: int) -> float:
    """Compute the bytes sent per worker after some local steps, without evaluations; of sharded workers, per chip.

    An all-reduce counts as a ring all-reduce of n workers: 2 (n - 1) / n times its size per worker. If workers share a
    device, the result is what they would send with one device each. What the chips of one worker send each other is not
    counted.

    Args:
      config: configuration of the run.
      params: parameters of one worker, or their shapes and dtypes.
      steps: number of local steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lsgd_jax.presets import PRESETS
      >>> params = jax.ShapeDtypeStruct((250_000,), jnp.float32)
      >>> bytes_sent(PRESETS["mnist1d"], params, steps=16)  # 4 exchanges among 4 workers and one among all 8.
      7750062.0
    """

    def sent(exchange: Exchange) -> float:
        times = (steps - exchange.first) // exchange.period + 1
        return times * exchange.bytes_sent + min(times, 1) * sum(each.sent for each in exchange.at_first)

    return sum(map(sent, exchanges(config, params)))


def table(config: Config, params: Any) -> str:
    """Format a table of the bytes sent per worker, per exchange and per step on average, by method.

    Args:
      config: configuration of the workers; its method does not matter.
      params: parameters of one worker, or their shapes and dtypes.
    """
    rows = [("method", "bytes per worker per exchange", "per step")]
    for method in METHODS:
        # A few methods refuse these two options, which do not affect communication.
        statistics = "own" if config.batch_statistics == "leader" else config.batch_statistics
        try:
            method_config = config.replace(
                method=method, batch_statistics=statistics, learning_rates="equal", asynchronous=None
            )
        except ValueError as error:
            rows.append((method, f"not with this configuration: {error}", ""))
            continue
        found = exchanges(method_config, params)
        texts = [f"{each.bytes_sent:,.0f} every {each.period}" for each in found]
        rows.append((method, ", ".join(texts), f"{sum(each.bytes_sent / each.period for each in found):,.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>13}" for a, b, c in rows)


def rounded_collectives(
    leaves: list[Any], sizes: tuple[int, ...], method: BroadcastMethod, wire: Wire | None
) -> list[Collective]:
    """List the collectives of `broadcast_rounded`.

    Args:
      leaves: arrays of the tree, or their shapes and dtypes, or what a chip holds of them.
      sizes: sizes of the axes.
      method: `method` of `broadcast_from`.
      wire: `wire` of `broadcast_rounded`.
    """
    numbers: Counter[int] = Counter()
    scales = 0
    for leaf in leaves:
        parts = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
        width = leaf.dtype.itemsize // parts
        if wire == "int8" and jnp.issubdtype(leaf.dtype, jnp.inexact):
            scales += parts * scale_count(leaf.shape, getattr(leaf, "whole", None)) * max(width, _NUMBER)
        if wire is not None and jnp.issubdtype(leaf.dtype, jnp.inexact):
            width = {"bfloat16": 2, "int8": 1}[wire]
        numbers[width] += parts * leaf.size
    found = broadcast_collectives(numbers, sizes, method)
    if scales:
        found.append(Collective("all-reduce", scales, prod(sizes)))
    return found


def broadcast_collectives(
    numbers: dict[int, int], sizes: tuple[int, ...], method: BroadcastMethod, chunks: int = CHUNKS
) -> list[Collective]:
    """List the collectives of `broadcast_from`.

    Args:
      numbers: number of scalars in the tree by width in bytes.
      sizes: sizes of the axes.
      method: `method` of `broadcast_from`.
      chunks: number of chunks in a ring or a chain.
    """
    sizes = tuple(size for size in sizes if size > 1)
    total, workers = sum(width * count for width, count in numbers.items()), prod(sizes)
    method = chosen_broadcast(method, total, workers, chunks)
    if method == "all_reduce" or not sizes:
        return [Collective("all-reduce", total, workers)]
    parts: list[Collective] = []
    for width, count in numbers.items():
        if count == 0:
            continue
        outer = list(sizes) if method == "hierarchical" else [workers]
        while len(outer) > 1:
            inner = outer.pop()
            count = ceil(count / inner)
            whole = count * inner * width
            parts += [Collective("all-to-all", whole, inner), Collective("all-gather", whole, inner)]
        [ring] = outer
        chunk = ceil(count / chunks) * width
        if method == "chain":
            parts.append(Collective("collective-permute", chunk, ring, chunks, senders=ring - 1))
        else:
            parts.append(Collective("collective-permute", chunk, ring, chunks + ring - 2))
    return parts


def _gathering(size: int, sizes: tuple[int, ...]) -> list[Collective]:
    """List the collectives with which all receive the arrays of all, of `size` bytes each, one axis after the other."""
    parts = []
    for among in reversed([size for size in sizes if size > 1]):
        size *= among
        parts.append(Collective("all-gather", size, among))
    return parts


def _size(leaves: list[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
