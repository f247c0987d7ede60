"""The training loop on the smoke preset, over eight simulated devices."""

import dataclasses
import functools
import json
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from lsgd_jax import train
from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, Data, feed_of, load
from lsgd_jax.distributed import SHARED, Placement, place
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import run as run_figure
from lsgd_jax.methods import METHODS, mean_of_workers
from lsgd_jax.models.layers import Conv
from lsgd_jax.presets import PRESETS
from lsgd_jax.tasks import Classification
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train import learning_rates, setup
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.step import init_state, local_steps
from tests.mapping import need_devices, over_workers

SMOKE = dataclasses.replace(PRESETS["digits"], steps=60, eval_every=20)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "smoke"
    train.train_and_evaluate(SMOKE, path)
    return path


def test_it_learns(smoke_run):
    evaluations = read_metrics(smoke_run, "evaluation")
    assert [entry["step"] for entry in evaluations] == [20, 40, 60]
    assert evaluations[-1]["center_error"] < 0.1
    assert np.shape(evaluations[-1]["worker_errors"]) == (2, 4)


def test_the_folder_tells_what_was_run(smoke_run):
    assert Config.load(smoke_run) == SMOKE
    environment = json.loads((smoke_run / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    exchanges = read_metrics(smoke_run, "exchange")
    assert [entry["step"] for entry in exchanges] == list(range(4, 61, 4))
    assert [entry["step"] for entry in exchanges if "leader" in entry] == [16, 32, 48]
    for entry in exchanges:
        assert all(0 <= leader < 4 for leader in entry["local_leaders"])
        if "leader" in entry:  # The global leader leads its group and has the lowest score.
            group, position = divmod(entry["leader"], 4)
            assert entry["local_leaders"][group] == position
            assert np.argmin(entry["scores"]) == entry["leader"]
            assert entry["distances"][group][position] == 0


def test_the_picture_is_drawn_from_the_folder(smoke_run):
    assert run_figure.draw(smoke_run).read_bytes().startswith(b"\x89PNG")


def test_the_same_configuration_gives_the_same_metrics_to_the_bit(smoke_run, tmp_path):
    train.train_and_evaluate(SMOKE, tmp_path / "again")

    def without_time(path):
        return [
            {key: value for key, value in entry.items() if key != "seconds"}
            for event in ("exchange", "evaluation")
            for entry in read_metrics(path, event)
        ]

    assert without_time(smoke_run) == without_time(tmp_path / "again")


def test_one_group_of_four_logs_one_leader_an_exchange(tmp_path):
    train.train_and_evaluate(dataclasses.replace(SMOKE, groups=1, steps=8), tmp_path / "run")
    exchanges = read_metrics(tmp_path / "run", "exchange")
    assert ["leader" in entry for entry in exchanges] == [True, True]
    assert "local_leaders" not in exchanges[0]


def states_after(config, steps, *, at_once=1, placement=None):
    """The state and metrics after some steps, taken so many at once."""
    prepared = setup.prepare(config)
    placement = placement or prepared.placement
    optimizer = setup.make_optimizer(config, placement)
    program = local_steps(config.task, prepared.model, optimizer, placement, prepared.feed)
    state, shared = init_state(prepared.model, optimizer, placement), placement.put(prepared.feed.shared, SHARED)
    batches = setup.rounds(prepared.feed, placement, steps, at_once)
    for first in range(0, steps, at_once):
        arguments = state, shared, next(batches), np.int32(first), np.float32(1), setup.step_key(config.seed)
        state, metrics = jax.block_until_ready(program(*arguments))
    return state, metrics


def test_a_compiled_round_takes_the_same_steps_one_by_one():
    config = dataclasses.replace(SMOKE, period=2, global_period=4)
    results = [states_after(config, 8, at_once=at_once) for at_once in (1, 4)]
    results = [(state.params, metrics.leaders) for state, metrics in results]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), *results)


class Dropping(nnx.Module):
    """A convolution and a dense layer, with dropout between them."""

    def __init__(self, rngs):
        self.convolution = Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        x = jax.nn.relu(self.convolution(x)).reshape(len(x), -1)
        return self.out(self.dropout(x, rngs=rngs))


