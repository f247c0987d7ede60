"""What workers exchange, and how: whatever moves bytes between workers lives here.

`axes` names the workers, `election` finds who leads, `broadcast` and `compression` send one worker's arrays to all,
`sending` makes a value of that, `shards` maps both over the devices of workers that are sharded models, `averages` sums
over workers, and `trees` has the arithmetic on trees of parameters.
"""

from lsgd_jax.exchange.averages import Members, mean, rounded_mean, total
from lsgd_jax.exchange.axes import AxisName, axis_names, own_entry, when, worker_count, worker_index
from lsgd_jax.exchange.broadcast import CHUNKS, BroadcastMethod, broadcast_from, check_broadcast, chosen_broadcast
from lsgd_jax.exchange.compression import BLOCK, Wire, broadcast_rounded, scale_count
from lsgd_jax.exchange.election import NOBODY, all_finite, elect, elect_quorum, init_losses, record_loss
from lsgd_jax.exchange.sending import Sending, bfloat16, exact, int8, sending
from lsgd_jax.exchange.shards import ShardSpecs, largest_axis

__all__ = [
    "BLOCK",
    "CHUNKS",
    "NOBODY",
    "AxisName",
    "BroadcastMethod",
    "Members",
    "Sending",
    "ShardSpecs",
    "Wire",
    "all_finite",
    "axis_names",
    "bfloat16",
    "broadcast_from",
    "broadcast_rounded",
    "check_broadcast",
    "chosen_broadcast",
    "elect",
    "elect_quorum",
    "exact",
    "init_losses",
    "int8",
    "largest_axis",
    "mean",
    "own_entry",
    "record_loss",
    "rounded_mean",
    "scale_count",
    "sending",
    "total",
    "when",
    "worker_count",
    "worker_index",
]
