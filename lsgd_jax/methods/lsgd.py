"""Leader SGD as a row of the table of methods; the algorithm is in `lsgd_jax.leader`."""

from collections.abc import Mapping
from typing import Any

from lsgd_jax.leader import PULL, default_global_period
from lsgd_jax.methods.method import Level

GLOBAL = ("global_pull", "global_period", "global_stale_pull")
"""Options of exchanges among groups."""
POSTED = ("pull", "global_pull", "global_period", "window")
"""Options of workers at their own speed who take their leader from a board."""
JOINED = (*POSTED, "broadcast", "wire", "delay")
"""Options of workers at their own speed who meet to elect a leader, which is broadcast."""


def derived_global(options: Mapping[str, Any], groups: int, workers: int) -> dict[str, Any]:
    """The options of exchanges among groups, which by default are the paper's."""
    if groups == 1:
        return {}
    pull, period = options["global_pull"], options["global_period"]
    return {
        "global_pull": PULL if pull is None else pull,
        "global_period": default_global_period(options["period"]) if period is None else period,
    }


def levels(options: Mapping[str, Any], groups: int, workers: int) -> list[Level]:
    """Exchanges in each group and, if there are several, among all workers."""
    in_group = Level(workers, options["period"], options["pull"])
    if groups == 1:
        return [in_group]
    return [in_group, Level(groups * workers, options["global_period"], options["global_pull"])]


def periods(every: int, groups: int) -> dict[str, int]:
    """The periods with which all workers exchange every so many steps, and those of a group four times as often."""
    if groups == 1:
        return {"period": every}
    return {"period": max(every // default_global_period(1), 1), "global_period": every}


def scalars(arrays: int) -> int:
    """Those of an election: the lowest score, and the position of the worker that has it."""
    return 2
