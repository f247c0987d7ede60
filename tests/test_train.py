"""The training loop on the smoke preset, over eight simulated devices."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from lsgd_jax import train
from lsgd_jax.config import Config
from lsgd_jax.data import BatchIndices, load
from lsgd_jax.distributed import worker_mesh
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import run as run_figure
from lsgd_jax.methods import METHODS, mean_of_workers
from lsgd_jax.presets import PRESETS
from lsgd_jax.run_folder import RunFolder, read_metrics
from lsgd_jax.step import evaluation, init_state, local_steps
from tests.mapping import over_workers

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


def test_a_compiled_round_takes_the_same_steps_one_by_one():
    """What runs on accelerators, a scan over a period, against what runs on the CPU."""
    config = dataclasses.replace(SMOKE, period=2, global_period=4)
    data, mesh = load("digits"), worker_mesh(2, 4)
    model = train.make_model(config, data)
    optimizer = train.make_optimizer(config)
    batches = BatchIndices(examples=1437, workers=8, batch_size=16, sampling="shards", seed=0)
    stacked = np.stack([batches(step).reshape(2, 4, 16) for step in range(8)], axis=2)
    program = local_steps(model, optimizer, mesh)

    results = []
    for at_once in (1, 4):
        state = init_state(model, optimizer, mesh)
        for first in range(0, 8, at_once):
            batch = stacked[:, :, first : first + at_once]
            state, metrics = jax.block_until_ready(program(state, data.train_x, data.train_y, batch, np.int32(first)))
        results.append((state.params, metrics.leaders))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), *results)


def test_evaluation_counts_as_a_plain_loop_does():
    data, mesh = load("digits"), worker_mesh(2, 4)
    model = train.make_model(SMOKE, data)
    state = init_state(model, optax.sgd(0.1), mesh)
    few = data._replace(test_x=data.test_x[:101], test_y=data.test_y[:101])  # Not a multiple of the workers.
    logits = np.asarray(model(few.test_x))
    wrong = np.mean(logits.argmax(-1) != few.test_y)
    result = evaluation(model, mean_of_workers, mesh, few)(state)
    np.testing.assert_allclose(result.center_error, wrong, rtol=1e-6)
    np.testing.assert_allclose(result.worker_errors, np.full((2, 4), wrong), rtol=1e-6)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.center_loss, -log_probabilities[np.arange(101), few.test_y].mean(), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, tmp_path):
    config = dataclasses.replace(SMOKE, method=name, learning_rate=0.002 if name == "downpour" else 0.1)
    assert train.train_and_evaluate(config, tmp_path / "run") < 0.3
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
    assert train.train_and_evaluate(config, tmp_path / "run") == 1.0
    assert read_metrics(tmp_path / "run", "evaluation")[-1]["center_loss"] is None
    assert run_figure.draw(tmp_path / "run").exists()


def test_a_model_that_is_not_for_the_data_is_one_sentence():
    config = dataclasses.replace(SMOKE, model="conv1d")
    with pytest.raises(UsageError, match=r"conv1d is not for the data set digits, .* \(8, 8, 1\): use mlp"):
        train.make_model(config, load("digits"))


def test_the_center_leaves_out_workers_that_are_not_finite():
    x = np.arange(8.0, dtype=np.float32).reshape(2, 4)
    x[1, 2] = np.nan
    center = over_workers(lambda x: mean_of_workers({"x": x}, None, ("group", "worker"))["x"], "shard_map")(x)
    np.testing.assert_allclose(center, np.full((2, 4), np.nanmean(x)), rtol=1e-6)


def test_a_program_on_an_accelerator_ends_at_exchanges_evaluations_and_the_end(monkeypatch):
    assert train.steps_at_once(SMOKE) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert train.steps_at_once(SMOKE) == 4
    assert train.steps_at_once(dataclasses.replace(SMOKE, steps=50)) == 2


def test_more_workers_than_devices_is_one_sentence():
    with pytest.raises(UsageError, match=r"4 x 4 workers need 16 devices, but there are 8 \(cpu\)"):
        worker_mesh(4, 4)


def test_nothing_already_written_is_lost(smoke_run, tmp_path):
    before = (smoke_run / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="is not empty: name another"):
        RunFolder(smoke_run, SMOKE)
    assert (smoke_run / "metrics.jsonl").read_text() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="can't be written"):
        RunFolder(tmp_path / "file", SMOKE)
