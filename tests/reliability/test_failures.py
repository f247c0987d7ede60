"""Workers whose numbers are not finite: revived by a leader, or the end of a run if all are."""

import dataclasses
import functools
import itertools
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax import NOBODY, apply_updates, leader_sgd, train
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.exchange.axes import as_own
from lsgd_jax.methods import METHODS
from lsgd_jax.variants import was_revived
from tests.mapping import MAPPINGS, over_workers, quickest
from tests.reliability import faults
from tests.reliability.runs import SMALL, arrays, metrics

GROUPED = {"axis_name": "worker", "group_axis_name": "group"}


@functools.cache
def training(tx, mapping):
    """The program of `trained`."""

    def train(x, losses, gradients):
        def step(carry, now):
            x, state = carry
            number, loss, gradient = now
            updates, state = tx.update(gradient, state, x, value=loss, step=number)
            x = apply_updates(x, updates, state)
            return (x, state), (x, state[-1].score, was_revived(state))

        (_, state), told = jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(len(losses)), losses, gradients))
        return *told, state

    return over_workers(train, mapping)


def trained(tx, x, losses, gradients, mapping=None):
    """Points, scores and who was revived, [group, worker, step, ...], and the last state."""
    return jax.tree.map(np.asarray, training(tx, mapping or quickest())(x, losses, gradients))


def problem(steps):
    """Points [2, 4, 3], losses [2, 4, steps] with worker 1 ahead in both groups, gradients [2, 4, steps, 3]."""
    rng = np.random.default_rng(0)
    losses = np.tile(np.array([[3, 1, 4, 5], [9, 2, 6, 7]], np.float32)[..., None], steps)
    return tuple(
        np.asarray(a, np.float32) for a in (rng.normal(size=(2, 4, 3)), losses, rng.normal(size=(2, 4, steps, 3)))
    )


