"""Leader SGD and the methods it is compared with: one short file each, one row each in `METHODS`.

All have one shape: `build(optimizer, *, axis_name, ...)` makes a gradient transformation around the worker's optimizer,
with `update(grads, state, params, value=loss, step=None)`, and `center(params, state, axis_name)`, called inside
the axis, gives the model that the method reports, the same on all workers.
"""

from lsgd_jax.methods import diloco, downpour, easgd, grawa, independent, local_sgd, lsgd, quorum, robust
from lsgd_jax.methods.base import mean_of_workers, own_center
from lsgd_jax.methods.data_parallel import data_parallel
from lsgd_jax.methods.method import Level, Method, election, no_level, once

__all__ = ["METHODS", "Level", "Method", "mean_of_workers"]

METHODS: dict[str, Method] = {
    "lsgd": Method(
        lsgd.leader_sgd,
        mean_of_workers,
        "period",
        {"pull": (0.1, 0.3, 0.6)},
        scalars=election,
        elects=True,
        asynchronous={"joined": lsgd.JOINED, "posted": lsgd.POSTED},
        in_groups=lsgd.GLOBAL,
        levels=lsgd.levels,
        derived=lsgd.derived_global,
        periods=lsgd.periods,
    ),
    "easgd": Method(
        easgd.easgd,
        easgd.center,
        "period",
        {"pull": (None, None, 0.5), "center_pull": (None, 0.9, 0.9)},
        reports="center",
        share=own_center,
        averages_start=once,
        meeting=easgd.meeting,
        asynchronous={"posted": ("pull", "center_pull")},
        derived=easgd.derived_strengths,
    ),
    "downpour": Method(
        downpour.downpour,
        downpour.center,
        "period",
        reports="center",
        share=own_center,
        adds_up=True,
        averages_start=once,
        meeting=downpour.meeting,
        asynchronous={"posted": ()},
    ),
    "local_sgd": Method(local_sgd.local_sgd, mean_of_workers, "period", averages_start=local_sgd.averages_start),
    "data_parallel": Method(data_parallel, mean_of_workers, "step"),
    "diloco": Method(
        diloco.diloco,
        diloco.center,
        "period",
        {"outer_learning_rate": (1.0, 1.0, 1.0), "outer_momentum": (0.3, 0.5, 0.9)},
        reports="center",
        share=own_center,
        averages_start=once,
    ),
    "quorum": Method(
        quorum.quorum,
        quorum.center,
        "period",
        {"outer_momentum": (0.0, 0.3, 0.5)},
        reports="center",
        share=quorum.own_average,
        averages_start=quorum.averages_start,
        scalars=quorum.scores,
        elects=True,
        in_groups=quorum.GLOBAL,
        levels=quorum.levels,
        derived=quorum.derived_global,
        periods=lsgd.periods,
    ),
    "mgrawa": Method(
        grawa.mgrawa,
        mean_of_workers,
        "period",
        {"pull": (0.5, 0.2, 0.8)},
        scalars=grawa.one_norm,
    ),
    "lgrawa": Method(
        grawa.lgrawa,
        mean_of_workers,
        "period",
        {"pull": (0.5, 0.2, 0.8)},
        scalars=grawa.norm_per_array,
    ),
    "coordinate_median": Method(
        robust.coordinate_median,
        mean_of_workers,
        "period",
        {"pull": (1.0, 0.5, 0.25)},
        scalars=robust.one_count,
        gathers=True,
    ),
    "trimmed_mean": Method(
        robust.trimmed_mean,
        mean_of_workers,
        "period",
        {"pull": (1.0, 0.5, 0.25)},
        scalars=robust.one_count,
        gathers=True,
    ),
    "independent": Method(independent.independent, independent.center, "never", reports="leader", levels=no_level),
}
"""LSGD and its peers by name. `easgd` with Nesterov momentum in the worker's optimizer is EAMSGD."""
