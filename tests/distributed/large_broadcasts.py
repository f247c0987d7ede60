"""What several processes call: 24 MiB sent level by level, 6 times, with every number compared.

It ends them with 1 and says in which exchanges a number was wrong. Among 8 workers in 4 groups the parts have 12 MiB:
with gloo's reduce-scatter, numbers were wrong in 2 to 20 % of such exchanges. That none is compiled is tested
elsewhere.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from lsgd_jax import broadcast_from, distributed
from lsgd_jax.distributed import SHARED, STACKED, place

GROUPS, WORKERS, EXCHANGES = 4, 2, 6
SIZE = 24 * 2**20 // 4


def main() -> None:
    """Send, compare, and exit with 1 where a number is wrong."""
    distributed.simulate_devices(GROUPS * WORKERS)
    placement = place(GROUPS, WORKERS)

    def wrong_numbers(root):
        def numbers(worker):
            return jnp.arange(SIZE, dtype=jnp.uint32) * (GROUPS * WORKERS) + worker.astype(jnp.uint32)

        own = numbers(jax.lax.axis_index(placement.axes))
        received = broadcast_from(own, root, placement.axes, method="hierarchical", chunks=1)
        return (jnp.sum(received != numbers(root)),)

    mapped = placement.over_workers(wrong_numbers, (SHARED,), (STACKED,))
    program = jax.jit(mapped)
    wrong = []
    for i in range(EXCHANGES):
        [counts] = program(np.int32(i))
        if any(np.any(of_worker.data) for of_worker in counts.addressable_shards):
            wrong.append(i)
    if wrong:
        sys.exit(f"wrong numbers in exchanges {wrong}")
