"""Leader SGD and the methods it is compared with: one short file each, one row each in `METHODS`.

All have one shape: `build(optimizer, *, axis_name, ...)` makes a gradient transformation around the worker's optimiser,
with `update(grads, state, params, value=loss, step=None)`, and `center(params, state, axis_name)`, called inside
the axis, gives the model that the method reports, the same on all workers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from lsgd_jax.methods import diloco, downpour, easgd, independent
from lsgd_jax.methods.base import mean_of_workers
from lsgd_jax.methods.data_parallel import data_parallel
from lsgd_jax.methods.grawa import lgrawa, mgrawa
from lsgd_jax.methods.local_sgd import local_sgd
from lsgd_jax.methods.lsgd import PULL, default_global_period, leader_sgd

__all__ = ["METHODS", "Method", "mean_of_workers"]


class Method(NamedTuple):
    """A row of the table of methods."""

    build: Callable[..., optax.GradientTransformationExtraArgs]
    """From the worker's optimiser, `axis_name` and the method's own options, all by keyword."""
    center: Callable[[optax.Params, Any, Any], optax.Params]
    """From a worker's params, the method's state and `axis_name`: the model that the method reports."""
    exchanges: Literal["period", "step", "never"]
    """When the workers exchange: every period, every step or never."""
    grid: dict[str, tuple]
    """The values of its own option that a tuned comparison tries."""
    adds_up: bool = False
    """Whether n workers go n times as far as one; a tuned comparison then divides its learning rates by n."""
    derived: Callable[[dict[str, Any], int, int], dict[str, Any]] = lambda options, groups, workers: {}
    """The options whose defaults follow from others: from all options, groups and workers in each."""

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, with their defaults: what its builder takes by keyword, but for the axes."""
        return {name: default for name, default in _keywords(self.build).items() if not name.endswith("axis_name")}

    @property
    def has_groups(self) -> bool:
        """Whether the method treats a group's workers differently from all workers."""
        return "group_axis_name" in _keywords(self.build)


@functools.cache
def _keywords(build: Callable) -> dict[str, Any]:
    """What a function takes by keyword alone, with the defaults."""
    parameters = inspect.signature(build).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def _towards_global_leader(options: dict[str, Any], groups: int, workers: int) -> dict[str, Any]:
    if groups == 1:
        return {}
    pull, period = options["global_pull"], options["global_period"]
    return {
        "global_pull": PULL if pull is None else pull,
        "global_period": default_global_period(options["period"]) if period is None else period,
    }


METHODS: dict[str, Method] = {
    "lsgd": Method(leader_sgd, mean_of_workers, "period", {"pull": (0.1, 0.3)}, derived=_towards_global_leader),
    "easgd": Method(easgd.easgd, easgd.center, "period", {"center_pull": (None, 0.9)}, derived=easgd.derived_strengths),
    "downpour": Method(downpour.downpour, downpour.center, "period", {}, adds_up=True),
    "local_sgd": Method(local_sgd, mean_of_workers, "period", {}),
    "data_parallel": Method(data_parallel, mean_of_workers, "step", {}),
    "diloco": Method(diloco.diloco, diloco.center, "period", {"outer_learning_rate": (0.7, 1.0)}),
    "mgrawa": Method(mgrawa, mean_of_workers, "period", {"pull": (0.5, 0.2)}),
    "lgrawa": Method(lgrawa, mean_of_workers, "period", {"pull": (0.5, 0.2)}),
    "independent": Method(independent.independent, independent.center, "never", {}),
}
"""By name; LSGD and its peers. `easgd` with Nesterov momentum in the optimiser is EAMSGD."""
