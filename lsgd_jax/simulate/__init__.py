"""Discrete-event simulation of the methods in virtual time, with heterogeneous workers and links, on one machine.

`event_log` records every event, and `throughput` computes only the totals, for up to 100,000 workers.
`lsgd_jax.simulate.training` trains a small model along an event log, for its error against virtual time.
"""

from lsgd_jax.simulate.cluster import LATEST, SECOND, Cluster, StepTimes
from lsgd_jax.simulate.events import SCHEDULES, Event, EventLog, Schedule, Totals, event_log, totals
from lsgd_jax.simulate.throughput import throughput

__all__ = [
    "LATEST",
    "SCHEDULES",
    "SECOND",
    "Cluster",
    "Event",
    "EventLog",
    "Schedule",
    "StepTimes",
    "Totals",
    "event_log",
    "throughput",
    "totals",
]
