"""How one worker's arrays are sent to all others, as a value: exact, or rounded to fewer bytes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lsgd_jax.exchange.broadcast import BroadcastMethod, broadcast_from, check_broadcast
from lsgd_jax.exchange.compression import Wire, broadcast_rounded
from lsgd_jax.exchange.shards import ShardSpecs


class Sending(NamedTuple):
    """A way to send one worker's tree to all: a pair of pure functions."""

    init: Callable[[optax.Params], Any]
    """From parameters to the state before anything was sent."""
    send: Callable[..., tuple[optax.Params, Any]]
    """`send(tree, root, axis_name, state)` returns the root's tree as it is received, and the new state."""


def exact(method: BroadcastMethod = "auto", shard_specs: ShardSpecs | None = None) -> Sending:
    """Bit for bit, by one of the methods of `broadcast_from`."""
    check_broadcast(method)

    def send(x: optax.Params, root: Any, axis_name: Any, state: tuple) -> tuple[optax.Params, tuple]:
        return broadcast_from(x, root, axis_name, method=method, shard_specs=shard_specs), state

    return Sending(lambda params: (), send)


def bfloat16(method: BroadcastMethod = "auto", shard_specs: ShardSpecs | None = None) -> Sending:
    """Rounded to bfloat16: half the bytes of float32, as `broadcast_rounded` tells."""
    check_broadcast(method)

    def send(x: optax.Params, root: Any, axis_name: Any, state: tuple) -> tuple[optax.Params, tuple]:
        return broadcast_rounded(x, root, axis_name, wire="bfloat16", method=method, shard_specs=shard_specs), state

    return Sending(lambda params: (), send)


def int8(method: BroadcastMethod = "auto", shard_specs: ShardSpecs | None = None) -> Sending:
    """Differences to what was received last, in int8: a quarter of the bytes of float32, as `broadcast_rounded` tells.

    The state is what was received last, the same on all workers; zeros before the first.
    """
    check_broadcast(method)

    def send(x: optax.Params, root: Any, axis_name: Any, last: optax.Params) -> tuple[optax.Params, optax.Params]:
        received = broadcast_rounded(x, root, axis_name, wire="int8", last=last, method=method, shard_specs=shard_specs)
        return received, received

    return Sending(partial(jax.tree.map, jnp.zeros_like), send)


def sending(wire: Wire | None, method: BroadcastMethod = "auto", shard_specs: ShardSpecs | None = None) -> Sending:
    """The way to send in these numbers, by this method.

    Args:
      wire: None for the numbers as they are, "bfloat16" or "int8".
      method: of `broadcast_from`.
      shard_specs: how a sharded worker's arrays lie, as for `broadcast_from`.

    Raises:
      ValueError: if there is no such wire or method.
    """
    if wire not in (None, *get_args(Wire)):
        raise ValueError(f'wire must be None, "bfloat16" or "int8", got {wire!r}.')
    return {None: exact, "bfloat16": bfloat16, "int8": int8}[wire](method, shard_specs)
