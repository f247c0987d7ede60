"""Processes of a run, and placement of the workers on the devices' mesh."""

from lsgd_jax.distributed.chips import CHIP, gathered, over_chips, value_and_gradient
from lsgd_jax.distributed.placement import SHARED, STACKED, Placement, place
from lsgd_jax.distributed.processes import (
    COORDINATOR,
    HEARTBEAT,
    JOIN_TIMEOUT,
    LAUNCHER,
    PROCESS,
    PROCESSES,
    StepCount,
    failing_together,
    from_process_zero,
    initialize,
    of_all_processes,
    posted_place,
    process_count,
    process_index,
    simulate_devices,
    to_first_process,
)

__all__ = [
    "CHIP",
    "COORDINATOR",
    "HEARTBEAT",
    "JOIN_TIMEOUT",
    "LAUNCHER",
    "PROCESS",
    "PROCESSES",
    "SHARED",
    "STACKED",
    "Placement",
    "StepCount",
    "failing_together",
    "from_process_zero",
    "gathered",
    "initialize",
    "of_all_processes",
    "over_chips",
    "place",
    "posted_place",
    "process_count",
    "process_index",
    "simulate_devices",
    "to_first_process",
    "value_and_gradient",
]