@dataclasses.dataclass(frozen=True)
class WithDropout(Classification):
    def network(self, rngs):
        return Dropping(rngs)


@functools.cache
def params_and_metrics(method, shape):
    """After a few steps with dropout, whose keys are the workers' own, on a mesh of this shape."""
    config = SMOKE.replace(task=WithDropout("digits"), batch_size=2, period=2, global_period=4).replace(method=method)
    need_devices(math.prod(shape))
    mesh = jax.make_mesh(shape, ("group", "worker"), axis_types=(AxisType.Auto,) * 2)
    state, metrics = states_after(config, 4, placement=Placement(mesh, (2 // shape[0], 4 // shape[1])))
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(("shape", "method"), [((2, 2), "lsgd"), ((1, 4), "lsgd"), ((1, 1), "lsgd"), ((2, 1), "easgd")])
def test_workers_in_slots_do_what_workers_on_their_own_devices_do(shape, method):
    results = params_and_metrics(method, (2, 4)), params_and_metrics(method, shape)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), *results)


def test_what_is_told_to_all_processes_is_small():
    """Only leaders' parameters travel, in two broadcasts, and once the metrics, which every process gets."""
    need_devices(8)
    config, (placement, feed, model, optimizer) = SMOKE, setup.prepare(SMOKE)
    batch = next(setup.rounds(feed, placement, 4, 4))
    arguments = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED), batch
    program = local_steps(config.task, model, optimizer, placement, feed)
    text = program.lower(*arguments, np.int32(0), np.float32(1), setup.step_key(0)).compile().as_text()
    # The result's shapes, such as f32[2,4] or (u32[64], u32[64,64]), stand before the collective's name.
    found = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    sizes = [
        (name, sum(np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[([\d,]*)\]", shapes)))
        for shapes, name in found
    ]
    parameters = sum(x.size for x in jax.tree.leaves(arguments[0].params)) / 8
    assert sorted(size for name, size in sizes if name == "all-reduce" and size > 1) == [parameters] * 2
    of_metrics = [size for name, size in sizes if name == "all-gather"]  # Bytes, over one axis of the mesh each.
    assert len(of_metrics) == 2
    assert max(of_metrics) <= 8 * 32
    assert {name for name, size in sizes} == {"all-reduce", "all-gather"}


def test_a_feed_of_some_workers_gives_them_what_a_feed_of_all_does():
    for rows in ([0], [2, 5]):
        some, everyone = (setup.make_feed(SMOKE, rows=rows).batches(3, 5) for rows in (rows, None))
        for batch, expected in zip(some, everyone, strict=True):
            np.testing.assert_array_equal(batch, expected[rows])


@pytest.mark.parametrize("policy", ["own", "mean", "leader", "reestimate"])
def test_evaluation_counts_as_a_plain_loop_does(policy):
    placement, feed, model, optimizer = setup.prepare(SMOKE)
    few = load("digits")
    few = few._replace(test_x=few.test_x[:101], test_y=few.test_y[:101])  # Not a multiple of the workers.
    data = Data((few.train_x, few.train_y), (few.test_x, few.test_y))
    feed = feed_of(data, BatchIndices(examples=1437, workers=8, batch_size=16, sampling="shards", seed=0), range(8))
    state = init_state(model, optimizer, placement)
    logits = np.asarray(model(few.test_x))
    wrong = np.mean(logits.argmax(-1) != few.test_y)
    evaluate = evaluation(
        SMOKE.task,
        model,
        mean_of_workers,
        placement,
        feed,
        batch_statistics=policy,
        statistics_batches=2,
        key=jax.random.key(0),
    )
    result = evaluate(state, placement.put(feed.shared, SHARED))
    np.testing.assert_allclose(result.center["error"], wrong, rtol=1e-6)
    np.testing.assert_allclose(result.workers, np.full((2, 4), wrong), rtol=1e-6)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.center["loss"], -log_probabilities[np.arange(101), few.test_y].mean(), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != SMOKE.method])
