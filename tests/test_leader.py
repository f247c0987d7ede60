"""`leader_pull` against the NumPy oracle, hand-computed steps and limiting cases, under every mapping."""

import itertools
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lsgd_jax import NOBODY, leader_pull, leader_sgd, lsgd
from lsgd_jax.exchange import int8, sending
from lsgd_jax.exchange.axes import as_own
from lsgd_jax.link import AT_ONCE
from lsgd_jax.variants import DELAYED, links, stale
from tests import oracle
from tests.mapping import GROUPS, MAPPINGS, WORKERS, mapped, need_devices, over_workers, quickest
from tests.reliability import faults

CURVATURE = np.array([1.0, 0.3, 2.0])
ETA = 0.1
GROUPED = {"axis_name": "worker", "group_axis_name": "group"}


def levels(pull, *, period=1, optimizer=None, **options):
    """SGD and the pulls of one level or, with a group axis, of two; without a global pull if none is given."""
    if "group_axis_name" in options:
        options = {"global_pull": 0.0, "global_period": period} | options
    return leader_sgd(optimizer or optax.sgd(ETA), pull=pull, period=period, **options)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def running(tx, *, noise_alone=False, pass_step=False, mapping=None, shape=(GROUPS, WORKERS)):
    """The program that minimises a noisy quadratic.

    It takes the starts [groups, workers, dimensions] and noises [groups, workers, steps, ...], and returns the points,
    scores and leaders after each step, the worker axes first. With `noise_alone` the loss that is told to the leader
    election is the noise.
    """
    axes = ("group", "worker")

    def train(x, loss_noise, gradient_noise):
        def step(carry, noise):
            x, state, t = carry
            loss = noise[0] if noise_alone else 0.5 * jnp.sum(CURVATURE * x**2) + noise[0]
            updates, state = tx.update(
                CURVATURE * x + noise[1], state, x, value=loss, **({"step": t} if pass_step else {})
            )
            x = optax.apply_updates(x, updates)
            pulls = links(state)
            return (x, state, t + 1), (x, pulls[-1].score, tuple(pull.leader.position for pull in pulls))

        state = tx.init(x)
        return jax.lax.scan(step, (x, as_own(state, state, axes), 0), (loss_noise, gradient_noise))[1]

    program = over_workers(train, mapping or quickest(shape), shape)
    return lambda *problem: jax.tree.map(np.asarray, program(*problem))


def run(tx, *problem, **options):
    """What the program of `running` returns."""
    return running(tx, shape=problem[0].shape[:2], **options)(*problem)


def noises(rng, groups, workers, steps):
    return rng.normal(size=(groups, workers, steps)), rng.normal(size=(groups, workers, steps, 3))


def oracle_problem(loss_noise, gradient_noise, noise_alone=False):
    def gradient(x, t, worker):
        return CURVATURE * x + gradient_noise[(*worker, t)]

    def loss(x, t, worker):
        noise = loss_noise[(*worker, t)]
        return noise if noise_alone else 0.5 * np.sum(CURVATURE * x**2) + noise

    return gradient, loss


def assert_same_run(got, expected, period, global_period=None):
    """Leaders first, so that a near-tie shows as what it is; then the points."""
    x, scores, leaders = got
    groups, workers, steps = x.shape[:3]

    def position(leader):
        return NOBODY if leader is None else leader

    for exchange, of_groups in enumerate(expected.local_leaders):
        at = (exchange + 1) * period - 1
        np.testing.assert_array_equal(leaders[0][:, :, at], [[position(leader)] * workers for leader in of_groups])
    for exchange, leader in enumerate(expected.global_leaders):
        at = (exchange + 1) * global_period - 1
        np.testing.assert_array_equal(leaders[1][:, :, at], np.full((groups, workers), position(leader)))
    np.testing.assert_allclose(np.moveaxis(scores, 2, 0), expected.scores, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.moveaxis(x, 2, 0), expected.x, rtol=1e-9, atol=1e-12)
    assert steps == len(expected.x)


