"""The ladder: workers that try multiples of their leader's learning rate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsgd_jax import train
from lsgd_jax.distributed import place
from lsgd_jax.link import parts
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train.learning_rates import Ladder, scale_by_rate_factor, with_ladder
from lsgd_jax.train.setup import make_optimizer
from tests.mapping import GROUPS, WORKERS, over_workers

AXES = ("group", "worker")
STEPS, SPREAD = 28, 8
"""All steps, and the first ones, in which rates differ by worker."""
RUNGS = 4.0 ** (np.array([0, 1, 2, 3, 4, -3, -2, -1]) / 4)
"""Of eight workers, of whom the first one leads."""
DIGITS = PRESETS["digits"].replace(steps=STEPS, eval_every=STEPS, learning_rates="ladder")


# Exchanges of all workers come every fourth step among groups with leaders of their own, and every second without.
WAYS = {
    "lsgd": ({"period": 2, "global_period": 4, "global_pull": 0.0}, ("group",), 4),
    "quorum": ({"groups": 1, "workers": GROUPS * WORKERS, "period": 2}, (), 2),
}


@pytest.mark.parametrize(("name", "mapping"), [("lsgd", "vmap"), ("lsgd", "shard_map"), ("quorum", "slots")])
def test_rates_are_those_of_a_numpy_oracle(name, mapping):
    """Without a pull, workers move by their own steps alone."""
    options, groups, every = WAYS[name]
    config = DIGITS.replace(method=name, pull=0.0, window=1, **options)
    own = optax.chain(optax.sgd(1.0), scale_by_rate_factor())
    method = METHODS[name].built(own, config.method_options, groups=groups, workers=AXES[len(groups) :])
    tx = with_ladder(config, method, AXES)

    losses = np.random.default_rng(1).normal(size=(GROUPS, WORKERS, STEPS)).astype(np.float32)
    losses[1, 0, 3] = np.nan
    losses[:, :, 5] = np.inf  # Nobody can lead.
    scheduled = np.linspace(1, 0.5, STEPS, dtype=np.float32)

    def path(losses):
        def step(carry, now):
            x, state = carry
            number, loss, rate_factor = now
            updates, state = tx.update(jnp.ones_like(x), state, x, value=loss, step=number, rate_factor=rate_factor)
            return (x + updates, state), (-updates, parts(Ladder, state)[0].factor)

        x = jnp.zeros_like(losses[0])
        return jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(STEPS), losses, scheduled))[1]

    rates, of_leader = over_workers(path, mapping)(losses)
    factors, led = RUNGS, []
    for t in range(STEPS):
        np.testing.assert_allclose(np.ravel(rates[:, :, t]), scheduled[t] * factors, rtol=1e-5)
        score = np.ravel(losses[:, :, t])
        if t < SPREAD and (t + 1) % every == 0 and np.isfinite(score).any():
            led.append(np.nanargmin(score))
            factors = factors[led[-1]] * np.roll(RUNGS, led[-1])
        factor = factors[led[-1]] if led else 1.0
        if t + 1 == SPREAD:
            factors = np.full(8, factor)
        np.testing.assert_allclose(of_leader[:, :, t], np.full((GROUPS, WORKERS), factor), rtol=1e-5)
    assert len(set(led)) == len(led) == (2 if name == "lsgd" else 3)


@pytest.mark.optimized
def test_one_worker_has_its_rate_to_the_bit():
    gradients = np.random.default_rng(0).normal(size=(1, 1, STEPS, 3)).astype(np.float32)
    placement = place(1, 1)

    def path_of(config):
        tx = make_optimizer(config, placement)

        def path(gradients):
            def step(carry, now):
                (x, state), (number, gradient) = carry, now
                updates, state = tx.update(gradient, state, x, value=x.sum(), step=number, rate_factor=jnp.float32(0.3))
                x = x + updates
                return (x, state), x

            x = jnp.ones(3)
            return jax.lax.scan(step, (x, tx.init(x)), (jnp.arange(STEPS), gradients))[1]

        for axis in reversed(placement.axes):
            path = jax.vmap(path, axis_name=axis)
        return jax.jit(path)(gradients)

    config = DIGITS.replace(groups=1, workers=1)
    np.testing.assert_array_equal(path_of(config), path_of(config.replace(learning_rates="equal")))


def test_a_run_records_the_rate_that_its_leaders_have_found(tmp_path):
    """Each leader in the first 12 of 40 steps multiplies it by the rung on which it stood."""
    config = DIGITS.replace(width=0.1, steps=40, eval_every=8, global_period=4)
    train.train_and_evaluate(config, tmp_path / "run", lines=False)
    exchanges, evaluations = (read_metrics(tmp_path / "run", event) for event in ("exchange", "evaluation"))
    for evaluation in evaluations:
        led = [event["leader"] for event in exchanges if event["step"] <= min(evaluation["step"], 12)]
        rungs = [RUNGS[leader - before] for before, leader in itertools.pairwise([0, *led])]
        np.testing.assert_allclose(evaluation["learning_rate_factor"], np.prod(rungs), rtol=1e-5)
    assert evaluations[-1]["learning_rate_factor"] != 1
