"""Workers whose numbers are not finite: revived by a leader, or the end of a run if all are."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax import NOBODY, apply_updates, leader_pull, leader_sgd, train
from lsgd_jax.errors import Interrupted, UsageError
from tests.mapping import MAPPINGS, over_workers
from tests.reliability import faults
from tests.reliability.runs import SMALL, arrays, metrics

GROUPED = {"axis_name": "worker", "group_axis_name": "group"}


def trained(tx, x, losses, gradients, mapping="vmap"):
    """Points, scores and who was revived, [group, worker, step, ...], and the last state."""

    def train(x, losses, gradients):
        def step(carry, now):
            x, state = carry
            number, loss, gradient = now
            updates, state = tx.update(gradient, state, x, value=loss, step=number)
            x = apply_updates(x, updates, state)
            return (x, state), (x, state[-1].score, state[-1].revived)

        (_, state), told = jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(len(losses)), losses, gradients))
        return *told, state

    return jax.tree.map(np.asarray, over_workers(train, mapping)(x, losses, gradients))


def problem(steps):
    """Points [2, 4, 3], losses [2, 4, steps] with worker 1 ahead in both groups, gradients [2, 4, steps, 3]."""
    rng = np.random.default_rng(0)
    losses = np.tile(np.array([[3, 1, 4, 5], [9, 2, 6, 7]], np.float32)[..., None], steps)
    return tuple(
        np.asarray(a, np.float32) for a in (rng.normal(size=(2, 4, 3)), losses, rng.normal(size=(2, 4, steps, 3)))
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
    tx = leader_sgd(optax.sgd(0.1, 0.9), period=4, pull=0.5, global_pull=0.0, window=3, revive="from_leader", **GROUPED)
    path, scores, revived, (momentum, _) = trained(tx, x, losses, gradients, mapping)
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
    for value in (gradients[0, 3, 0, 0], np.nan):
        gradients[0, 3, 0, 0] = value
        for revive in ("never", "from_leader"):
            tx = leader_sgd(optax.sgd(0.1, 0.9), period=2, global_period=4, revive=revive, **GROUPED)
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
    [({"delay": 1}, 5), ({"wire": "int8"}, 5), ({"stale_pull": 0.2}, 5), ({"pull_at": "before_step"}, 7)],
)
def test_a_revival_goes_with_other_options(options, last):
    """What is pulled before the step is found to have failed an exchange later."""
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
    path, _, revived, (_, pulls) = trained(tx, x, losses, gradients)
    assert not revived.any()
    assert np.isnan(path).all()
    assert (pulls.leaders[0].position == NOBODY).all()


def test_another_value_is_one_sentence():
    with pytest.raises(
        ValueError, match='revive must be "never" or "from_leader", got "always"'.replace('"always"', "'always'")
    ):
        leader_pull(0.1, axis_name="worker", revive="always")


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
@pytest.mark.usefixtures("quick_compilation")
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
