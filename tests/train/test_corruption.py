"""Corrupted workers for experiments, elections on a batch that all see, and the model that is evaluated."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lsgd_jax.distributed import SHARED
from lsgd_jax.errors import UsageError
from lsgd_jax.leader import leader_pull
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Language
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import corruption, train_and_evaluate
from lsgd_jax.train.corruption import with_stale_gradients
from lsgd_jax.train.evaluated_model import evaluated_model, method_state, with_tail
from lsgd_jax.train.setup import make_feed, prepare, program_of, rounds, step_key, steps_per_call
from lsgd_jax.train.step import init_state
from lsgd_jax.trained import load_trained

BASE = PRESETS["digits"].replace(method="independent", groups=1, workers=4, steps=4, eval_every=4, width=0.1)


def trained(config):
    """The params of all workers [worker, ...] after the first program, and its metrics."""
    placement, feed, model, optimizer = prepare(config)
    program = program_of(config, model, optimizer, placement, feed)
    batch = next(rounds(feed, placement, config.steps, steps_per_call(config)))
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    state, metrics = program(state, shared, batch, np.int32(0), np.float32(1), step_key(config.seed))
    return [np.asarray(x)[0] for x in jax.tree.leaves(state.params)], jax.device_get(metrics)


@pytest.fixture(scope="module")
def clean():
    return trained(BASE)[0]


@pytest.mark.parametrize("kind", ["labels", "gradient-noise", "stale", "skewed-shard"])
def test_the_last_workers_are_corrupted_and_the_others_the_same_to_the_bit(kind, clean):
    found, _ = trained(BASE.replace(corrupt_workers=1, corruption=kind))
    for x, y in zip(found, clean, strict=True):
        np.testing.assert_array_equal(x[:3], y[:3])
    assert any((x[3] != y[3]).any() for x, y in zip(found, clean, strict=True))


def test_gradients_are_corrupted_before_they_are_averaged():
    found, _ = trained(BASE.replace(method="data_parallel", corrupt_workers=1, corruption="gradient-noise"))
    expected, _ = trained(BASE.replace(method="data_parallel"))
    assert all((x != y).any() for x, y in zip(found, expected, strict=True))
    for x in found:
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))


def test_a_stale_gradient_is_taken_for_sixteen_steps():
    tx = with_stale_gradients(1, optax.with_extra_args_support(optax.sgd(1.0)), "worker")

    @jax.jit
    @partial(jax.vmap, axis_name="worker", in_axes=(0, 0, 0, None))
    def update(gradient, state, x, step):
        return tx.update(gradient, state, x, step=step)

    x, taken = jnp.zeros(3), []
    state = jax.jit(jax.vmap(tx.init))(x)
    for step in range(18):
        updates, state = update(jnp.full(3, float(step)), state, x, jnp.asarray(step))
        taken.append(-updates)
    np.testing.assert_array_equal(np.array(taken)[:, 0], np.arange(18))
    np.testing.assert_array_equal(np.array(taken)[:, 2], [0] * 16 + [16] * 2)


def test_noise_is_five_times_as_large_as_a_gradient():
    gradients = {"a": jnp.full((100, 100), 2.0), "b": jnp.zeros((0, 3))}
    noisy = corruption._noisy(gradients, jax.random.key(0))
    np.testing.assert_allclose(jnp.std(noisy["a"] - gradients["a"]), 10.0, rtol=0.05)
    assert noisy["b"].shape == (0, 3)


def test_nobody_trains_on_what_is_held_out_for_elections():
    held_out = {"method": "lsgd", "elect_by": "held_out_batch", "election_examples": 256}
    feed = make_feed(BASE.replace(corrupt_workers=2, corruption="skewed-shard", **held_out))
    seen = {int(i) for batch in feed.batches(0, 60) for i in np.ravel(batch)}
    assert max(seen) < len(feed.shared[1]) - 256


def test_what_is_held_out_for_tuning_is_sound(tmp_path):
    """With steps too small to change anything, all targets are wrong in training and none in the evaluation."""
    found = []
    for corrupted in (0, 4):
        config = BASE.replace(validation=0.2, learning_rate=1e-30, corrupt_workers=corrupted)
        train_and_evaluate(config, tmp_path / str(corrupted), lines=False)
        found.append(read_metrics(tmp_path / str(corrupted), "evaluation")[-1])
    assert found[0]["center_loss"] == found[1]["center_loss"]
    assert found[0]["train_losses"] != found[1]["train_losses"]


def test_a_skewed_shard_is_a_fifth_of_the_labels():
    config = BASE.replace(corrupt_workers=2, corruption="skewed-shard")
    feed, labels = make_feed(config), BASE.task.data().train[1]
    seen = np.concatenate([labels[batch] for batch in feed.batches(0, 40)], axis=1)
    assert [len(np.unique(of_worker)) for of_worker in seen[:2]] == [10, 10]
    assert set(seen[2]) <= {0, 1, 2}
    assert set(seen[3]) <= {1, 2, 3, 4}
    again = np.concatenate(list(make_feed(config).batches(0, 40)), axis=1)
    np.testing.assert_array_equal(labels[again], seen)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corrupt_workers": 5}, r"corrupt_workers must be in \[0, 4\], among all workers, got 5"),
        ({"corruption": "stale"}, "corruption has no effect without corrupt_workers"),
        (
            {"task": Language(), "corrupt_workers": 1},
            "corruption must be another for Language, which has no random targets, got labels",
        ),
        ({"elect_by": "common_batch"}, "elect_by has no effect unless workers elect leaders in step"),
        ({"method": "lsgd", "election_examples": 8}, "election_examples has no effect unless elect_by is a batch"),
        ({"evaluated_model": "center"}, "evaluated_model must be leader for independent, got center"),
        (
            {"method": "lsgd", "evaluated_model": "center"},
            "evaluated_model must be mean or leader or tail_mean for lsgd",
        ),
        ({"method": "lsgd", "tail_share": 0.2}, "tail_share has no effect unless evaluated_model is tail_mean"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(BASE, **changed)


def test_what_does_not_fit_the_data_is_one_sentence():
    with pytest.raises(UsageError, match=r"^election_examples must be less than the 1437 of the training"):
        make_feed(BASE.replace(method="lsgd", elect_by="held_out_batch", election_examples=1437))
    regression = dataclasses.replace(PRESETS["diabetes"], corrupt_workers=1, corruption="skewed-shard")
    with pytest.raises(UsageError, match=r"^skewed-shard needs examples in memory with one whole number each"):
        make_feed(regression)


def test_leaders_are_elected_by_the_loss_of_what_they_would_send():
    tx = optax.chain(optax.sgd(1.0), leader_pull(0.5, axis_name="worker", period=2, window=1))
    x = jnp.array([4.0, 1.0, -2.0])

    @jax.jit
    @partial(jax.vmap, axis_name="worker", in_axes=(0, 0, 0, None))
    def step(x, state, loss, number):
        updates, state = tx.update(jnp.ones(()), state, x, value=loss, step=number, common_loss=lambda x: (x - 2) ** 2)
        return x + updates, state

    state = jax.jit(jax.vmap(tx.init))(x)
    for number in range(2):
        x, state = step(x, state, jnp.array([3.0, 2.0, 1.0]), jnp.asarray(number))
    np.testing.assert_array_equal(state[1].leader.position, [0, 0, 0])  # At 2, after its step.
    np.testing.assert_array_equal(x, [2.0, 0.5, -1.0])


def test_a_run_has_all_of_it_at_once(tmp_path):
    """With workers of two chips, whose evaluated model is read back from the checkpoint."""
    config = BASE.replace(
        method="quorum",
        workers=2,
        chips_per_worker=2,
        elect_by="common_batch",
        evaluated_model="tail_mean",
        corrupt_workers=1,
        corruption="stale",
        learning_rates="ladder",
    )
    error = train_and_evaluate(config, tmp_path / "run", lines=False)
    network, (x, labels) = load_trained(tmp_path / "run").center, config.task.data().test
    np.testing.assert_allclose((network(jnp.asarray(x)).argmax(-1) != labels).mean(), error, atol=0.006)


@pytest.mark.parametrize("kind", ["common_batch", "held_out_batch"])
def test_an_election_is_by_the_loss_on_one_batch(kind):
    """Of the workers as they are after the steps, which a period of its own elects without a pull."""
    config = BASE.replace(method="lsgd", period=4, pull=0.0, elect_by=kind, election_examples=64)
    params, metrics = trained(config)
    feed, model = make_feed(config), prepare(config).model
    if kind == "held_out_batch":
        indices = np.arange(1437 - 64, 1437)
        batches = np.concatenate([batch.ravel() for batch in feed.batches(0, 60)])
        assert batches.max() < 1437 - 64 < len(np.unique(batches)) + 64
    else:
        common_key = jax.random.fold_in(step_key(config.seed), 2**32 - 1)
        indices = jax.random.randint(jax.random.fold_in(common_key, 3), (64,), 0, 1437)
    examples = feed.training(jax.tree.map(jnp.asarray, feed.shared), jnp.asarray(indices))
    graphdef, start = nnx.split(model)
    structure = jax.tree.structure(start)

    @jax.jit
    def loss_of(params):
        network = nnx.merge(graphdef, jax.tree.unflatten(structure, params))
        return config.task.measures(network, examples)["loss"].mean()

    losses = [loss_of([x[i] for x in params]) for i in range(4)]
    assert np.unique(metrics.leaders.positions).tolist() == [np.argmin(losses)]
    assert np.ptp(losses) > 0


MODELS = [("lsgd", "mean"), ("lsgd", "leader"), ("lsgd", "tail_mean"), ("quorum", "center"), ("quorum", "mean")]
MODELS += [(name, "tail_mean") for name in ("quorum", "diloco", "data_parallel")]


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_the_evaluated_model_is_the_one_that_is_asked_for(name, kind):
    """Of 10 steps with exchanges at 2, 4, ..., the last half has three."""
    options = {} if name == "data_parallel" else {"period": 2}
    config = dataclasses.replace(PRESETS["digits"], method=name, groups=1, workers=3, steps=10, **options)
    config = config.replace(evaluated_model=kind, **({"tail_share": 0.5} if kind == "tail_mean" else {}))
    method = METHODS[name]
    tx = method.build(optax.sgd(0.1), axis_name="worker", **options)
    if kind == "tail_mean":  # There may be more around the method.
        tx = with_stale_gradients(0, with_tail(config, tx, "worker"), "worker")
    report = evaluated_model(config)
    rng = np.random.default_rng(0)
    noise, losses = rng.normal(size=(10, 3, 2)).astype(np.float32), rng.normal(size=(10, 3)).astype(np.float32)

    @jax.jit
    @partial(jax.vmap, axis_name="worker", in_axes=(0, 0, 0, 0, None))
    def step(x, state, noise, loss, number):
        updates, state = tx.update(x + noise, state, x, value=loss, step=number)
        x = x + updates
        return x, state, report(x, state, "worker"), method.center(x, method_state(state), "worker")

    x = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    state, own = jax.jit(jax.vmap(tx.init))(x), []
    for number in range(10):
        x, state, found, center = step(x, state, noise[number], losses[number], jnp.asarray(number))
        own.append(center[0])
    of_tail = np.mean([own[i] for i in (range(5, 10) if name == "data_parallel" else (5, 7, 9))], axis=0)
    expected = {"mean": x.mean(0), "leader": x[np.argmin(losses.mean(0))], "center": own[-1], "tail_mean": of_tail}
    np.testing.assert_allclose(found, np.broadcast_to(expected[kind], (3, 2)), rtol=1e-5, atol=1e-6)


def test_the_tail_mean_of_16_bits_is_not_rounded_away():
    """Of parameters that are 1 for half of the exchanges, and then 1.5: each moves the mean by 1/512 at most."""
    config = dataclasses.replace(PRESETS["digits"], method="data_parallel", groups=1, workers=2, steps=512)
    config = config.replace(evaluated_model="tail_mean", tail_share=1.0)
    tx = with_tail(config, METHODS["data_parallel"].build(optax.sgd(1.0), axis_name="worker"), "worker")

    @jax.jit
    @partial(jax.vmap, axis_name="worker")
    def last_tail_mean(x):
        def step(carry, number):
            x, state = carry
            gradient = jnp.where(number == 256, -0.5, 0.0).astype(x.dtype)
            updates, state = tx.update(gradient, state, x, value=jnp.float32(0), step=number)
            return (optax.apply_updates(x, updates), state), None

        (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), jnp.arange(512))
        return x, evaluated_model(config)(x, state, "worker")

    x, found = last_tail_mean(jnp.ones(2, jnp.bfloat16))
    assert (x.tolist(), found.tolist(), found.dtype) == ([1.5, 1.5], [1.25, 1.25], jnp.bfloat16)
