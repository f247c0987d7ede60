"""What the theory figure measures: one function a claim, with its numbers, its curves and its rows of the table."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from scipy import stats

from lsgd_jax import files
from lsgd_jax.checks import check_path
from lsgd_jax.errors import UsageError
from lsgd_jax.leader import leader_pull
from lsgd_jax.paper import bounds as theory
from lsgd_jax.paper import matrix_completion, nonconvex
from lsgd_jax.paper.descent import METHODS, STARTS, descend, methods
from lsgd_jax.paper.objectives import Quadratic, double_well, quadratic, sinc_rings

COMMAND = "lsgd figure theory"
Z = 1.96
"""Standard errors in half a 95 % interval."""


class Sizes(NamedTuple):
    """How much is measured."""

    starts: int = 2000
    """Newton's method is started from, for stationary points; also the descents into wells."""
    points: int = 8
    """At which levels of a quadratic one step is measured."""
    draws: int = 100
    """Of a step's noise, in an expectation."""
    replicas: int = 32
    """Descents in an expectation, each on a quadratic of its own."""
    steps: int = 3000
    """With decreasing sizes."""
    candidates: int = 100_000
    """Leaders drawn at a point."""
    runs: int = 2000
    """From random starts on the rings."""


class Row(NamedTuple):
    """A row of the table."""

    claim: str
    place: str
    """In the paper."""
    command: str
    measured: str
    verdict: str


class Curve(NamedTuple):
    """What is drawn: y against x, with an interval and a bound where there is one."""

    panel: str
    series: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    bound: np.ndarray | None = None


class Findings(NamedTuple):
    """What has been found about a claim."""

    rows: list[Row]
    curves: list[Curve]
    numbers: dict[str, Any]


def _verdict(holds: bool, *, fails_outside: bool) -> str:
    if not holds:
        return "fails"
    return "holds where promised, fails outside" if fails_outside else "holds"


# Stationary points.


def stationary_points(sizes: Sizes, *, workers: int = 4, dimension: int = 2, lam: float = 0.3) -> Findings:
    """Whose gradients vanish where the objectives of LSGD and of elastic averaging are stationary."""
    f = partial(double_well, tilt=0.3)
    starts = jax.random.uniform(jax.random.key(0), (sizes.starts, workers, dimension), minval=-2.0, maxval=2.0)
    objectives = {
        "LSGD": theory.leader_objective(f, lam),
        "LSGD, derivative through the leader": theory.leader_objective(f, lam, through_leader=True),
        "EASGD": theory.elastic_objective(f, lam),
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
    a = theory.elastic_counterexample(lam)
    pair = _newton(theory.elastic_objective(double_well, lam), jnp.array([[[1.5], [-0.7]]]))[0, :, 0]
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
def _newton(objective: theory.Objective, starts: Float[Array, "starts workers d"]) -> Float[Array, "starts workers d"]:
    """Newton's method for a point at which the gradient is zero; NaN or anything where it does not converge."""
    shape = starts.shape[1:]

    def gradient(x: Array) -> Array:
        return jax.grad(objective)(x.reshape(shape)).ravel()

    def step(_: int, x: Array) -> Array:
        return x - jnp.linalg.solve(jax.jacfwd(gradient)(x), gradient(x))

    return jax.vmap(lambda start: jax.lax.fori_loop(0, 60, step, start.ravel()).reshape(shape))(starts)


def _slopes(
    objective: theory.Objective, f: theory.Objective, starts: Float[Array, "starts workers d"]
) -> Float[np.ndarray, "points workers"]:
    """|grad f| of the workers, best first, at the stationary points with a unique best worker found from the starts."""
    x = _newton(objective, starts)
    residual = jnp.abs(jax.vmap(jax.grad(objective))(x)).max((1, 2))
    values = jax.vmap(jax.vmap(f))(x)
    order = jnp.argsort(values, axis=1)
    best = jnp.sort(values, axis=1)[:, :2]
    slopes = jnp.linalg.norm(jax.vmap(jax.vmap(jax.grad(f)))(x), axis=-1)
    slopes = jnp.take_along_axis(slopes, order, axis=1)
    return np.asarray(slopes[(residual < 1e-9) & (best[:, 1] - best[:, 0] > 1e-6)])


# Bounds on quadratics.


@jax.jit
def noisy_descent(
    problem: Quadratic,
    starts: Float[Array, "workers d"],
    key: PRNGKeyArray,
    etas: Float[Array, " steps"],
    lams: Float[Array, " steps"],
    loss_noise: Float[Array, ""],
) -> Float[Array, "steps workers"]:
    """LSGD's values after each step: pulls eta lambda at x, the leader elected anew on noisy losses every time."""

    def worker(start: Array) -> Array:
        def step(carry: tuple, t: tuple) -> tuple[tuple, Array]:
            x, state = carry
            k, eta, lam = t
            own = jax.random.fold_in(jax.random.fold_in(key, k), jax.lax.axis_index("worker"))
            of_gradient, of_loss = jax.random.split(own)
            loss = problem.value(x) + loss_noise * jax.random.normal(of_loss, (), x.dtype)
            method = _method(eta, eta * lam)
            updates, state = method.update(problem.gradient(x, of_gradient), state, x, value=loss)
            x = optax.apply_updates(x, updates)
            return (x, state), problem.value(x)

        state = _method(etas[0], lams[0]).init(start)
        return jax.lax.scan(step, (start, state), (jnp.arange(len(etas)), etas, lams))[1]

    return jax.vmap(worker, axis_name="worker", out_axes=1)(starts)


def _method(eta: Array, pull: Array) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(eta), leader_pull(pull, axis_name="worker", window=1, pull_at="before_step"))


