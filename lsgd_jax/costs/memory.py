"""Memory of the workers' state by method and option, from shapes: known before anything is compiled."""

import itertools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from lsgd_jax.config import Config
from lsgd_jax.methods import METHODS
from lsgd_jax.optimizers import local_optimizer
from lsgd_jax.train.setup import make_model, make_optimizer, place_workers
from lsgd_jax.train.step import state_shapes

_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"delay": 1},
    {"wire": "bfloat16"},
    {"wire": "int8"},
    {"stale_pull": 0.1},
    {"fragments": 2},
    {"revive": "from_leader"},
)
"""Options that may add to a method's state."""


class Memory(NamedTuple):
    """Bytes that each device of a worker holds between steps."""

    parameters: int
    statistics: int
    """Running statistics of batch normalization."""
    optimizer: int
    """State of the worker's own optimizer."""
    exchange: int
    """State of the method: a center or stored leaders, what is under way, recent losses and counters."""


def memory(config: Config) -> Memory:
    """Bytes of a worker's state on each of its devices.

    Args:
      config: of the run; there must be devices for its workers.

    Raises:
      UsageError: if the network does not fit the data, or the workers the devices.

    Example:
      >>> from lsgd_jax.presets import PRESETS
      >>> memory(PRESETS["digits"].replace(method="data_parallel"))  # SGD's momentum is as large as the parameters.
      Memory(parameters=35880, statistics=0, optimizer=35880, exchange=0)
    """
    placement, model = place_workers(config), nnx.eval_shape(lambda: make_model(config))
    state = state_shapes(model, make_optimizer(config, placement), placement)
    own = state_shapes(model, local_optimizer(config), placement)

    def held(tree: Any) -> int:
        shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards) // math.prod(placement.slots)

    optimizer = held(own.optimizer)
    return Memory(held(state.params), held(state.statistics), optimizer, held(state.optimizer) - optimizer)


def table(config: Config) -> str:
    """Format a table of what each device holds of a worker, by method and option.

    Args:
      config: configuration of the workers; its method does not matter.
    """
    rows: list[tuple[str, ...]] = [("bytes per worker and device", *Memory._fields, "sum")]
    for method, options in itertools.product(METHODS, _VARIANTS):
        try:
            found = memory(config.replace(method=method, **options))
        except ValueError:  # The method has no such option, or does not fit the configuration.
            continue
        name = " ".join([method, *(f"--{key.replace('_', '-')} {value}" for key, value in options.items())])
        rows.append((name, *(f"{size:,}" for size in found), f"{sum(found):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