def pairwise(options):
    """Choices of all options in which any two values of any two options meet, few since each is a program."""
    rng, choices = random.Random(0), []
    pairs = itertools.combinations([[(name, value) for value in values] for name, values in options.items()], 2)
    missing = {pair for both in pairs for pair in itertools.product(*both)}
    while missing:
        tried = [{name: rng.choice(values) for name, values in options.items()} for _ in range(100)]
        met = [missing.intersection(itertools.combinations(choice.items(), 2)) for choice in tried]
        most = max(range(100), key=lambda i: len(met[i]))
        choices.append(tried[most])
        missing -= met[most]
    return choices


OPTIONS = {
    "period": (1, 2, 3),
    "window": (1, 2, 3, 4, 5),
    "pull_at": ("after_step", "before_step"),
    "pulls": ("number", "schedule", "array"),
    "stale_pull": (0.0, 0.3),
    "wire": (None, "bfloat16", "int8"),
    "delay": (0, 1),
    "ties": (False, True),
    "mapping": ("vmap", "shard_map"),
}
OF_GROUPS = {"local_exchanges": (1, 2, 3), "global_stale_pull": (0.0, 0.2)}
CHOICES = pairwise({"shape": ((1, 1), (1, 3), (1, 5)), **OPTIONS})
CHOICES += pairwise({"shape": ((2, 1), (2, 3), (3, 2)), **OPTIONS, **OF_GROUPS})
BAD = ("none", "losses", "gradients", "everything")


