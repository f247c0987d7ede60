"""Stationary points: those of LSGD are stationary for its best worker; those of elastic averaging for no worker."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsgd_jax.paper import bounds
from lsgd_jax.paper.claims.base import COMMAND, Curve, Findings, Row, Sizes
from lsgd_jax.paper.descent import descend, methods
from lsgd_jax.paper.objectives import double_well


def measure(sizes: Sizes, *, workers: int = 4, dimension: int = 2, lam: float = 0.3) -> Findings:
    """Find which workers' gradients vanish at stationary points of LSGD's and elastic averaging's objectives."""
    f = partial(double_well, tilt=0.3)
    starts = jax.random.uniform(jax.random.key(0), (sizes.starts, workers, dimension), minval=-2.0, maxval=2.0)
    objectives = {
        "LSGD": bounds.leader_objective(f, lam),
        "LSGD, derivative through the leader": bounds.leader_objective(f, lam, through_leader=True),
        "EASGD": bounds.elastic_objective(f, lam),
    }
    slopes = {name: _slopes(objective, f, starts) for name, objective in objectives.items()}
    numbers = {
        name: {
            "stationary points": len(slope),
            "best worker's largest gradient": float(slope[:, 0].max()),
            "share where a follower has a gradient": float((slope[:, 1:].max(1) > 1e-6).mean()),
            "share where all workers have": float((slope.min(1) > 1e-6).mean()),
        }
        for name, slope in slopes.items()
    }
    a = bounds.elastic_counterexample(lam)
    pair = _newton(bounds.elastic_objective(double_well, lam), jnp.array([[[1.5], [-0.7]]]))[0, :, 0]
    descended = descend(methods(0.02, 0.02 * lam)["EAGD"], double_well, jnp.array([[1.5], [-0.7]]), 2000).x[:, -1, 0]
    rest = {
        "lambda": lam,
        "a": a,
        "found by Newton's method": pair.tolist(),
        "where EAGD ends": descended.tolist(),
        "gradients": jax.vmap(jax.grad(double_well))(pair[:, None])[:, 0].tolist(),
    }
    leader, through, elastic = (numbers[name] for name in objectives)
    steepest = leader["best worker's largest gradient"]
    rows = [
        Row(
            "where the objective is stationary and the best worker unique, that worker's gradient is zero",
            "stationary points",
            COMMAND,
            f"{leader['stationary points']} points: the best worker's is at most"
            f" {steepest:.0e}, a follower's is not zero at"
            f" {leader['share where a follower has a gradient']:.0%}; with derivatives through the leader nobody's is"
            f" zero at {through['share where all workers have']:.0%} of {through['stationary points']}",
            "holds with the leader held fixed as in eq. 2, fails for the derivative through it"
            if steepest < 1e-8
            else "fails",
        ),
        Row(
            "elastic averaging has stationary points at which no worker's gradient is zero",
            "stationary points",
            COMMAND,
            f"{elastic['share where all workers have']:.0%} of {elastic['stationary points']} points; for (x^2 - 1)^2"
            f" two workers rest at {pair[0]:.4f} and {pair[1]:.4f} (closed form ±{a:.4f}), where f' = ±{lam * a:.4f}",
            "holds" if elastic["share where all workers have"] > 0 else "fails",
        ),
    ]
    side = np.linspace(-1.6, 1.6, 200)
    curves = [
        Curve("rest", "f", side, (side**2 - 1) ** 2),
        Curve("rest", "EASGD's workers", np.asarray(pair), (np.asarray(pair) ** 2 - 1) ** 2),
    ]
    return Findings(rows, curves, {**numbers, "counter-example": rest})


@partial(jax.jit, static_argnames="objective")
def _newton(objective: bounds.Objective, starts: Float[Array, "starts workers d"]) -> Float[Array, "starts workers d"]:
    """Find a zero of the gradient by Newton's method; the result is arbitrary or NaN where it does not converge."""
    shape = starts.shape[1:]

    def gradient(x: Array) -> Array:
        return jax.grad(objective)(x.reshape(shape)).ravel()

    def step(_: int, x: Array) -> Array:
        return x - jnp.linalg.solve(jax.jacfwd(gradient)(x), gradient(x))

    return jax.vmap(lambda start: jax.lax.fori_loop(0, 60, step, start.ravel()).reshape(shape))(starts)


def _slopes(
    objective: bounds.Objective, f: bounds.Objective, starts: Float[Array, "starts workers d"]
) -> Float[np.ndarray, "points workers"]:
    """Gradient norms of f per worker, best worker first, at the stationary points with a unique best worker."""
    x = _newton(objective, starts)
    residual = jnp.abs(jax.vmap(jax.grad(objective))(x)).max((1, 2))
    values = jax.vmap(jax.vmap(f))(x)
    order = jnp.argsort(values, axis=1)
    best = jnp.sort(values, axis=1)[:, :2]
    slopes = jnp.linalg.norm(jax.vmap(jax.vmap(jax.grad(f)))(x), axis=-1)
    slopes = jnp.take_along_axis(slopes, order, axis=1)
    return np.asarray(slopes[(residual < 1e-9) & (best[:, 1] - best[:, 0] > 1e-6)])