def test_every_other_method_learns(name, tmp_path):
    config = dataclasses.replace(SMOKE, method=name, learning_rate=0.002 if name == "downpour" else 0.1)
    assert train.train_and_evaluate(config, tmp_path / "run") < 0.3
    if name == "local_sgd":  # Its figure is that of all without leaders.
        assert run_figure.draw(tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"local_optimizer": "adamw", "learning_rate": 0.01},
        {"local_optimizer": "lars", "learning_rate": 2.0},
        {"learning_rates": "linear", "learning_rate": 0.02},
        {"batch": "global", "batch_size": 128},
    ],
)
def test_other_optimisers_rates_and_batches_learn(changed, tmp_path):
    assert train.train_and_evaluate(dataclasses.replace(SMOKE, **changed), tmp_path / "run") < 0.3


def test_what_diverged_is_wrong_on_every_example_and_null_in_the_metrics(tmp_path):
    config = dataclasses.replace(SMOKE, learning_rate=1e30)
    assert train.train_and_evaluate(config, tmp_path / "run", stop_if_all_fail=False) == 1.0
    assert read_metrics(tmp_path / "run", "evaluation")[-1]["center_loss"] is None
    assert run_figure.draw(tmp_path / "run").exists()


def test_a_model_that_is_not_for_the_data_is_one_sentence():
    config = SMOKE.replace(model="conv1d")
    with pytest.raises(UsageError, match=r"conv1d is not for the data set digits, .* \(8, 8, 1\): use mlp"):
        setup.make_model(config)


def test_the_center_leaves_out_workers_that_are_not_finite():
    x = np.arange(8.0, dtype=np.float32).reshape(2, 4)
    x[1, 2] = np.nan
    center = over_workers(lambda x: mean_of_workers({"x": x}, None, ("group", "worker"))["x"], "shard_map")(x)
    np.testing.assert_allclose(center, np.full((2, 4), np.nanmean(x)), rtol=1e-6)


def test_a_program_ends_at_exchanges_evaluations_and_the_end():
    assert setup.steps_per_call(SMOKE) == 4
    assert setup.steps_per_call(dataclasses.replace(SMOKE, steps=50)) == 2


@pytest.mark.parametrize(
    ("groups", "workers", "mesh", "slots"),
    [
        (2, 4, (2, 4), (1, 1)),
        (4, 4, (4, 2), (1, 2)),
        (1, 3, (1, 3), (1, 1)),
        (3, 3, (3, 1), (1, 3)),
        (1, 9, (1, 3), (1, 3)),
    ],
)
def test_workers_share_devices_evenly(groups, workers, mesh, slots):
    need_devices(8)
    placement = place(groups, workers)
    assert (tuple(placement.mesh.shape.values()), placement.slots) == (mesh, slots)
    assert placement.shape == (groups, workers)


def test_learning_rates_drop_by_steps_epochs_or_the_clock():
    def factors(unit, drops, seconds=0.0):
        config = dataclasses.replace(SMOKE, steps=100, learning_rate_drops=drops, learning_rate_drops_in=unit)
        return [learning_rates.learning_rate_factor(config, step, step / 7, seconds) for step in (0, 13, 14, 50, 99)]

    np.testing.assert_allclose(factors("fractions", (0.5,)), [1, 1, 1, 0.1, 0.1])
    np.testing.assert_allclose(factors("epochs", (2, 14)), [1, 1, 0.1, 0.1, 0.01])
    np.testing.assert_allclose(factors("seconds", (1500, 3000)), [1] * 5)
    np.testing.assert_allclose(factors("seconds", (1500, 3000), seconds=1500.0), [0.1] * 5)


def test_a_dropped_rate_is_logged_and_slows_the_workers(smoke_run, tmp_path):
    config = dataclasses.replace(SMOKE, learning_rate_drops=(1e-9,), learning_rate_drops_in="seconds")
    dropped = train.train_and_evaluate(config, tmp_path / "run")
    entries = read_metrics(tmp_path / "run", "evaluation")
    np.testing.assert_allclose([entry["learning_rate_factor"] for entry in entries], 0.1)
    assert dropped > read_metrics(smoke_run, "evaluation")[-1]["center_error"]


def test_nothing_already_written_is_lost(smoke_run, tmp_path):
    before = (smoke_run / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="is not empty: name another"):
        RunFolder(smoke_run, SMOKE)
    assert (smoke_run / "metrics.jsonl").read_text() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="can't be written"):
        RunFolder(tmp_path / "file", SMOKE)
