"""Workers' own optimizers beside optax's, and their learning-rate schedules."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from lsgd_jax import train
from lsgd_jax.errors import UsageError
from lsgd_jax.models.transformer import Transformer
from lsgd_jax.optimizers import local_optimizer, matrices
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train.learning_rates import learning_rate_factor

DIGITS = PRESETS["digits"]


def factors(steps=40, **options):
    config = dataclasses.replace(DIGITS, steps=steps, eval_every=steps, **options)
    return learning_rate_factor(config, np.arange(steps), 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, lambda t: 1),
        ({"learning_rate_warmup": 0.25}, lambda t: min(1, t / 10)),
        ({"learning_rate_schedule": "cosine"}, lambda t: (1 + math.cos(math.pi * t / 40)) / 2),
        (
            {"learning_rate_schedule": "cosine", "learning_rate_warmup": 0.25},
            lambda t: t / 10 if t < 10 else (1 + math.cos(math.pi * (t - 10) / 30)) / 2,
        ),
        (
            {"learning_rate_warmup": 0.1, "learning_rate_decay": 0.5},
            lambda t: t / 4 if t < 4 else min(1, (40 - t) / 20),
        ),
        (
            {"learning_rate_warmup": 0.1, "learning_rate_drops": (0.5, 0.75)},
            lambda t: min(1, t / 4) * 0.1 ** ((t >= 20) + (t >= 30)),
        ),
    ],
)
def test_schedules_have_their_closed_forms(options, factor):
    np.testing.assert_allclose(factors(**options), [factor(t) for t in range(40)], rtol=1e-5, atol=1e-7)


def test_after_the_last_step_the_rate_is_the_last():
    """The simulator's clock can pass it."""
    config = dataclasses.replace(DIGITS, steps=40, learning_rate_schedule="cosine")
    assert learning_rate_factor(config, 40, 0.0, 0.0) == learning_rate_factor(config, 39, 0.0, 0.0) > 0


def test_a_run_takes_each_step_at_its_own_rate(tmp_path):
    """Also steps of one compiled program."""
    scheduled = DIGITS.replace(groups=1, steps=8, learning_rate_warmup=0.5, learning_rate_schedule="cosine")
    runs = {every: tmp_path / f"{every}" for every in (1, 8)}  # Programs of one step, and of a period.
    for every, path in runs.items():
        train.train_and_evaluate(scheduled.replace(eval_every=every), path)
    one_by_one, together = (read_metrics(path, "evaluation") for path in runs.values())
    np.testing.assert_allclose(together[-1]["center_loss"], one_by_one[-1]["center_loss"], rtol=1e-4)
    assert together[-1]["center_loss"] < 0.99 * one_by_one[0]["center_loss"]
    logged = [entry["learning_rate_factor"] for entry in one_by_one]
    np.testing.assert_allclose(
        logged, [0, 1 / 4, 1 / 2, 3 / 4, *(0.5 + 0.5 * np.cos(np.pi * np.arange(4) / 4))], atol=1e-6
    )


GRADIENTS = [np.array([3.0, -4.0, 0.5], np.float32) * scale for scale in (1, 0.1, -2)]


def trajectory(optimizer):
    x = jnp.array([1.0, 2.0, -1.0])
    state, points = optimizer.init(x), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        points.append(x)
    return np.stack(points)


def test_adamw_has_its_equations_with_these_betas():
    config = dataclasses.replace(DIGITS, local_optimizer="adamw", adam_b1=0.5, adam_b2=0.7, weight_decay=0.2)
    x, m, v, expected = np.array([1.0, 2.0, -1.0]), 0, 0, []
    for t, g in enumerate(np.float64(GRADIENTS), 1):
        m, v = 0.5 * m + 0.5 * g, 0.7 * v + 0.3 * g**2
        x = x - 0.1 * (m / (1 - 0.5**t) / (np.sqrt(v / (1 - 0.7**t)) + 1e-8) + 0.2 * x)
        expected.append(x)
    np.testing.assert_allclose(trajectory(local_optimizer(config)), expected, rtol=1e-5)


def test_gradients_are_scaled_down_to_the_norm():
    plain = dataclasses.replace(DIGITS, momentum=0.0, weight_decay=0.0)
    clipped = trajectory(local_optimizer(dataclasses.replace(plain, clip_norm=2.0)))
    x, expected = np.array([1.0, 2.0, -1.0]), []
    for g in GRADIENTS:
        x = x - 0.1 * g * min(1, 2 / np.linalg.norm(g))
        expected.append(x)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw():
    config = dataclasses.replace(DIGITS, local_optimizer="muon", weight_decay=0.0)
    optimizer = local_optimizer(config)
    model = nnx.eval_shape(lambda: Transformer(8, width=8, depth=2, heads=2, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), nnx.state(model, nnx.Param)) for _ in range(2)
    )
    updates, _ = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))(grads, params)
    moved = nnx.to_pure_dict(updates)
    for value in np.asarray(moved["blocks"]["qkv"]).reshape(2, 8, 3, 8).swapaxes(1, 2).reshape(-1, 8, 8):
        # All singular values are near that of an orthogonal matrix whose entries have the root mean square 0.2.
        singular = np.linalg.svd(value, compute_uv=False)
        assert (abs(singular / (0.1 * 0.2 * 8**0.5) - 1) < 0.4).all()
    for value in (moved["embedding"], moved["final_gain"], moved["blocks"]["attention_gain"]):
        np.testing.assert_allclose(np.abs(value), 0.1 * (1 + 0.09 / 0.19), rtol=1e-3)  # Adam's first, with Nesterov's.


def test_matrices_are_what_the_network_says_or_has_two_axes():
    model = nnx.eval_shape(lambda: Transformer(8, width=8, depth=2, heads=2, rngs=nnx.Rngs(0)))
    found = matrices(nnx.state(model, nnx.Param))
    assert found["blocks"]["down"] == MuonDimensionNumbers(1, 2)
    assert found["embedding"] is found["blocks"]["attention_gain"] is None
    plain = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "convolution": jnp.ones((3, 3, 2, 2))}
    assert matrices(plain) == {"kernel": MuonDimensionNumbers(), "bias": None, "convolution": None}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_trains_with_it(optimizer, tmp_path):
    config = DIGITS.replace(
        local_optimizer=optimizer, clip_norm=1.0, learning_rate=0.01, steps=32, eval_every=32, learning_rate_warmup=0.1
    )
    assert train.train_and_evaluate(config, tmp_path / "run") < 0.3


@pytest.mark.parametrize("changed", [{"learning_rate_warmup": 0.1}, {"learning_rates": "ladder"}])
def test_steps_may_not_change_where_the_rate_depends_on_them(changed, tmp_path):
    config = dataclasses.replace(DIGITS, **changed)
    RunFolder(tmp_path / "run", config).__exit__(None)
    with pytest.raises(
        UsageError, match=r"resumed with another steps, on which its learning rate depends: 400, not 300"
    ):
        RunFolder(tmp_path / "run", dataclasses.replace(config, steps=400), resume=True)
