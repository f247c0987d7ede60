"""The methods in virtual time: workers at their own speeds, on links that take time, on one machine.

`event_log` tells what happens when, and `throughput` what that comes to for up to 100,000 workers;
`lsgd_jax.simulate.training` trains a small model along an event log: its error against virtual time.
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
