"""What the analytic figures share: their methods and their descents."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lsgd_jax.leader import leader_pull
from lsgd_jax.methods.easgd import easgd

METHODS = ("EAGD", "LGD", "independent")
COLORS = {"EAGD": "tab:orange", "LGD": "tab:blue", "independent": "tab:gray"}
START_COLOR, END_COLOR = "tab:red", "navy"


class Descent(NamedTuple):
    """The worker axis comes first; then the iterations, the start included."""

    x: Float[Array, "workers iterations ..."]
    """None where the points are not kept."""
    values: Float[Array, "workers iterations"]


def methods(eta: float, pull: float) -> dict[str, optax.GradientTransformation]:
    """Leader and elastic averaging gradient descent, both pulls taken at x as in eq. 2, and workers on their own."""
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
    """Full-gradient descent of all workers.

    Args:
      method: over the axis "worker".
      objective: of a point and the arguments.
      starts: the workers' first points.
      iterations: how many.
      *arguments: of the objective, beside the point.
      keep_x: whether to keep the points, too.
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
    """CSV rows: method, worker, iteration, x, y, value."""
    for method, descent in descents.items():
        for worker, (path, values) in enumerate(zip(descent.x, descent.values, strict=True)):
            for iteration, ((x, y), value) in enumerate(zip(path.tolist(), values.tolist(), strict=True)):
                yield [method, worker, iteration, x, y, value]


PATH_COLUMNS = ["method", "worker", "iteration", "x", "y", "value"]
STARTS = ((-6.0, -4.0), (20.0, 11.0), (17.0, 8.0), (-15.0, -18.0))
"""The paper's four starts in the plane."""