ETA_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.5)
"""Step sizes, as multiples of the largest that is promised anything, 1/(2M)."""
PULL_FACTORS = (0.0, 0.5, 1.0, 4.0, 16.0, 64.0)
"""Pulls eta lambda, as multiples of the largest, 1/(2 kappa)."""


def one_step(
    sizes: Sizes, *, conditions: tuple[float, ...] = (2.0, 10.0, 100.0), workers: tuple[int, ...] = (1, 4, 16)
) -> Findings:
    """The mean after one step, against the bound."""
    worst, undecided, tightest, promised_count = 0, 0, 0.0, 0
    failed, counted = np.zeros((2, len(ETA_FACTORS), len(PULL_FACTORS)))
    for i, kappa in enumerate(conditions):
        problem = quadratic(jax.random.key(i), 10, smoothness=kappa, noise=1.0)
        constants = {"strong_convexity": 1.0, "smoothness": kappa}
        eta = np.array(ETA_FACTORS)[:, None] / (2 * kappa)
        lam = np.array(PULL_FACTORS)[None] / (2 * kappa) / eta
        for p in workers:
            starts = _starts(problem, jax.random.key(p), np.geomspace(1e-3, 1e2, sizes.points), p)
            gap = np.asarray(jax.vmap(jax.vmap(problem.value))(starts))
            mean, half = _means_after_one_step(problem, starts, eta, lam, sizes.draws)
            bound = theory.one_step_bound(
                gap, gap.min(1, keepdims=True), eta[..., None, None], lam[..., None, None], noise=1.0, **constants
            )
            promised = theory.bound_applies(np.broadcast_to(eta, lam.shape), lam, **constants)
            failed += (mean - half > bound).sum((2, 3))
            counted += gap.size
            worst += int((mean - half > bound)[promised].sum())
            undecided += int((abs(mean - bound) <= half)[promised].sum())
            promised_count += bound[promised].size
            tightest = max(tightest, float((mean / bound)[promised].max()))
    share = failed / counted
    outside = (np.array(ETA_FACTORS)[:, None] > 1) | (np.array(PULL_FACTORS) > 1)
    numbers = {
        "promised cases": promised_count,
        "shown to exceed the bound where promised": worst,
        "undecided where promised": undecided,
        "largest mean / bound where promised": tightest,
        "share that exceeds the bound, by eta 2M and eta lambda 2 kappa": {
            f"{e:g}, {p:g}": float(share[i, j]) for i, e in enumerate(ETA_FACTORS) for j, p in enumerate(PULL_FACTORS)
        },
    }
    row = Row(
        "one step: E f(x+) - f* <= (1 - m eta)(f(x) - f*) - eta lambda (f(x) - f(z)) + eta^2 M sigma^2 / 2",
        "convergence",
        COMMAND,
        f"eta <= 1/(2M), eta lambda <= 1/(2 kappa): {worst} of {promised_count} means exceed it, at most"
        f" {tightest:.2f} of the bound; outside up to {share[outside].max():.0%} do, first at eta ="
        f" {_first_failure(share[:, PULL_FACTORS.index(1.0)], ETA_FACTORS)}/(2M) or eta lambda ="
        f" {_first_failure(share[ETA_FACTORS.index(1.0)], PULL_FACTORS)}/(2 kappa)",
        _verdict(worst == 0, fails_outside=share[outside].max() > 0),
    )
    curves = [Curve("one step", f"eta 2M = {e:g}", np.array(PULL_FACTORS), share[i]) for i, e in enumerate(ETA_FACTORS)]
    return Findings([row], curves, numbers)