@pytest.mark.parametrize("seed", range(len(CHOICES)))
def test_follows_the_oracle(seed):
    """With pulls between none and all the way, and whatever of a problem is not finite."""
    p, steps = CHOICES[seed], 18
    print(p)  # With a failure, pytest shows it.
    shape, grouped, rng = p["shape"], p["shape"][0] > 1, np.random.default_rng(seed)
    strengths, pull, global_pull = rng.uniform(0, 1, shape), *rng.choice([0.0, 1.0, *rng.uniform(0, 1, 2)], 2)

    def own_pull(t, worker, number):
        return {"number": number, "schedule": number / (1 + t), "array": strengths[worker]}[p["pulls"]]

    def optax_pull(number):
        array = strengths if grouped else strengths[0]
        return {"number": number, "schedule": lambda t: number / (1 + t), "array": array}[p["pulls"]]

    options = {name: p[name] for name in ("period", "window", "stale_pull", "wire", "delay")}
    of_groups = {}
    if grouped:
        of_groups["global_period"] = p["period"] * p["local_exchanges"]
        of_groups["global_stale_pull"] = p["global_stale_pull"]
    axes = {"group_axis_name": "group", "global_pull": optax_pull(global_pull)} if grouped else {}
    tx = levels(optax_pull(pull), axis_name="worker", pull_at=p["pull_at"], **axes, **options, **of_groups)
    mapping = p["mapping"] if quickest(shape) == "shard_map" else "vmap"
    program = running(tx, noise_alone=p["ties"], mapping=mapping, shape=shape)
    for bad in BAD:
        start, (loss_noise, gradient_noise) = rng.normal(size=(*shape, 3)), noises(rng, *shape, steps)
        if p["ties"]:  # Few whole numbers, so that means over a window are exact.
            loss_noise = np.round(loss_noise)
        if bad in ("losses", "everything"):
            loss_noise[rng.random(loss_noise.shape) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        if bad == "gradients":  # One worker's parameters go for good, its losses follow.
            gradient_noise[-1, -1, rng.integers(steps), 0] = rng.choice([np.nan, np.inf])
        if bad == "everything":  # From here on nobody can lead.
            gradient_noise[:, :, steps // 2 :] = np.nan
        gradient, loss = oracle_problem(loss_noise, gradient_noise, p["ties"])
        with np.errstate(invalid="ignore"):
            expected = oracle.lsgd(
                start,
                gradient,
                loss,
                steps=steps,
                eta=ETA,
                pull=lambda t, worker: own_pull(t, worker, pull),
                global_pull=(lambda t, worker: own_pull(t, worker, global_pull)) if grouped else None,
                pull_at_x=p["pull_at"] == "before_step",
                **options,
                **of_groups,
            )
        got = program(start, loss_noise, gradient_noise)
        assert_same_run(got, expected, p["period"], of_groups.get("global_period"))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("pass_step", "sending"),
    [
        (False, {}),
        (True, {}),
        (False, {"broadcast": "hierarchical", "wire": "int8"}),
        (True, {"broadcast": "ring", "wire": "bfloat16", "delay": 1}),
    ],
)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_follows_the_oracle_under_every_mapping(mapping, pass_step, sending):
    rng = np.random.default_rng(1)
    start, (loss_noise, gradient_noise) = rng.normal(size=(GROUPS, WORKERS, 3)), noises(rng, GROUPS, WORKERS, 40)
    loss_noise[0, 1, 3] = gradient_noise[1, 2, 9, 0] = np.nan
    options = {"period": 2, "global_period": 4, "global_pull": 0.3, "window": 3, "stale_pull": 0.2}
    tx = levels(0.2, **GROUPED, **options, **sending)
    got = run(tx, start, loss_noise, gradient_noise, mapping=mapping, pass_step=pass_step)
    expected = oracle.lsgd(
        start,
        *oracle_problem(loss_noise, gradient_noise),
        steps=40,
        eta=ETA,
        pull=lambda *_: 0.2,
        global_pull=lambda *_: 0.3,
        **{name: options[name] for name in ("period", "global_period", "window", "stale_pull")},
        **{name: value for name, value in sending.items() if name != "broadcast"},
    )
    assert_same_run(got, expected, 2, 4)


def test_hand_computed_steps_of_one_group():
    """f = x^2, eta 1/4, pull 1/2, period 2: x halves at each step, then the second step's result is pulled."""
    tx = optax.chain(optax.sgd(0.25), leader_pull(0.5, axis_name="worker", period=2))

    def step(x, state):
        updates, state = tx.update(2 * x, state, x, value=x**2)
        return optax.apply_updates(x, updates), state

    step = jax.jit(jax.vmap(step, axis_name="worker"))
    x = np.array([8.0, -4.0, 16.0])
    state = jax.jit(jax.vmap(tx.init))(x)
    x, state = step(x, state)
    np.testing.assert_array_equal(x, [4, -2, 8])  # No exchange yet.
    np.testing.assert_array_equal(state[-1].leader.position, [NOBODY] * 3)
    x, state = step(x, state)
    np.testing.assert_array_equal(x, [0.5, -1, 1.5])  # From 2, -1, 4, half-way to -1.
    np.testing.assert_array_equal(state[-1].leader.position, [1] * 3)
    np.testing.assert_array_equal(state[-1].leader.distance, [3, 0, 5])
    np.testing.assert_array_equal(state[-1].exchanges, [1] * 3)
    np.testing.assert_array_equal(state[-1].score, [40, 10, 160])  # The means of (64, 16), (16, 4), (256, 64).


def test_hand_computed_step_of_two_groups():
    """Two groups of two at (8, 4) and (16, 2): the local pull acts first, the global one where it leaves."""
    x = jnp.array([[8.0, 4.0], [16.0, 2.0]])
    for pull_at, expected in (
        ("after_step", [[2.0, 1.5], [2.75, 1.0]]),  # 4, 2 | 8, 1; locally 3, 2 | 4.5, 1; globally half-way to 1.
        ("before_step", [[-1.0, 1.0], [-6.0, 1.0]]),  # 4 - 2 - 3, 2 - 0 - 1 | 8 - 7 - 7, 1.
    ):
        tx = optax.chain(
            optax.sgd(0.25),
            leader_pull(0.5, axis_name="worker", pull_at=pull_at),
            leader_pull(0.5, axis_name=("group", "worker"), pull_at=pull_at),
        )

        def step(x, state, tx=tx):
            updates, state = tx.update(2 * x, state, x, value=x**2)
            return optax.apply_updates(x, updates), state

        both = over_workers(step, "vmap")(x, jax.jit(jax.vmap(jax.vmap(tx.init)))(x))
        np.testing.assert_array_equal(both[0], expected)
        np.testing.assert_array_equal(both[1][-1].leader.position, np.full((2, 2), 3))


def test_a_third_level_is_a_third_link():
    """Two cells of two groups of two workers, each level with a period and a pull of its own, beside a plain loop."""
    rng = np.random.default_rng(4)
    axes, pulls, periods = ("cell", "group", "worker"), (0.5, 0.3, 0.2), (1, 2, 4)
    start, losses = rng.normal(size=(2, 2, 2, 3)), rng.normal(size=(2, 2, 2, 12))
    tx = optax.chain(
        optax.sgd(ETA),
        *(leader_pull(pulls[i], axis_name=axes[2 - i :], period=periods[i], window=1) for i in range(3)),
    )

    def train(x, losses):
        def step(carry, loss):
            x, state = carry
            updates, state = tx.update(CURVATURE * x, state, x, value=loss)
            return (optax.apply_updates(x, updates), state), [pull.leader.position for pull in links(state)]

        (x, _), leaders = jax.lax.scan(step, (x, tx.init(x)), losses)
        return x, leaders

    for name in reversed(axes):
        train = jax.vmap(train, axis_name=name)
    x, leaders = jax.jit(train)(start, losses)

    expected = start.copy()
    for t in range(12):
        expected -= ETA * CURVATURE * expected
        for size, pull, period in zip((2, 4, 8), pulls, periods, strict=True):
            if (t + 1) % period == 0:
                for first in range(0, 8, size):
                    members = expected.reshape(8, 3)[first : first + size]
                    leader = losses.reshape(8, 12)[first : first + size, t].argmin()
                    members -= pull * (members - members[leader])
                    np.testing.assert_array_equal(
                        leaders[int(np.log2(size)) - 1].reshape(8, 12)[first : first + size, t], leader
                    )
    np.testing.assert_allclose(x, expected, rtol=1e-12)


@pytest.fixture
def problem():
    rng = np.random.default_rng(2)
    return rng.normal(size=(GROUPS, WORKERS, 3)), *noises(rng, GROUPS, WORKERS, 30)


def test_no_pull_is_independent_sgd(problem):
    x = run(levels(0.0, **GROUPED, period=2), *problem)[0]
    alone = problem[0]
    for t in range(30):
        alone = alone - ETA * (CURVATURE * alone + problem[2][:, :, t])
        np.testing.assert_allclose(x[:, :, t], alone, rtol=1e-12)


@pytest.mark.optimized
@pytest.mark.parametrize("sending", [{}, {"delay": 1}, {"wire": "int8"}, {"wire": "bfloat16", "delay": 1}])
def test_one_worker_is_its_optimiser_to_the_bit(problem, sending):
    """However it sends, as with pulls of zero; there the compiler may round its own step otherwise."""
    one = [a[:1, :1] for a in problem]
    optimiser = partial(optax.sgd, ETA, momentum=0.9, nesterov=True)

    def path(pull, global_pull):
        return run(levels(pull, optimizer=optimiser(), **GROUPED, global_pull=global_pull, **sending), *one)[0]

    pulled = path(0.7, 0.5)
    unpulled = run(optax.chain(optimiser(), leader_pull(0.0, axis_name="worker")), *one)[0]
    if sending:
        assert pulled.tobytes() == path(0.0, 0.0).tobytes()
        np.testing.assert_allclose(pulled, unpulled, rtol=1e-13)
    else:
        assert pulled.tobytes() == unpulled.tobytes()


@pytest.mark.optimized
def test_a_leader_is_not_moved_to_the_bit(problem):
    """Step by step: the leader's update is the one that entered, every follower's is not."""
    start, loss_noise, _ = problem
    tx = leader_pull(0.3, axis_name=("group", "worker"), window=1)
    updates, state = over_workers(lambda x, u, loss: tx.update(u, tx.init(x), x, value=loss), "shard_map")(
        start, ETA * start / 3, loss_noise[:, :, 0]
    )
    same = np.all(np.asarray(updates) == ETA * start / 3, axis=-1).reshape(-1)
    np.testing.assert_array_equal(np.flatnonzero(same), state.leader.position[0, 0])


@pytest.mark.optimized
@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("delay", [0, 1])
def test_a_leader_is_not_moved_by_its_own_pull_however_it_is_sent(wire, delay, problem):
    """Two exchanges without steps: the first leader's move is zero to the bit, and nobody else's is."""
    start, loss_noise, _ = problem
    exchange, way = (AT_ONCE, DELAYED)[delay], sending(wire)
    tx = leader_pull(0.3, axis_name=("group", "worker"), window=1, sending=way, exchange=exchange)

    def exchange_twice(x, loss):
        moves, state = [], tx.init(x)
        for number in range(2):
            move, state = tx.update(jnp.zeros_like(x), state, x, value=loss)
            moves.append((move, state.leader.position, state.leader.distance))
            x = x + move if number == 0 else x
        return moves

    first, second = over_workers(exchange_twice, "shard_map")(start, loss_noise[:, :, 0])
    move, leader, distance = second if delay else first
    still = np.all(np.asarray(move) == 0, axis=-1).reshape(-1)
    np.testing.assert_array_equal(np.flatnonzero(still), first[1][0, 0])
    assert leader[0, 0] == first[1][0, 0]
    assert np.asarray(distance).max() > 0
    if delay:
        np.testing.assert_array_equal(first[0], 0)  # There is nothing yet to be pulled to.


def test_a_delayed_pull_of_zero_is_no_pull(problem):
    both = (levels(0.0, **GROUPED, period=2, delay=delay, wire=wire) for delay, wire in ((1, "int8"), (0, None)))
    delayed, plain = (run(tx, *problem)[0] for tx in both)
    np.testing.assert_allclose(delayed, plain, rtol=1e-13)


@pytest.mark.optimized
@pytest.mark.parametrize("broadcast", ["ring", "chain", "hierarchical"])
def test_however_leaders_are_sent_the_run_is_the_same_to_the_bit(broadcast, problem):
    def under(method):
        tx = levels(0.4, **GROUPED, period=2, global_pull=0.3, global_period=4, broadcast=method)
        return run(tx, *problem, mapping="shard_map")[0].tobytes()

    assert under(broadcast) == under("all_reduce")


@pytest.mark.optimized
def test_int8_does_not_drift_from_full_precision(problem):
    """Noiseless and over 200 exchanges both end at the minimum; rounding errors go with the differences."""
    start = problem[0]
    zeros = np.zeros((GROUPS, WORKERS, 200)), np.zeros((GROUPS, WORKERS, 200, 3))
    x = run(
        optax.chain(optax.sgd(ETA), leader_pull(0.4, axis_name=("group", "worker"), sending=int8())), start, *zeros
    )[0]
    exact = run(optax.chain(optax.sgd(ETA), leader_pull(0.4, axis_name=("group", "worker"))), start, *zeros)[0]
    assert np.abs(x - exact).max() < 0.02 * np.abs(start).max()
    np.testing.assert_allclose(x[:, :, -1], exact[:, :, -1], atol=1e-4)


def test_a_pull_of_one_is_consensus_up_to_rounding(problem):
    x = run(optax.chain(optax.sgd(ETA), leader_pull(1.0, axis_name=("group", "worker"))), *problem)[0]
    np.testing.assert_allclose(x, np.broadcast_to(x[:1, :1], x.shape), rtol=1e-13, atol=1e-15)


def test_one_group_is_the_single_leader_method(problem):
    start, loss_noise, gradient_noise = (a[:1] for a in problem)
    grouped = levels(0.4, **GROUPED, period=2, global_pull=0.0)
    single = optax.chain(optax.sgd(ETA), leader_pull(0.4, axis_name="worker", period=2))
    both = (run(tx, start, loss_noise, gradient_noise)[0] for tx in (grouped, single))
    np.testing.assert_allclose(*both, rtol=1e-13)


def test_permuting_workers_and_groups_permutes_the_result(problem):
    tx = levels(0.4, **GROUPED, period=2, global_pull=0.2, global_period=4)
    permute = np.ix_([1, 0], [2, 0, 3, 1])
    x = run(tx, *problem)[0]
    np.testing.assert_allclose(run(tx, *(a[permute] for a in problem))[0], x[permute], rtol=1e-13)


def test_the_global_leader_is_its_groups_leader(problem):
    tx = levels(0.4, **GROUPED, global_pull=0.2, window=2)
    local, everyone = run(tx, *problem)[2]
    group, position = np.divmod(everyone[0, 0], WORKERS)
    np.testing.assert_array_equal(local[group, 0, np.arange(30)], position)


def test_a_worker_with_non_finite_parameters_never_leads_whatever_its_loss(problem):
    start, loss_noise, gradient_noise = problem
    gradient_noise[0, 1, 4, 2] = np.inf
    loss_noise[0, 1, :5] = -1e6  # Up to the step that ruins it, its losses are by far the best.
    tx = optax.chain(optax.sgd(ETA), leader_pull(0.4, axis_name=("group", "worker"), period=1))
    x, _, (leaders,) = run(tx, start, loss_noise, gradient_noise)
    np.testing.assert_array_equal(leaders[0, 0, :4], [1] * 4)
    assert not np.any(leaders[:, :, 4:] == 1)
    healthy = np.ones((GROUPS, WORKERS), bool)
    healthy[0, 1] = False
    assert np.isfinite(x[healthy]).all()
    assert not np.isfinite(x[0, 1, 4:]).all(axis=-1).any()


def test_a_nan_leaves_the_score_with_the_window(problem):
    start, loss_noise, gradient_noise = problem
    loss_noise[0, 0, 5] = np.nan
    tx = optax.chain(optax.sgd(ETA), leader_pull(0.0, axis_name="worker", window=4))
    scores = run(tx, start, loss_noise, gradient_noise)[1]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scores[0, 0])), [5, 6, 7, 8])
    assert np.isfinite(np.delete(scores.reshape(8, -1), 0, axis=0)).all()


