"""Methods and full-gradient descents shared by the analytic figures."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lsgd_jax.figures.palette import look, looks
from lsgd_jax.leader import leader_pull
from lsgd_jax.methods.easgd import easgd

METHODS = ("EAGD", "LGD", "independent")
COLORS = {"EAGD": look("easgd").color, "LGD": look("lsgd").color, "independent": look("independent").color}
WORKER_COLORS = [color for color, _ in looks(8)]


class Descent(NamedTuple):
    """Trajectories of all workers: worker axis first, then iterations, including the start."""

    x: Float[Array, "workers iterations ..."]
    """Parameters at each iteration; None unless kept."""
    values: Float[Array, "workers iterations"]


def methods(eta: float, pull: float) -> dict[str, optax.GradientTransformation]:
    """Gradient descent with a leader, with elastic averaging (both pulls at x, as in eq. 2), and independent."""
    sgd = optax.sgd(eta)
    return {
        "EAGD": easgd(sgd, axis_name="worker", period=1, pull=pull, pull_at="before_step"),
        "LGD": optax.chain(sgd, leader_pull(pull, axis_name="worker", window=1, pull_at="before_step")),
        "independent": sgd,
    }


@partial(jax.jit, static_argnames=("method", "objective", "iterations", "keep_x"))
def descend(
    method: optax.GradientTransformation,
    objective: Callable[..., Float[Array, ""]],
    starts: Float[Array, "workers ..."],
    iterations: int,
    *arguments: Array,
    keep_x: bool = True,
) -> Descent:
    """Run full-gradient descent on all workers.

    Args:
      method: transformation whose collectives run over the axis "worker".
      objective: function of a worker's parameters and `arguments`.
      starts: initial parameters, worker axis first.
      iterations: number of iterations.
      *arguments: further arguments of the objective.
      keep_x: whether to also keep the parameters at each iteration.
    """
    method = optax.with_extra_args_support(method)

    def worker(start: Array) -> Descent:
        def step(carry: tuple, t: Array) -> tuple[tuple, tuple]:
            x, state = carry
            value, grad = jax.value_and_grad(objective)(x, *arguments)
            updates, state = method.update(grad, state, x, value=value, step=t)
            return (optax.apply_updates(x, updates), state), (x if keep_x else None, value)

        return Descent(*jax.lax.scan(step, (start, method.init(start)), jnp.arange(iterations + 1))[1])

    return jax.vmap(worker, axis_name="worker")(starts)


def path_rows(descents: dict[str, Descent]) -> Iterable[list]:
    """Yield CSV rows: method, worker, iteration, x, y, value."""
    for method, descent in descents.items():
        for worker, (path, values) in enumerate(zip(descent.x, descent.values, strict=True)):
            for iteration, ((x, y), value) in enumerate(zip(path.tolist(), values.tolist(), strict=True)):
                yield [method, worker, iteration, x, y, value]


PATH_COLUMNS = ["method", "worker", "iteration", "x", "y", "value"]
STARTS = ((-6.0, -4.0), (20.0, 11.0), (17.0, 8.0), (-15.0, -18.0))
"""The paper's four starting points in the plane."""
