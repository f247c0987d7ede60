"""What a method sends, by formula: the collectives that a compiled run has, known before it is compiled."""

from collections import Counter
from math import ceil, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsgd_jax.collectives import Collective
from lsgd_jax.config import Config
from lsgd_jax.exchange import CHUNKS, BroadcastMethod, Wire, chosen_broadcast, scale_count
from lsgd_jax.methods import METHODS

WITH_CENTER = ("easgd", "downpour", "diloco")
"""Methods that average the starts at the first exchange, to form a center."""
_NUMBER = 4
"""The bytes of a score, a position, a norm or a scale."""


class Exchange(NamedTuple):
    """One kind of exchange of a method."""

    period: int
    """Local steps from one to the next."""
    collectives: list[Collective]
    """What it consists of, for a worker on a device of its own."""

    @property
    def bytes_sent(self) -> float:
        """The bytes that each worker sends in one."""
        return sum(each.sent * (each.times or 0) for each in self.collectives)


def exchanges(config: Config, params: Any) -> list[Exchange]:
    """The exchanges of a run: LSGD's in a group first.

    LSGD's are two scalars for the election and a broadcast; GRAWA's a norm, or a norm for each array, and an average;
    all others' an average.

    Args:
      config: of the run.
      params: one worker's, or their shapes and dtypes.
    """
    leaves = jax.tree.leaves(params)
    rounded = config.method == "local_sgd" and config.wire == "bfloat16"
    average, found = sum(2 * x.size for x in leaves) if rounded else _size(leaves), []
    for among, period in config.levels:
        if config.method == "lsgd":
            sizes = (among,) if among == config.workers else (config.groups, config.workers)
            parts = [Collective("all-reduce", _NUMBER, among)] * 2
            parts += _leader(config, leaves, sizes, one_root=among == config.groups * config.workers)
        else:
            numbers = {"mgrawa": 1, "lgrawa": len(leaves)}.get(config.method, 0)
            parts = [Collective("all-reduce", average, among)] + [Collective("all-reduce", _NUMBER, among)] * numbers
        found.append(Exchange(period, parts))
    return found


def bytes_sent(config: Config, params: Any, steps: int) -> float:
    """The bytes that each worker has sent after some local steps, evaluations left out.

    An all-reduce is counted as a ring of n workers does it, 2 (n - 1) / n times its size a worker. Where workers share
    a device, it is what they would send if each had its own.

    Args:
      config: of the run.
      params: one worker's, or their shapes and dtypes.
      steps: local steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lsgd_jax.presets import PRESETS
      >>> params = jax.ShapeDtypeStruct((250_000,), jnp.float32)
      >>> bytes_sent(PRESETS["mnist1d"], params, steps=16)  # 4 exchanges among 4 workers and one among all 8.
      7750062.0
    """
    sent = sum(steps // exchange.period * exchange.bytes_sent for exchange in exchanges(config, params))
    starts = config.method in WITH_CENTER or (config.method == "local_sgd" and config.wire is not None)
    if starts and steps >= config.period:
        everyone = config.groups * config.workers
        sent += Collective("all-reduce", _size(jax.tree.leaves(params)), everyone).sent
    return sent


def table(config: Config, params: Any) -> str:
    """What each worker sends with each method in an exchange and, on average over many, in a step; text, for reading.

    Args:
      config: of the workers and their options; its method does not matter.
      params: one worker's, or their shapes and dtypes.
    """
    rows = [("method", "bytes a worker sends in an exchange", "and in a step")]
    for method in METHODS:
        # A few methods refuse these two options, which send nothing.
        statistics = "own" if config.batch_statistics == "leader" else config.batch_statistics
        of_method = config.replace(method=method, batch_statistics=statistics, learning_rates="equal")
        found = exchanges(of_method, params)
        texts = [f"{each.bytes_sent:,.0f} every {each.period}" for each in found]
        rows.append((method, ", ".join(texts), f"{sum(each.bytes_sent / each.period for each in found):,.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>13}" for a, b, c in rows)


def _leader(config: Config, leaves: list[Any], sizes: tuple[int, ...], *, one_root: bool) -> list[Collective]:
    """The broadcast of a leader's parameters over axes of these sizes, of one of all workers or of every group's."""
    method = "ring" if config.broadcast == "chain" and not one_root else config.broadcast
    return rounded_collectives(leaves, sizes, method, config.wire)


def rounded_collectives(
    leaves: list[Any], sizes: tuple[int, ...], method: BroadcastMethod, wire: Wire | None
) -> list[Collective]:
    """What `broadcast_rounded` consists of.

    Args:
      leaves: the tree's arrays, or their shapes and dtypes.
      sizes: of the axes.
      method: of `broadcast_from`.
      wire: of `broadcast_rounded`.
    """
    numbers: Counter[int] = Counter()
    scales = 0
    for leaf in leaves:
        parts = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
        width = leaf.dtype.itemsize // parts
        if wire == "int8" and jnp.issubdtype(leaf.dtype, jnp.inexact):
            scales += parts * scale_count(leaf.shape) * max(width, _NUMBER)
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
    """What `broadcast_from` consists of.

    Args:
      numbers: how many numbers the tree has of each width in bytes.
      sizes: of the axes.
      method: of `broadcast_from`.
      chunks: of a ring or a chain.
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


def _size(leaves: list[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