def _first_failure(share: np.ndarray, factors: tuple[float, ...]) -> str:
    failing = [factor for factor, part in zip(factors, share, strict=True) if part > 0]
    return f"{failing[0]:g}" if failing else "none"


def _starts(
    problem: Quadratic, key: PRNGKeyArray, levels: np.ndarray, workers: int
) -> Float[Array, "levels workers d"]:
    """Workers at random below each level of a quadratic."""

    def below(key: PRNGKeyArray, level: Array) -> Array:
        towards = jnp.ones_like(problem.minimiser)
        length = jnp.sqrt(level / problem.value(problem.minimiser + towards))
        return theory.sample_candidates(key, problem, problem.minimiser + length * towards, workers)

    return jax.vmap(below)(jax.random.split(key, len(levels)), jnp.asarray(levels))


@partial(jax.jit, static_argnames="draws")
def _after_one_step(
    problem: Quadratic, starts: Float[Array, "points workers d"], eta: Array, lam: Array, draws: int
) -> tuple[Array, Array]:
    keys = jax.random.split(jax.random.key(2), draws)
    zero = jnp.zeros(())

    def of_point(start: Array) -> tuple[Array, Array]:
        values = jax.vmap(lambda key: noisy_descent(problem, start, key, eta[None], lam[None], zero)[0])(keys)
        return values.mean(0), Z * values.std(0, ddof=1) / math.sqrt(draws)

    return jax.vmap(of_point)(starts)