def test_when_nobody_can_lead_nobody_is_pulled(problem):
    start, loss_noise, gradient_noise = problem
    tx = levels(0.4, **GROUPED, global_pull=0.4, stale_pull=0.1)
    alone = levels(0.0, **GROUPED)
    x, _, (local, everyone) = run(tx, start, np.nan * loss_noise, gradient_noise)
    np.testing.assert_array_equal(local, NOBODY)
    np.testing.assert_array_equal(everyone, NOBODY)
    np.testing.assert_allclose(x, run(alone, start, loss_noise, gradient_noise)[0], rtol=1e-13)


def nan_gradient_inside_apply_if_finite():
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(3)
    start, (losses, gradients) = rng.normal(size=(2, 4, 3)), noises(rng, 2, 4, 12)
    gradients[0, 1, 3] = np.nan
    tx = optax.chain(
        optax.apply_if_finite(optax.sgd(ETA), max_consecutive_errors=5),
        leader_pull(0.2, axis_name=("group", "worker"), period=2),
    )
    x, _, (leaders,) = run(tx, start, losses, gradients, mapping="shard_map")
    assert np.isfinite(x).all()
    assert (leaders == leaders[:1, :1]).all(), leaders
    assert (leaders[..., 1:] >= 0).all()


def test_a_nan_gradient_inside_apply_if_finite_neither_hangs_nor_desynchronises():
    """On 8 devices, in a process of its own with a time limit: a hang would be for ever."""
    need_devices(8)
    faults.called(1, nan_gradient_inside_apply_if_finite)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def nnx_problem():
    graphdef, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: jnp.mean(nnx.merge(graphdef, params)(x) ** 2)


