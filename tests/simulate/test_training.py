"""Training in virtual time against the synchronous trainer, and against plain NumPy on a quadratic."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax.errors import UsageError
from lsgd_jax.methods.independent import independent
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate import SCHEDULES, Cluster, event_log
from lsgd_jax.simulate.training import Network, train_on
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.train.step import TrainState
from tests import oracle

CONFIG = dataclasses.replace(
    PRESETS["digits"], groups=2, workers=2, steps=12, period=3, global_period=6, eval_every=6, window=2
)
ALIKE = Cluster()
ETA = 0.1
HESSIAN = np.array([1.0, 3.0])
TARGETS = np.random.default_rng(0).normal(size=(4, 2))  # Each worker's own minimum, so that they drift apart.


class Quadratics:
    """Every worker has a quadratic of its own, and all start at the same point."""

    optimizer = independent(optax.sgd(ETA), axis_name="worker", window=2)

    def start(self):
        x = jnp.array([2.0, -1.0])
        return TrainState(x, (), self.optimizer.init(x))

    def step(self, state, worker, number, progress, seconds):
        value, grad = self._value_and_grad(state.params, worker)
        updates, optimizer = self.optimizer.update(grad, state.optimizer, state.params, value=value)
        return state._replace(params=optax.apply_updates(state.params, updates), optimizer=optimizer)

    def step_together(self, states, workers, numbers, progress, seconds):
        grads = [self._value_and_grad(s.params, worker)[1] for s, worker in zip(states, workers, strict=True)]
        mean = sum(grads) / len(grads)
        return [s._replace(params=s.params - ETA * mean) for s in states]

    def test(self, states, center):
        center = sum(s.params for s in states) / len(states) if center is None else center
        return float(jnp.sum(center**2)), np.zeros(len(states))

    def _value_and_grad(self, x, worker):
        offset = x - jnp.array(TARGETS[worker], x.dtype)
        return jnp.sum(HESSIAN * offset**2) / 2, jnp.asarray(HESSIAN, x.dtype) * offset


def gradient(x, step, worker):
    return HESSIAN * (x - TARGETS[2 * worker[0] + worker[1]])


def loss(x, step, worker):
    return float((HESSIAN * (x - TARGETS[2 * worker[0] + worker[1]]) ** 2).sum() / 2)


def simulated(name, config=CONFIG, cluster=ALIKE):
    config = config.replace(method=SCHEDULES[name].method)
    log = event_log(SCHEDULES[name], config, cluster, np.zeros(2, np.float32))
    return log, train_on(log, SCHEDULES[name], config, Quadratics())


@pytest.mark.parametrize("name", ["lsgd", "lsgd-joined"])
@pytest.mark.parametrize("groups", [1, 2])
def test_at_equal_speeds_it_is_the_algorithm_in_step(name, groups):
    config = CONFIG.replace(groups=groups, workers=4 // groups, pull=0.3)
    if groups > 1:
        config = config.replace(global_pull=0.2)

    def of(function):
        return lambda x, step, worker: function(x, step, divmod(worker[0] * config.workers + worker[1], 2))

    expected = oracle.lsgd(
        np.tile([2.0, -1.0], (groups, config.workers, 1)),
        of(gradient),
        of(loss),
        steps=12,
        eta=ETA,
        pull=lambda step, worker: 0.3,
        period=3,
        global_pull=(lambda step, worker: 0.2) if groups > 1 else None,
        global_period=6,
        window=2,
    )
    _, history = simulated(name, config)
    x = np.array([state.params for state in history.states])
    np.testing.assert_allclose(x, expected.x[-1].reshape(4, 2), rtol=1e-5, atol=1e-6)
    leaders = [leader for event, leader in history.leaders if event.level == len(expected.global_leaders) // 2]
    if groups > 1:
        assert leaders == expected.global_leaders
    else:
        assert leaders == [leader for [leader] in expected.local_leaders]


PEERS = {
    "local_sgd": {},
    "data_parallel": {},
    "diloco": {"outer_learning_rate": 0.7, "outer_momentum": 0.9},
    "quorum": {"kappa": 1.5, "pull": 0.9, "outer_learning_rate": 0.8, "outer_momentum": 0.3, "window": 2},
}


@pytest.mark.parametrize("name", PEERS)
def test_peers_in_step(name):
    config = CONFIG.replace(method=name, groups=1, workers=4, **PEERS[name])
    trajectory, _ = oracle.peer(
        name,
        [[np.array([2.0, -1.0])] for _ in range(4)],
        lambda x, step, worker: [gradient(x[0], step, divmod(worker, 2))],
        lambda x, step, worker: loss(x[0], step, divmod(worker, 2)),
        steps=12,
        eta=ETA,
        momentum=0.0,
        period=3,
        **PEERS[name],
    )
    _, history = simulated(name, config)
    x = np.array([state.params for state in history.states])
    np.testing.assert_allclose(x, np.array(trajectory[-1])[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["easgd", "downpour", "lsgd-posted"])
def test_methods_with_a_server_event_by_event(name):
    """The log gone through once more in NumPy."""
    config = CONFIG.replace(groups=1, workers=4, pull=0.3 if name == "lsgd-posted" else 0.1)
    log, history = simulated(name, config, Cluster(slow=((1, 2.5),), variation="lognormal"))
    start = np.array([2.0, -1.0])
    x, center, last_center = [start.copy() for _ in range(4)], start.copy(), [start.copy() for _ in range(4)]
    losses, board = [[] for _ in range(4)], [(np.inf, start)] * 4
    exchanges, leaders = 0, []
    for event in log.events:
        i = event.workers[0]
        if event.kind == "step":
            losses[i] = [*losses[i], loss(x[i], 0, divmod(i, 2))][-2:]
            x[i] = x[i] - ETA * gradient(x[i], 0, divmod(i, 2))
            continue
        exchanges += 1
        if name == "easgd":
            x[i], center = x[i] - 0.1 * (x[i] - center), center + 0.1 * (x[i] - center)
        elif name == "downpour":
            center = center + x[i] - last_center[i]
            x[i] = last_center[i] = center
        else:
            board[i] = (np.mean(losses[i]), x[i])
            best = min(range(4), key=lambda j: board[j][0])
            leaders.append(best)
            x[i] = x[i] - 0.3 * (x[i] - board[best][1])
    assert exchanges > 8
    np.testing.assert_allclose(np.array([s.params for s in history.states]), x, rtol=1e-4, atol=1e-5)
    assert [leader for _, leader in history.leaders] == leaders


@functools.cache
def network():
    return Network(CONFIG)


@pytest.mark.parametrize("name", ["lsgd", "quorum", "data_parallel"])
def test_a_network_as_lsgd_train_trains_it(name, tmp_path):
    config = CONFIG.replace(method=SCHEDULES[name].method)
    train_and_evaluate(config, tmp_path / "run", lines=False)
    [_, last] = read_metrics(tmp_path / "run", "evaluation")
    log = event_log(SCHEDULES[name], config, Cluster(), np.zeros(2))
    history = train_on(log, SCHEDULES[name], config, network())
    assert history.steps[-1] == 12
    np.testing.assert_allclose(history.center[-1], last["center_error"], atol=0.011)  # 4 of 360 images.
    np.testing.assert_allclose(history.worker_values[-1], np.ravel(last["worker_errors"]), atol=0.011)


@pytest.mark.parametrize("name", SCHEDULES)
def test_workers_may_go_and_come(name):
    absences = ((1, 0.25, 0.9), (3, 0.0, 0.4), (0, 0.7, float("inf")))
    log, history = simulated(name, cluster=Cluster(absences=absences))
    again = simulated(name, cluster=Cluster(absences=absences))
    assert again[0] == log
    np.testing.assert_array_equal(again[1].center, history.center)
    assert np.isfinite(history.center).all()
    assert np.isnan(history.worker_values[-1][0])
    assert history.steps[-1] >= 12


def test_options_that_are_not_simulated():
    with pytest.raises(UsageError, match="without wire"):
        simulated("lsgd", dataclasses.replace(CONFIG, wire="int8"))
    with pytest.raises(UsageError, match="without revive"):
        simulated("lsgd", dataclasses.replace(CONFIG, revive="from_leader"))
    with pytest.raises(UsageError, match="equal learning_rates"):
        Network(dataclasses.replace(CONFIG, learning_rates="linear"))