def _means_after_one_step(
    problem: Quadratic, starts: Array, eta: np.ndarray, lam: np.ndarray, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means and half intervals, by eta, lambda, point and worker."""
    grid = zip(np.broadcast_to(eta, lam.shape).flat, lam.flat, strict=True)
    of = [_after_one_step(problem, starts, jnp.asarray(e), jnp.asarray(p), draws) for e, p in grid]
    mean, half = (np.stack(each).reshape(*lam.shape, *starts.shape[:2]) for each in zip(*of, strict=True))
    return mean, half


CONSTANTS: dict[str, Any] = {"strong_convexity": 1.0, "smoothness": 10.0}
NOISE, DIMENSION = 1.0, 10


def _replicas(
    replicas: int, workers: int, etas: np.ndarray, lams: np.ndarray, loss_noise: float
) -> tuple[Float[np.ndarray, "steps replicas"], float]:
    """The workers' mean values after each step of descents on random quadratics, and the mean of those before."""
    keys = jax.random.split(jax.random.key(0), (3, replicas))
    problems = jax.vmap(lambda key: quadratic(key, DIMENSION, noise=NOISE, **CONSTANTS))(keys[0])
    starts = problems.minimiser[:, None] + jax.random.normal(keys[1, 0], (replicas, workers, DIMENSION))
    gap = float(jax.vmap(lambda problem, x: jax.vmap(problem.value)(x))(problems, starts).mean())
    values = _descents(problems, starts, keys[2], jnp.asarray(etas), jnp.asarray(lams), jnp.asarray(loss_noise))
    return np.asarray(values.mean(2).T), gap


_descents = jax.jit(jax.vmap(noisy_descent, (0, 0, 0, None, None, None)))


def decreasing_steps(sizes: Sizes, *, workers: int = 4, lam: float = 1.0, loss_noise: float = 1.0) -> Findings:
    """The rate with steps of sizes Theta(1/k)."""
    k = np.arange(sizes.steps)
    eta = theory.decreasing_step(k, **CONSTANTS)
    decreasing_lam = 2 * CONSTANTS["smoothness"] * lam * eta
    slow = theory.decreasing_step(k, **CONSTANTS, scale=0.2)
    cases: dict[str, tuple[np.ndarray, np.ndarray, float, dict[str, Any] | None]] = {
        "LSGD": (eta, np.full_like(eta, lam), 0.0, {"lam": lam}),
        "LSGD, noisy losses, lambda_k = Theta(1/k)": (
            eta,
            decreasing_lam,
            loss_noise,
            {"lam": lam, "workers": workers, "loss_noise": loss_noise},
        ),
        "independent": (eta, np.zeros_like(eta), 0.0, {}),
        "LSGD, steps too small": (slow, np.full_like(eta, lam), 0.0, None),
    }
    curves, numbers = [], {}
    for name, (etas, lams, noise, options) in cases.items():
        values, gap = _replicas(sizes.replicas, workers, etas, lams, noise)
        mean, half = values.mean(1), Z * values.std(1, ddof=1) / math.sqrt(sizes.replicas)
        slope = _slope(values, 1 / etas)  # k, but for a factor and the delay in the steps' sizes.
        bound = None
        if options is not None:
            bound = theory.decreasing_steps_bound(k + 1, gap, noise=NOISE, **CONSTANTS, **options)
        thin = np.unique(np.geomspace(1, sizes.steps, 60).astype(int)) - 1
        of_bound = None if bound is None else bound[thin]
        curves.append(Curve("rate", name, thin + 1, mean[thin], (mean - half)[thin], (mean + half)[thin], of_bound))
        numbers[name] = {"slope": slope, "gap of the start": gap}
        if bound is not None:
            numbers[name]["largest mean / bound"] = float((mean / bound).max())
            numbers[name]["shown to exceed the bound"] = int((mean - half > bound).sum())
    rows = [
        _rate_row("decreasing steps, eta_k = Theta(1/k): E f(x_k) - f* = O(1/k)", "LSGD", numbers),
        _rate_row("a leader elected on noisy losses, eta_k and lambda_k = Theta(1/k): O(1/k)", list(cases)[1], numbers),
    ]
    return Findings(rows, curves, numbers)


def _rate_row(claim: str, name: str, numbers: dict[str, Any]) -> Row:
    low, middle, high = numbers[name]["slope"]
    control, slow = numbers["independent"]["slope"][1], numbers["LSGD, steps too small"]["slope"][1]
    holds = low <= -1 and not numbers[name]["shown to exceed the bound"]
    return Row(
        claim,
        "convergence" if name == "LSGD" else "stochastic leader",
        COMMAND,
        f"log-log slope {middle:.3f} [{low:.3f}, {high:.3f}], never more than"
        f" {numbers[name]['largest mean / bound']:.2f} of the bound; independent workers {control:.3f}; steps ten times"
        f" smaller, for which nothing is promised, {slow:.2f}",
        _verdict(holds, fails_outside=slow > -0.9),
    )


def _slope(values: Float[np.ndarray, "steps replicas"], k: Float[np.ndarray, " steps"]) -> list[float]:
    """The log-log slope of the mean over the last decade of k, with its bootstrapped 95 % interval."""
    replicas = values.shape[1]
    # Means over stretches that are equally long on the logarithmic scale.
    edges = np.unique(np.searchsorted(k, np.geomspace(k[-1] / 10, k[-1], 21)))
    stretches = [slice(*pair) for pair in itertools.pairwise(edges)]
    binned = np.stack([values[stretch].mean(0) for stretch in stretches])
    at = np.log([k[stretch].mean() for stretch in stretches])
    resampled = np.random.default_rng(0).integers(replicas, size=(1000, replicas))
    low, high = np.quantile(np.polyfit(at, np.log(binned[:, resampled].mean(-1)), 1)[0], (0.025, 0.975))
    return [float(low), float(np.polyfit(at, np.log(binned.mean(1)), 1)[0]), float(high)]


LOSS_NOISES = (0.0, 0.01, 0.1, 1.0, 10.0)


def stochastic_leader(sizes: Sizes, *, workers: tuple[int, ...] = (4, 16), lam: float = 1.0) -> Findings:
    """The limit with steps of one size and a leader elected on noisy losses."""
    eta, steps = 1 / (2 * CONSTANTS["smoothness"]), 300
    curves: list[Curve] = []
    numbers: dict[str, Any] = {"eta": eta, "lambda": lam}

    def limit(p: int, lam: float, noise: float) -> tuple[float, float]:
        values = _replicas(sizes.replicas, p, np.full(steps, eta), np.full(steps, lam), noise)[0]
        of_replica = values[steps // 3 :].mean(0)
        return of_replica.mean(), Z * of_replica.std(ddof=1) / math.sqrt(sizes.replicas)

    exceeded, largest, raised = 0, 0.0, 0.0
    for p in workers:
        mean, half = np.array([limit(p, lam, noise) for noise in LOSS_NOISES]).T
        bound = np.array(
            [
                theory.limit_bound(eta, lam, noise=NOISE, workers=p, loss_noise=noise, **CONSTANTS)
                for noise in LOSS_NOISES
            ]
        )
        curves.append(Curve("limit", f"{p} workers", np.array(LOSS_NOISES), mean, mean - half, mean + half, bound))
        exceeded += int((mean - half > bound).sum())
        largest = max(largest, float((mean / bound).max()))
        rise = (mean - mean[0])[1:] / (bound - bound[0])[1:]
        raised = max(raised, float(rise.max()))
        numbers[f"{p} workers"] = {"sigma_f": LOSS_NOISES, "limit": mean.tolist(), "bound": bound.tolist()}
    alone, _ = limit(workers[0], 0.0, 0.0)
    numbers["independent"] = float(alone)
    exact, noisiest = (numbers[f"{workers[-1]} workers"]["limit"][i] for i in (0, -1))
    row = Row(
        "a leader elected on noisy losses: limsup E f(x_k) - f* <= eta kappa sigma^2 / 2 + 4/m lambda sqrt(p) sigma_f",
        "stochastic leader",
        COMMAND,
        f"{exceeded} of {len(workers) * len(LOSS_NOISES)} limits exceed it, at most {largest:.2f} of the bound;"
        f" the noise raises the limit by at most {raised:.0%} of what it may; {workers[-1]} workers: {exact:.3f}"
        f" without, {noisiest:.3f} with sigma_f = {LOSS_NOISES[-1]:g}, {alone:.3f} for independent workers",
        "holds" if exceeded == 0 else "fails",
    )
    return Findings([row], curves, numbers)


# Directions.

LAMBDAS = np.geomspace(1e-4, 1e4, 9)


def step_directions(
    sizes: Sizes,
    *,
    dimensions: tuple[int, ...] = (2, 5, 20),
    conditions: tuple[float, ...] = (10.0, 1000.0),
    points: int = 4,
) -> Findings:
    """The share of candidate leaders that turn a step towards Newton's, at random points and at the largest angle."""
    curves, of_points = [], []
    for d in dimensions:
        for kappa in conditions:
            problem = quadratic(jax.random.key(d), d, smoothness=kappa)
            at_random = _starts(problem, jax.random.key(0), np.ones(1), points)[0]
            for i, x in enumerate([*at_random, _largest_angle(problem)]):
                promised, angle = theory.promised_pull(problem, x)
                lams = np.sort(np.append(LAMBDAS, min(promised, 10 * LAMBDAS[-1])))
                good = np.asarray(_improving(problem, x, jax.random.key(i), jnp.asarray(lams), sizes.candidates))
                low, high = _binomial_interval(good, sizes.candidates)
                name = f"dimension {d}, kappa {kappa:g}, angle {angle:.1f}"
                curves.append(Curve("direction", name, lams, good / sizes.candidates, low, high))
                of_points.append((promised, angle, lams <= promised, low >= 0.5, high < 0.5))

    def count(kind: str) -> dict[str, int]:
        chosen = [
            (in_promise if kind != "outside" else ~in_promise, half, less)
            for promised, _, in_promise, half, less in of_points
            if kind == "outside" or np.isinf(promised) == (kind == "large angle")
        ]
        return {
            "cases": sum(int(where.sum()) for where, _, _ in chosen),
            "shown to be at least half": sum(int((where & half).sum()) for where, half, _ in chosen),
            "shown to be less than half": sum(int((where & less).sum()) for where, _, less in chosen),
        }

    numbers: dict[str, Any] = {kind: count(kind) for kind in ("small lambda", "large angle", "outside")}
    numbers["candidates"] = sizes.candidates
    numbers["points"] = [
        {"angle": angle, "lambda": promised if np.isfinite(promised) else None} for promised, angle, *_ in of_points
    ]
    less = numbers["outside"]["shown to be less than half"]
    angles = [angle for promised, angle, *_ in of_points if np.isinf(promised)]
    rows = [
        Row(
            f"{kind}: at least half of the candidate leaders turn the step towards Newton's",
            "step direction",
            COMMAND,
            f"of {numbers[kind]['cases']} shares {numbers[kind]['shown to be at least half']} are shown to be at least"
            f" half, {numbers[kind]['shown to be less than half']} to be less; {where}",
            _verdict(numbers[kind]["shown to be less than half"] == 0, fails_outside=fails_outside),
        )
        for kind, where, fails_outside in (
            ("small lambda", f"beyond it {less} of {numbers['outside']['cases']} to be less", less > 0),
            ("large angle", f"{len(angles)} points with angles from {min(angles):.0f} degrees, any lambda", False),
        )
    ]
    return Findings(rows, curves, numbers)


@partial(jax.jit, static_argnames="count")
def _improving(
    problem: Quadratic, x: Float[Array, " d"], key: PRNGKeyArray, lams: Float[Array, " lams"], count: int
) -> Float[Array, " lams"]:
    """How many of the candidates improve the direction, for each lambda."""
    leaders = theory.sample_candidates(key, problem, x, count)
    return jax.lax.map(lambda lam: theory.improves_direction(problem, x, leaders, lam).sum(), lams)


def _largest_angle(problem: Quadratic) -> Float[Array, " d"]:
    """A point where the angle is as large as it gets (Kantorovich): even in f between the outermost axes."""
    values, axes = jnp.linalg.eigh(problem.hessian)
    return problem.minimiser + axes[:, 0] / jnp.sqrt(values[0]) + axes[:, -1] / jnp.sqrt(values[-1])


def _binomial_interval(good: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clopper and Pearson's 95 % interval."""
    low, high = stats.beta.ppf(0.025, good, count - good + 1), stats.beta.ppf(0.975, good + 1, count - good)
    return np.where(good == 0, 0, low), np.where(good == count, 1, high)


# Wells and symmetries.


def wells(sizes: Sizes, *, workers: int = 4, lam: float = 1.0, eta: float = 0.01, iterations: int = 400) -> Findings:
    """How soon workers reach the bottom where they start in different wells, and where in one."""
    level = 1e-3
    starts = jax.random.uniform(jax.random.key(0), (sizes.starts, workers, 2), minval=-2.0, maxval=2.0)
    curves, numbers = [], {}
    for name, method in methods(eta, eta * lam).items():
        for where, of in (("different wells", starts), ("one well", jnp.abs(starts))):
            values = jax.vmap(lambda s: descend(method, double_well, s, iterations, keep_x=False).values)(of)
            numbers[f"{name}, {where}"] = {
                who: {"iterations": _iterations(reached), "share": float(reached[:, -1].mean())}
                for who, reached in (
                    ("best", np.asarray((values <= level).any(1))),
                    ("all", np.asarray((values <= level).all(1))),
                )
            }
            median = np.asarray(jnp.median(values.min(1), axis=0))
            curves.append(Curve("wells", f"{name}, {where}", np.arange(iterations + 1), median))

    def told(who: str, where: str) -> str:
        return ", ".join(f"{name} {numbers[f'{name}, {where}'][who]['iterations'] or 'never'}" for name in METHODS)

    apart = {name: numbers[f"{name}, different wells"] for name in METHODS}
    slower = (apart["EAGD"]["best"]["share"], -(apart["EAGD"]["best"]["iterations"] or math.inf)) < (
        apart["LGD"]["best"]["share"],
        -(apart["LGD"]["best"]["iterations"] or math.inf),
    )
    row = Row(
        "averaging workers that descend to different minima slows them; the leader is not slowed",
        "abstract (ii)",
        COMMAND,
        f"median iterations to f <= {level:g} in four wells, best worker: {told('best', 'different wells')}; all"
        f" workers: {told('all', 'different wells')}; started in one well, best worker: {told('best', 'one well')}",
        "holds for the leader, not for its followers; tie with independent workers" if slower else "fails",
    )
    return Findings([row], curves, numbers)


def _iterations(reached: np.ndarray) -> int | None:
    """The median of the first iterations at which it was reached; None if half of the runs never reach it."""
    median = np.median(np.where(reached.any(1), reached.argmax(1), np.inf))
    return int(median) if np.isfinite(median) else None


def symmetry(sizes: Sizes, *, dimension: int = 100) -> Findings:
    """The curse of symmetry on the functions of the paper's figures, the second at a tenth of its dimension."""
    final = {
        name: np.asarray(descend(method, sinc_rings, jnp.array(STARTS), nonconvex.ITERATIONS).values[:, -1])
        for name, method in methods(nonconvex.ETA, nonconvex.PULL).items()
    }
    reached = nonconvex.random_starts(20, sizes.runs)
    # A target's scale grows with the dimension, and with it the largest step.
    eta = matrix_completion.ETA * matrix_completion.DIMENSION / dimension
    completed = matrix_completion.solve(dimension, eta, ranks=(1, 10))
    best = {f"rank {r}": {name: float(v[:, -1].min()) for name, v in of.items()} for r, of in completed.items()}
    numbers = {
        "rings: final values": {name: values.tolist() for name, values in final.items()},
        "rings: share of workers in the global minimum": reached,
        "matrix completion: best final value": best,
    }
    rows = [
        Row(
            "rings around the global minimum: elastic averaging stalls between workers, the leader does not",
            "curse of symmetry, Figure 2",
            COMMAND,
            f"worst worker from the paper's starts: EAGD {final['EAGD'].max():.4f}, LGD {final['LGD'].max():.4f};"
            f" workers in the global minimum from {sizes.runs} random starts: "
            + ", ".join(f"{name} {reached[name]:.1%}" for name in METHODS),
            "holds"
            if final["LGD"].max() < -0.21 < final["EAGD"].min() and reached["LGD"] > reached["EAGD"]
            else "fails",
        ),
        Row(
            "matrix completion: elastic averaging stalls on plateaus, the leader descends linearly",
            "curse of symmetry, Figure 3",
            COMMAND + "; at full size lsgd figure matrix-completion",
            f"best worker after {matrix_completion.ITERATIONS} iterations, dimension {dimension}: "
            + "; ".join(f"{rank}: " + ", ".join(f"{n} {of[n]:.0e}" for n in METHODS) for rank, of in best.items()),
            "holds against EAGD; tie with independent workers"
            if all(of["LGD"] < of["EAGD"] / 100 for of in best.values())
            else "fails",
        ),
    ]
    curves = [
        Curve("matrix completion", f"{name}, rank {rank}", np.arange(matrix_completion.ITERATIONS + 1), v.min(0))
        for rank, of in completed.items()
        for name, v in of.items()
    ]
    return Findings(rows, curves, numbers)


# Networks.

RIVALS = {"easgd": "EASGD", "downpour": "DOWNPOUR", "data_parallel": "data-parallel SGD"}


def comparisons(runs: Path | str) -> Findings:
    """Test error and communication in comparisons that `lsgd compare` has left in folders under `runs`.

    Raises:
      UsageError: if a file there is not what a comparison has written.
    """
    rows, numbers = [], {}
    for path in sorted(check_path("runs", runs).glob("*/comparison.json")):
        try:
            summary = files.parse_json(files.read_text(path))
            of, name = summary["methods"], path.parent.name
            if "lsgd" not in of:
                continue
            command = summary["environment"]["command"]
            rivals = [rival for rival in RIVALS if rival in of]
            finals = {method: np.ravel(of[method]["final_error"]["values"]) for method in ("lsgd", *rivals)}
            differences = {rival: 100 * (finals[rival] - finals["lsgd"]) for rival in rivals}
            rows += [_error_row(name, rival, command, differences[rival]) for rival in rivals]
            rows += [_bytes_row(name, rival, command, of, summary["target_error"]) for rival in rivals]
        except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is not what a comparison has written ({error}): name another runs folder."
            ) from None
        numbers[name] = {rival: difference.tolist() for rival, difference in differences.items()}
    return Findings(rows, [], {"test error less LSGD's (%), seed by seed": numbers} if numbers else {})


def _error_row(name: str, rival: str, command: str, difference: np.ndarray) -> Row:
    count = len(difference)
    mean, half = difference.mean(), math.inf
    if count > 1:
        half = stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / math.sqrt(count)
    verdict = "tie"
    if mean - half > 0 or (count >= 5 and (difference > 0).all()):
        verdict = "holds"
    elif mean + half < 0 or (count >= 5 and (difference < 0).all()):
        verdict = "fails"
    return Row(
        f"lower test error than {RIVALS[rival]} ({name})",
        "experiments",
        command,
        f"{RIVALS[rival]}'s less LSGD's, seed by seed: {mean:.2f} % ± {half:.2f}, higher in {(difference > 0).sum()} of"
        f" {count} seeds, after equal steps",
        verdict,
    )


def _bytes_row(name: str, rival: str, command: str, of: dict[str, Any], target: float) -> Row:
    own, other = of["lsgd"]["megabytes_to_target"], of[rival]["megabytes_to_target"]
    told = ["never" if number is None else f"{number:.1f} MB" for number in (own, other)]
    if own is None:
        verdict = "tie" if other is None else "fails"
    elif other is None or other > 1.1 * own:
        verdict = "holds"
    else:
        verdict = "tie" if other > own / 1.1 else "fails"
    return Row(
        f"less communication than {RIVALS[rival]} ({name})",
        "experiments",
        command,
        f"sent by a worker to {target:.0%} test error: LSGD {told[0]}, {RIVALS[rival]} {told[1]}",
        verdict,
    )