def dict_problem():
    params = {"params": {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}}
    return params, lambda p, x: jnp.mean((x @ p["params"]["dense"]["kernel"] + p["params"]["dense"]["bias"][None]) ** 2)


def bfloat16_problem():
    params = (jnp.ones(3, jnp.bfloat16), [jnp.ones((), jnp.float32)])
    return params, lambda p, x: jnp.mean((x @ p[0].astype(jnp.float32)) ** 2) + p[1][0] ** 2


MOMENTUM = partial(optax.sgd, momentum=0.9)


@pytest.mark.parametrize(
    ("mapping", "make", "optimiser"),  # Any two of them meet.
    [
        ("vmap", nnx_problem, optax.adamw),
        ("vmap", dict_problem, MOMENTUM),
        ("vmap", bfloat16_problem, optax.lion),
        ("shard_map", nnx_problem, MOMENTUM),
        ("shard_map", nnx_problem, optax.lion),
        ("shard_map", dict_problem, optax.adamw),
        ("shard_map", dict_problem, optax.lion),
        ("shard_map", bfloat16_problem, MOMENTUM),
        ("shard_map", bfloat16_problem, optax.adamw),
    ],
)
def test_any_tree_and_optimiser_without_recompiling_at_exchanges(make, optimiser, mapping):
    # What is sent depends on the tree, not on the optimiser.
    sending = {"wire": "int8", "delay": 1, "broadcast": "ring"} if optimiser is optax.lion else {}
    with jax.enable_x64(False):
        params, loss = make()
        options = {"period": 2, "global_pull": 0.5, "global_period": 4, "stale_pull": 0.1} | sending
        tx = levels(0.5, optimizer=optimiser(0.01), **GROUPED, **options)
        traces = 0

        def step(params, state, x):
            nonlocal traces
            traces += 1
            value, grads = jax.value_and_grad(loss)(params, x)
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        # Where a step leaves them: unsharded arrays are another signature.
        x = np.random.default_rng(0).normal(size=(GROUPS, WORKERS, 5, 3)).astype(np.float32)
        before, state, x = over_workers(lambda x: (params, tx.init(params), x), mapping)(x)
        step, now = over_workers(step, mapping), before
        for _ in range(8):
            now, state = step(now, state, x)
        assert traces == 1
        assert jax.tree.map(lambda a: (a.shape, a.dtype), now) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(now))
        np.testing.assert_array_equal(state[1].exchanges, np.full((2, 4), 4))
        np.testing.assert_array_equal(state[2].exchanges, np.full((2, 4), 2))
        assert (np.asarray(state[1].leader.position) >= 0).all()


