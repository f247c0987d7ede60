"""Leader SGD and the methods it is compared with: one short file each, one row each in `METHODS`.

All have one shape: `build(optimizer, *, axis_name, ...)` makes a gradient transformation around the worker's optimiser,
with `update(grads, state, params, value=loss, step=None)`, and `center(params, state, axis_name)`, called inside
the axis, gives the model that the method reports, the same on all workers.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from lsgd_jax.leader import leader_sgd
from lsgd_jax.methods import diloco, downpour, easgd, independent
from lsgd_jax.methods.base import MethodState, mean_of_workers
from lsgd_jax.methods.data_parallel import data_parallel
from lsgd_jax.methods.grawa import lgrawa, mgrawa
from lsgd_jax.methods.local_sgd import local_sgd

__all__ = ["METHODS", "Method", "MethodState", "mean_of_workers"]


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


METHODS: dict[str, Method] = {
    "lsgd": Method(leader_sgd, mean_of_workers, "period", {"pull": (0.1, 0.3)}),
    "easgd": Method(easgd.easgd, easgd.center, "period", {"center_pull": (None, 0.9)}),
    "downpour": Method(downpour.downpour, downpour.center, "period", {}, adds_up=True),
    "local_sgd": Method(local_sgd, mean_of_workers, "period", {}),
    "data_parallel": Method(data_parallel, mean_of_workers, "step", {}),
    "diloco": Method(diloco.diloco, diloco.center, "period", {"outer_learning_rate": (0.7, 1.0)}),
    "mgrawa": Method(mgrawa, mean_of_workers, "period", {"pull": (0.5, 0.2)}),
    "lgrawa": Method(lgrawa, mean_of_workers, "period", {"pull": (0.5, 0.2)}),
    "independent": Method(independent.independent, independent.center, "never", {}),
}
"""By name; LSGD and its peers. `easgd` with Nesterov momentum in the optimiser is EAMSGD."""
