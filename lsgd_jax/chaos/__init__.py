"""Chaos engineering: a posted run into which faults are injected, and what they did to it.

`lsgd chaos` launches a run, kills, stops and disconnects its processes by a plan (`faults`, `injector`), sums up from
the run's events what came of it (`summary`), and replays the run to the bit (`lsgd_jax.simulate.replay`).
"""

from lsgd_jax.chaos.faults import Fault, plan, read_plan
from lsgd_jax.chaos.injector import Injector
from lsgd_jax.chaos.run import chaos
from lsgd_jax.chaos.summary import Summary

__all__ = ["Fault", "Injector", "Summary", "chaos", "plan", "read_plan"]