REVIVING = leader_sgd(
    optax.sgd(0.1, 0.9), period=4, pull=0.5, global_pull=0.0, window=3, revive="from_leader", **GROUPED
)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("broken", ["gradient", "start", "loss"])
def test_a_failed_worker_starts_anew_from_its_leader(broken, mapping):
    """At the exchange after step 4; its momentum and its losses are those of a new worker."""
    x, losses, gradients = problem(6)
    if broken == "gradient":
        gradients[1, 2, 1] = np.inf
    elif broken == "start":
        x[1, 2] = np.nan
    else:
        losses[1, 2, 2] = np.nan
    path, scores, revived, (momentum, *_) = trained(REVIVING, x, losses, gradients, mapping)
    assert np.argwhere(revived).tolist() == [[1, 2, 3]]
    np.testing.assert_allclose(path[1, 2, 3], path[1, 1, 3], rtol=1e-5)  # Compilers round sums as they like.
    assert scores[1, 2, 3] == np.inf
    np.testing.assert_array_equal(scores[1, 2, 4:], [6, 6])
    assert np.isfinite(path[:, :, 3:]).all()
    np.testing.assert_allclose(path[1, 2, 4], path[1, 1, 3] - 0.1 * gradients[1, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(momentum[0].trace[1, 2], 0.9 * gradients[1, 2, 4] + gradients[1, 2, 5], rtol=1e-6)


def test_a_revival_changes_nothing_for_the_others():
    x, losses, gradients = problem(8)
    results = []
    for revive in ("never", "from_leader"):
        tx = leader_sgd(optax.sgd(0.1, 0.9), period=2, global_period=4, revive=revive, **GROUPED)
        for value in (0.5, np.nan):
            gradients[0, 3, 0, 0] = value
            path = trained(tx, x, losses, gradients)[0].reshape(8, 8, 3)
            results.append(np.delete(path, 3, axis=0))
    for other in results[1:]:
        np.testing.assert_allclose(results[0], other, rtol=1e-5, atol=1e-6)


def test_a_group_that_has_failed_is_revived_by_the_global_leader():
    x, losses, gradients = problem(8)
    gradients[0, :, 0] = np.nan
    tx = leader_sgd(optax.sgd(0.1), period=2, global_period=4, revive="from_leader", **GROUPED)
    path, _, revived, _ = trained(tx, x, losses, gradients)
    assert np.argwhere(revived).tolist() == [[0, worker, 3] for worker in range(4)]
    np.testing.assert_allclose(path[0, :, 3], np.tile(path[1, 1, 3], (4, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "last"),
    [({"delay": 1}, 5), ({"wire": "int8"}, 5), ({"stale_pull": 0.2}, 5), ({"pull_at": "before_step"}, 5)],
)
def test_a_revival_goes_with_other_options(options, last):
    x, losses, gradients = problem(10)
    gradients[1, 2, 5] = np.nan
    tx = leader_sgd(optax.sgd(0.1), period=2, global_period=4, revive="from_leader", **GROUPED, **options)
    path, _, revived, _ = trained(tx, x, losses, gradients)
    assert np.argwhere(revived).tolist() == [[1, 2, last]]
    assert np.isfinite(path[:, :, last:]).all()


def test_when_all_have_failed_nobody_is_revived():
    x, losses, gradients = problem(4)
    gradients[:, :, 0] = np.nan
    tx = leader_sgd(optax.sgd(0.1), period=2, revive="from_leader", **GROUPED)
    path, _, revived, (_, revival, *pulls) = trained(tx, x, losses, gradients)
    assert not revived.any()
    assert revival.failed.all()
    np.testing.assert_array_equal(path, np.broadcast_to(x[:, :, None], path.shape))  # Where they were.
    assert (pulls[0].leader.position == NOBODY).all()


def scanned(step, tx, x, *now):
    """What 4 workers' scans of a step from their points and states collect, [worker, step, ...]."""

    def train(x, *now):
        state = tx.init(x)
        return jax.lax.scan(step, (x, as_own(state, state, ("group", "worker"))), now)[1]

    program = over_workers(train, quickest((1, 4)), (1, 4))
    return jax.tree.map(lambda a: np.asarray(a)[0], program(*jax.tree.map(lambda a: a[None], (x, *now))))


def updated(tx, x, losses, gradients, apply=optax.apply_updates):
    """Points of 4 workers [worker, step, ...] and the states, by any function that applies updates."""

    def step(carry, now):
        x, state = carry
        loss, gradient = now
        updates, state = tx.update(gradient, state, x, value=loss)
        x = apply(x, updates)
        return (x, state), (x, state)

    return scanned(step, tx, x, losses, gradients)


def nan_gradient(steps=8, dtype=np.float32):
    """Worker 0 leads, and the gradient of worker 1 is NaN at step 1."""
    losses = np.tile(np.arange(1.0, 5.0, dtype=np.float32)[:, None], steps)
    gradients = np.random.default_rng(1).normal(size=(4, steps, 3)).astype(dtype)
    gradients[1, 1] = np.nan
    return np.random.default_rng(0).normal(size=(4, 3)).astype(dtype), losses, gradients


def test_whatever_adds_updates_revives():
    """A worker that fails waits where it was, so that its parameters stay finite."""
    x, losses, gradients = nan_gradient()
    tx = leader_sgd(optax.adam(0.1), axis_name="worker", period=4, revive="from_leader")
    path, (_, revival, _) = updated(tx, x, losses, gradients, apply=lambda x, u: x + u)
    assert np.isfinite(path).all()
    np.testing.assert_array_equal(path[1, 1], path[1, 0])
    np.testing.assert_array_equal(revival.failed[1], [False, True, True, False, False, False, False, False])
    np.testing.assert_array_equal(np.flatnonzero(revival.revived.any(0)), [3])
    np.testing.assert_allclose(path[1, 3], path[0, 3], rtol=1e-6)


def test_a_worker_with_a_failed_optimizer_is_revived_once():
    """Adam's moments are NaN; what a schedule counts goes on."""
    x, losses, gradients = nan_gradient()
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda count: 0.1 / (1 + count)))
    tx = leader_sgd(optimizer, axis_name="worker", period=4, revive="from_leader")
    path, ((adam, schedule), revival, _) = updated(tx, x, losses, gradients)
    assert revival.revived.sum() == 1
    np.testing.assert_array_equal(adam.count[1], [1, 2, 3, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(schedule.count[1], np.arange(1, 9))
    assert np.isfinite(adam.mu[1, 3:]).all()
    first_step = path[1, 4] - path[1, 3]
    np.testing.assert_allclose(np.abs(first_step), 0.1 / 5, rtol=1e-3)  # Adam's first step, at the fifth rate.


def test_injected_hyperparameters_go_on_through_a_revival():
    x, losses, gradients = nan_gradient()
    tx = leader_sgd(
        optax.inject_hyperparams(optax.adam)(lambda count: 0.1 / (1 + count)),
        axis_name="worker",
        period=4,
        revive="from_leader",
    )
    _, (injected, revival, _) = updated(tx, x, losses, gradients)
    assert revival.revived.sum() == 1
    np.testing.assert_array_equal(injected.count[1], np.arange(1, 9))
    np.testing.assert_allclose(injected.hyperparams["learning_rate"][1], 0.1 / np.arange(1, 9), rtol=1e-6)
    assert np.isfinite(injected.inner_state[0].mu[1, 3:]).all()


def test_a_worker_that_has_run_far_away_arrives_at_the_second_exchange():
    """Its difference to the leader is that to zero, up to rounding; until it has arrived it takes no steps."""
    x, losses, gradients = nan_gradient()
    x[1] = 1e30
    tx = leader_sgd(optax.sgd(0.1), axis_name="worker", period=2, revive="from_leader")
    path, (_, revival, _) = updated(tx, x, losses, gradients)
    assert np.argwhere(revival.revived).tolist() == [[1, 3]]
    np.testing.assert_array_equal(revival.failed[1], [False, True, True, False, False, False, False, False])
    np.testing.assert_array_equal(path[1, 3], path[0, 3])


def test_a_revival_leaves_alone_where_a_delayed_leader_was():
    """The leader of all fails before its pull is due, and its group revives it; what was elected is what all follow."""
    x, losses, gradients = problem(16)
    losses[1, 0] = 0.5
    losses[1, 0, 11] = np.nan
    tx = leader_sgd(
        optax.sgd(0.1),
        period=2,
        pull=0.0,
        global_period=8,
        global_pull=1.0,
        delay=1,
        window=1,
        revive="from_leader",
        **GROUPED,
    )
    path, _, revived, _ = trained(tx, x, losses, gradients)
    assert np.argwhere(revived).tolist() == [[1, 0, 11]]
    before_pull = path[0, 0, 14] - 0.1 * gradients[0, 0, 15]
    expected = before_pull - (path[0, 0, 7] - path[1, 0, 7])
    np.testing.assert_allclose(path[0, 0, 15], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("period", [1, 4])
def test_only_what_is_exchanged_is_revived(period):
    """Two links with revival in one optimizer, and parameters that are frozen or step alone."""
    labels = {"body": "b", "head": "h", "frozen": "f", "alone": "a"}
    links = {
        "b": leader_sgd(optax.sgd(0.1), axis_name="worker", period=4, revive="from_leader"),
        "h": leader_sgd(optax.sgd(0.1), axis_name="worker", period=period, revive="from_leader"),
        "f": optax.set_to_zero(),
        "a": optax.sgd(0.1),
    }
    tx = optax.partition(links, labels)
    x, losses, _ = nan_gradient(4)
    x = {name: x.copy() for name in labels}
    for name in ("body", "frozen"):
        x[name][1] = np.nan

    def step(carry, now):
        x, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, x), state, x, value=now[0])
        x = apply_updates(x, updates, state)
        return (x, state), x

    path = scanned(step, tx, x, losses)
    assert np.isnan(path["body"][1, :3]).all()
    np.testing.assert_array_equal(path["body"][1, 3], path["body"][0, 3])
    assert np.isnan(path["frozen"][1]).all()
    np.testing.assert_array_equal(np.delete(path["frozen"], 1, 0)[:, 3], np.delete(x["frozen"], 1, 0))
    np.testing.assert_allclose(path["alone"], x["alone"][:, None] - 0.1 * np.arange(1, 5)[None, :, None], rtol=1e-6)
    assert np.isfinite(path["head"]).all()


@pytest.mark.parametrize("options", [{}, {"delay": 1}, {"wire": "int8"}])
@pytest.mark.parametrize(
    ("params", "grads"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")]
)
def test_a_revival_keeps_dtypes(params, grads, options):
    x, losses, gradients = nan_gradient()
    tx = leader_sgd(optax.sgd(0.1), axis_name="worker", period=2, revive="from_leader", **options)

    def step(carry, now):
        x, state = carry
        loss, gradient = now
        updates, state = tx.update(gradient, state, x, value=loss)
        x = apply_updates(x, updates, state)
        return (x, state), (x, state[1].revived)

    x, gradients = jnp.asarray(x, params), jnp.asarray(gradients, grads)
    path, revived = scanned(step, tx, x, losses, gradients)
    assert path.dtype == params
    assert np.flatnonzero(revived.any(0)).tolist() == ([3] if "delay" in options else [1])
    assert np.isfinite(np.asarray(path, np.float32)).all()


def test_a_revived_worker_does_not_lead_before_its_window_is_full():
    """Its losses are the lowest from its revival on."""
    x, losses, gradients = nan_gradient(16)
    losses[1, 2:] = 0.1
    tx = leader_sgd(optax.sgd(0.1), axis_name="worker", period=2, window=5, revive="from_leader")
    _, (_, revival, pull) = updated(tx, x, losses, gradients)
    assert np.flatnonzero(revival.revived[1]).tolist() == [1]
    # Losses since then at the exchanges after steps 4, 6, 8, ...: 2, 4, 6.
    np.testing.assert_array_equal(pull.leader.position[0, 1::2], [0, 0, 0, 1, 1, 1, 1, 1])


GRID = list(
    itertools.product((0, 1), (None, "int8", "bfloat16"), ("after_step", "before_step"), (0.0, 0.3), (0.0, 0.2))
)
GRID = [(periods, *options) for periods in ((2, 2), (1, 1), (2, 4), (1, 2)) for options in GRID]


@pytest.mark.parametrize("options", random.Random(0).sample(GRID, 64 if faults.SOAK else 12), ids=str)
def test_a_worker_is_healed_by_the_first_exchange_that_has_a_leader(options, record_property):
    """Whether it starts with a NaN or meets one in its first gradient or loss."""
    periods, delay, wire, pull_at, stale_pull, global_stale_pull = options
    tx = leader_sgd(
        optax.sgd(0.1, 0.9),
        period=periods[0],
        global_period=periods[1],
        delay=delay,
        wire=wire,
        pull_at=pull_at,
        stale_pull=stale_pull,
        global_stale_pull=global_stale_pull,
        window=2,
        revive="from_leader",
        **GROUPED,
    )

    def train(x, losses, gradients):
        def step(carry, now):
            x, state = carry
            loss, gradient = now
            updates, state = tx.update(gradient, state, x, value=loss)
            x = apply_updates(x, updates, state)
            return (x, state), (x, state[1].revived)

        return jax.lax.scan(step, (x, tx.init(x)), (losses, gradients))[1]

    problems = [jax.tree.map(np.copy, problem(8)) for _ in range(3)]
    problems[0][0][0, 2] = np.nan  # The start,
    problems[1][2][0, 2, 0] = np.nan  # the first gradient
    problems[2][1][0, 2, : periods[0]] = np.nan  # or losses.
    program = over_workers(train, quickest())
    path, revived = (np.stack(each) for each in zip(*(program(*each) for each in problems), strict=True))
    first = periods[0] * (1 + delay) - 1  # A delayed exchange has a leader from the second time on.
    # A NaN of the loss has left the window when a delayed exchange has its first leader.
    failed = [0, 1] if delay and periods[0] == 2 else [0, 1, 2]
    assert np.argwhere(revived).tolist() == [[i, 0, 2, first] for i in failed]
    assert np.isfinite(path[:, 0, 2, first:]).all()
    if delay == 0 and wire is None and periods[0] != periods[1] and pull_at == "after_step":
        np.testing.assert_allclose(path[:, 0, 2, first], path[:, 0, 1, first], rtol=1e-5)  # Its group's leader.
    record_property("failures healed", 3)


def test_a_failed_worker_is_not_part_of_the_center():
    """It waits at a finite point, which may be anywhere."""
    x, losses, gradients = problem(3)
    gradients[1, 2, 1] = np.nan
    tx = leader_sgd(optax.sgd(0.1), period=4, revive="from_leader", **GROUPED)

    def train(x, losses, gradients):
        state = tx.init(x)
        for loss, gradient in zip(losses, gradients, strict=True):
            updates, state = tx.update(gradient, state, x, value=loss)
            x = apply_updates(x, updates, state)
        return x, METHODS["lsgd"].center(x, state, ("group", "worker"))

    after, center = over_workers(train, quickest())(x, losses, gradients)
    others = np.delete(np.reshape(after, (8, 3)), 6, axis=0)
    np.testing.assert_allclose(center[0, 0], others.mean(0), rtol=1e-5)


def test_another_value_is_one_sentence():
    with pytest.raises(
        ValueError, match='revive must be "never" or "from_leader", got "always"'.replace('"always"', "'always'")
    ):
        leader_sgd(optax.sgd(0.1), axis_name="worker", revive="always")


def test_updates_of_methods_without_leaders_are_added():
    x = {"a": jnp.ones(3)}
    np.testing.assert_array_equal(apply_updates(x, x, optax.adam(0.1).init(x))["a"], 2 * np.ones(3))


def test_training_revives_a_worker_and_says_so(tmp_path, monkeypatch):
    faults.poison(monkeypatch, steps=[9], workers=[2])
    config = dataclasses.replace(SMALL, revive="from_leader")
    assert train.train_and_evaluate(config, tmp_path / "run", lines=False) < 0.9
    events = [event for event in metrics(tmp_path / "run") if event["event"] in ("failure", "revival")]
    assert events == [{"event": "revival", "step": 12, "workers": [2]}]
    assert all(np.isfinite(x).all() for name, x in arrays(tmp_path / "run", 24).items() if "params" in name)


def test_without_revival_a_failure_is_told_once_also_by_a_run_that_goes_on(tmp_path, monkeypatch):
    faults.poison(monkeypatch, steps=[5], workers=[1, 2])
    faults.stop_after(monkeypatch, 3, signal.SIGINT)
    for resume in (False, True):
        with pytest.raises(Interrupted):
            train.train_and_evaluate(SMALL, tmp_path / "run", lines=False, resume=resume)
        faults.stop_after(monkeypatch, 2, signal.SIGINT)
    failures = [event for event in metrics(tmp_path / "run") if event["event"] == "failure"]
    assert failures == [{"event": "failure", "step": 8, "workers": [1, 2]}]


@pytest.mark.parametrize("name", ["lsgd", "easgd"])
def test_a_run_whose_workers_have_all_failed_stops_and_says_since_when(name, tmp_path, monkeypatch):
    faults.poison(monkeypatch, steps=[9], workers=[2])
    with monkeypatch.context() as later:
        faults.poison(later, steps=[13], workers=range(4))
        config = dataclasses.replace(SMALL, method=name, steps=400, checkpoint_every=4)
        with pytest.raises(
            UsageError, match=r"all workers have failed, .*: worker 2 first, by step 12, and the last by step 16"
        ):
            train.train_and_evaluate(config, tmp_path / "run", lines=False)
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1] == 12
