"""An exchange among workers on one device beside the memory traffic that it needs at least.

Each worker's parameters are read once and written once: that is what "doubling" does to the same tree, and "copy" to
one array of as many bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.gpu.part import Record, timed
from benchmarks.speed.exchange import exchange_programs
from benchmarks.speed.training import random_network
from lsgd_jax.models import CNN7, ResNet50


def over_slots(function: Callable) -> Callable:
    """All workers on one device, the worker axis first; waits for the result."""
    mapped = jax.jit(jax.vmap(function, axis_name="worker"))
    return lambda *arguments: jax.block_until_ready(mapped(*arguments))


def measure(record: Record, small: bool) -> None:
    """Time an exchange and its parts."""
    trees: dict[str, Any] = {"CNN7": random_network(lambda: CNN7((28, 28, 3), 10, rngs=nnx.Rngs(0)))}
    if not small:
        trees["ResNet50"] = random_network(lambda: ResNet50((32, 32, 3), 1000, rngs=nnx.Rngs(0)))
    trees = {name: nnx.state(model, nnx.Param) for name, model in trees.items()}
    *_, (name, largest) = trees.items()
    trees[f"one array of {name}'s size"] = jnp.ones(sum(x.size for x in jax.tree.leaves(largest)))
    for name, params in trees.items():
        for workers in (4,) if small else (4, 16):
            with record.attempt(f"{name}, {workers} workers"):
                bytes_moved = 2 * workers * sum(x.nbytes for x in jax.tree.leaves(params))
                programs = exchange_programs(params, workers, over_slots)
                flat = jnp.ones(bytes_moved // 8)
                programs["copy"] = partial(over_slots(lambda x: x + 1), flat)
                result = timed(programs, 3 if small else 50, "copy")
                record.keep(
                    f"{name}, {workers} workers",
                    {
                        "arrays": len(jax.tree.leaves(params)),
                        "bytes at least": bytes_moved,
                        "GB per second of the copy": bytes_moved / 1e6 / result["milliseconds"]["copy"]["median"],
                    }
                    | result,
                )