def test_init_and_scan_within_one_shard_map():
    """With replication checks on, the state that `init` makes has the types that `update` returns."""
    tx = leader_pull(0.5, axis_name=("group", "worker"), exchange=stale(0.1))

    def train(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(-x / 2, state, x, value=x)
            return (x + updates, state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=2)[0][0]

    x = np.arange(8.0).reshape(GROUPS, WORKERS)
    np.testing.assert_allclose(over_workers(train, "shard_map")(x), over_workers(train, "vmap")(x), rtol=1e-13)


def test_an_unbatched_step_keeps_a_branch_under_vmap():
    tx = leader_pull(0.5, axis_name="worker", period=4)
    x = jnp.ones((4, 2))
    state = jax.vmap(tx.init)(x)

    def update(x, state, step):
        return tx.update(x, state, x, value=x.sum(), step=step)

    def branches(in_axes, step):
        mapped = jax.vmap(update, axis_name="worker", in_axes=in_axes)
        return str(jax.make_jaxpr(mapped)(x, state, step)).count("cond[")

    assert branches((0, 0, None), jnp.asarray(0)) == 1
    assert branches((0, 0, 0), jnp.zeros(4, int)) == 0  # One count a worker becomes a select.


@pytest.mark.optimized
def test_the_compiled_exchange_gathers_nobodys_parameters_but_the_leaders():
    tx = leader_pull(0.5, axis_name=("group", "worker"), period=4)
    x = jnp.ones((GROUPS, WORKERS, 1000))
    state = jax.vmap(jax.vmap(tx.init))(x)
    update = mapped(lambda x, state: tx.update(x, state, x, value=x.sum()), "shard_map")
    text = update.lower(x, state).compile().as_text()
    assert "all-gather" not in text
    collectives = [line for line in text.splitlines() if " all-reduce(" in line]
    assert sum("1000" in line.split(" all-reduce(")[0] for line in collectives) == 1
    assert len(collectives) == 3  # And two scalars, for the election.


def test_hyperparameters_can_be_changed_without_recompiling():
    static = ("axis_name", "period", "window")
    tx = optax.inject_hyperparams(leader_pull, static_args=static)(0.5, axis_name="worker")
    x = jnp.array([[4.0], [2.0]])
    traces = 0

    def update(x, state):
        nonlocal traces
        traces += 1
        return tx.update(jnp.zeros_like(x), state, x, value=x.sum())

    update = jax.jit(jax.vmap(update, axis_name="worker"))
    state = jax.vmap(tx.init)(x)
    for pull, moved in ((0.5, -1.0), (0.5, -1.0), (0.25, -0.5), (1.0, -2.0)):
        state.hyperparams["pull"] = jnp.full(2, pull)
        updates, state = update(x, state)
        np.testing.assert_array_equal(updates, [[moved], [0.0]])
    assert traces <= 2  # The first call's state is weakly typed, as optax makes it.


@pytest.mark.optimized
def test_lsgd_is_sgd_with_nesterov_momentum_weight_decay_and_the_pull(problem):
    chain = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.sgd(ETA, 0.9, nesterov=True),
        leader_pull(0.1, axis_name="worker", period=4),
        leader_pull(0.1, axis_name=("group", "worker"), period=16),
    )
    assert run(lsgd(ETA, **GROUPED), *problem)[0].tobytes() == run(chain, *problem)[0].tobytes()
    single = run(lsgd(ETA, axis_name="worker"), *problem)
    assert len(single[2]) == 1
    with pytest.raises(ValueError, match="need groups"):
        lsgd(ETA, axis_name="worker", global_period=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "period must be a whole number of updates, at least 1, got 0"),
        ({"period": 2.5}, r"period must be a whole number of updates, at least 1, got 2\.5"),
        ({"window": 0}, "window must be a whole number of losses, at least 1, got 0"),
        ({"pull": 1.5}, r"pull must be in \[0, 1\], got 1\.5"),
        ({"pull": float("nan")}, r"pull must be in \[0, 1\], got nan"),
        ({"pull": np.array([0.5, -1.0])}, r"pull must be in \[0, 1\], got \[ 0\.5 -1\. \]"),
        ({"stale_pull": -0.1}, r"stale_pull must be in \[0, 1\], got -0\.1"),
        ({"global_pull": 0.1}, "need groups: pass group_axis_name"),
        ({"global_period": 4}, "need groups: pass group_axis_name"),
        ({"global_stale_pull": 0.1}, "need groups: pass group_axis_name"),
        ({"group_axis_name": "group", "global_pull": 2.0}, r"global_pull must be in \[0, 1\], got 2\.0"),
        ({"group_axis_name": "group", "period": 4, "global_period": 6}, "multiple of period, 4, got 6"),
        ({"group_axis_name": "group", "global_period": 0}, "global_period must be .* at least 1, got 0"),
        ({"group_axis_name": "worker"}, "must have different names"),
        ({"broadcast": "tree"}, "a broadcast must be one of auto, all_reduce, ring, chain, hierarchical, got 'tree'"),
        ({"wire": "int4"}, 'wire must be None, "bfloat16" or "int8", got \'int4\''),
        ({"delay": 2}, "delay must be 0 or 1, got 2"),
        ({"pull_at": "after"}, 'must be "after_step" or "before_step", got \'after\''),
    ],
)
def test_an_option_out_of_range_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        leader_sgd(optax.sgd(ETA), **({"axis_name": "worker", "period": 1} | options))
    assert "\n" not in str(error.value)


def test_missing_arguments_of_update_are_one_sentence():
    tx = leader_pull(0.1, axis_name="worker")
    x = jnp.ones(2)
    state = jax.vmap(tx.init)(x)

    def update(**options):
        return jax.vmap(lambda x, state: tx.update(x, state, x, **options), axis_name="worker")(x, state)

    with pytest.raises(ValueError, match="compared by their losses: pass it"):
        update()
    with pytest.raises(ValueError, match=r"scalar loss of one worker, got the shape \(2,\)"):
        update(value=jnp.ones(2))
    with pytest.raises(ValueError, match="moves parameters: pass them"):
        jax.vmap(lambda x, state: tx.update(x, state, value=x), axis_name="worker")(x, state)
    with pytest.raises(NameError, match="no axis 'worker' here"):
        jax.vmap(lambda x, state: tx.update(x, state, x, value=x), axis_name="workers")(x, state)
    pulls = leader_pull(np.full(3, 0.1), axis_name="worker")
    with pytest.raises(ValueError, match=r"shape of the axes \('worker',\), \(2,\), got \(3,\)"):
        jax.vmap(lambda x, state: pulls.update(x, state, x, value=x), axis_name="worker")(x, state)
