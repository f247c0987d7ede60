"""Language models, from text to loss, and trained as a user trains them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsgd_jax.data.text import load
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS, language
from lsgd_jax.tasks.language import DIALECTS, Language
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.train.setup import make_feed
from tests.reliability import commands

TINY = {"width": 8, "depth": 1, "heads": 1, "context": 16}
SHORT = {"steps": 32, "eval_every": 16, "workers": 2, "period": 8, "batch_size": 4}


def test_examples_are_windows_of_the_tragedies():
    data, corpus = Language(context=100).data(), load("tragedies")
    assert data.train.dtype == data.test.dtype == np.uint8
    assert bytes(data.test[0]) == bytes(corpus.test[:101])
    assert bytes(data.train[-1]) == bytes(corpus.train[100 * (len(data.train) - 1) :][:101])
    np.testing.assert_array_equal(data.train[1:, 0], data.train[:-1, -1])


def test_a_file_is_streamed_and_gives_the_windows_it_has(tmp_path):
    (tmp_path / "own.txt").write_bytes(bytes(range(100)) * 2)
    task = Language(text=str(tmp_path / "own.txt"), context=10)
    train, test = task.data()
    assert (task.is_streamed, len(train), len(test)) == (True, 17, 1)
    np.testing.assert_array_equal(train.read(np.array([2])), [range(20, 31)])
    with pytest.raises(UsageError, match=r"^context must be below the 20 tokens of a part of the text, got 20\.$"):
        Language(text=task.text, context=20).data()
    with pytest.raises(UsageError, match=r"^vocabulary must be at least the 100 tokens of .*own.txt, got 99\.$"):
        Language(text=task.text, vocabulary=99).data()


def test_blank_examples_are_like_real_ones(tmp_path):
    (tmp_path / "own.txt").write_bytes(bytes(200))
    for task in (Language(), Language(text=str(tmp_path / "own.txt"), context=10)):
        one, real = (data.train for data in (task.blank(), task.data()))
        one, real = (x.read(np.arange(2)) if task.is_streamed else x[:2] for x in (one, real))
        assert (one.shape, one.dtype) == (real.shape, real.dtype)


def test_the_loss_is_the_cross_entropy_of_each_window():
    task = Language(**TINY, vocabulary=5)
    network = task.network(nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(5, size=(3, 17)).astype(np.uint8)
    logits = np.float64(network(jnp.int32(tokens[:, :-1])))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, tokens[:, 1:, None].astype(int), -1)[..., 0].mean(1)
    np.testing.assert_allclose(task.measures(network, jnp.asarray(tokens))["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(task.loss(network, jnp.asarray(tokens), jax.random.key(0)), expected.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, r"width must be a multiple of 2 \* heads, 6, got 64"),
        ({"context": 0}, r"context must be in \[1, 2\^31\), got 0"),
        ({"activation": "relu"}, "activation must be gelu or swiglu, got 'relu'"),
    ],
)
def test_a_field_out_of_range_is_one_sentence(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PRESETS["tragedies"].replace(**fields)


@pytest.mark.parametrize("sampling", ["shards", "partitions"])
def test_dialects_are_mixed_or_dealt_to_the_workers(sampling):
    config = PRESETS["dialects"].replace(sampling=sampling, workers=4, batch_size=64)
    data = config.task.data()
    dialect_of = {window.tobytes(): i * 4 // len(data.train) for i, window in enumerate(data.train)}
    assert len(data.train) % 4 == 0
    indices = next(make_feed(config).batches(0, 1))
    dialects = [{dialect_of[data.train[i].tobytes()] for i in of_worker} for of_worker in indices]
    assert dialects == ([{0}, {1}, {2}, {3}] if sampling == "partitions" else [{0, 1, 2, 3}] * 4)


def test_it_learns_the_dialects_and_never_more_than_there_is(tmp_path):
    config = PRESETS["dialects"].replace(**TINY | SHORT, learning_rate_warmup=0.0)
    loss = train_and_evaluate(config, tmp_path / "run")
    first, *_ = read_metrics(tmp_path / "run", "evaluation")
    assert DIALECTS.best_loss(config.task.data().test) < loss < first["center_loss"]


def options(**values):
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def losses(run):
    return [entry["center_loss"] for entry in read_metrics(run, "evaluation")]


def test_the_command_trains_on_a_text_of_one_s_own(lsgd, tmp_path):
    (text := tmp_path / "own.txt").write_text("".join(f"{i} sheep. " for i in range(2000)))
    run = tmp_path / "run"
    training = options(**TINY, **SHORT, text=text, data_processes=0, run_dir=run)
    code, printed, errors = lsgd("train", "tragedies", *training)
    assert code == 0, errors
    first, last = losses(run)
    assert last < first
    assert f"test loss of the evaluated model after 32 steps: {last:.4f}" in printed
    assert json.loads((run / "config.json").read_text())["task"]["text"] == str(text)


def test_two_processes_train_it_without_waiting_for_each_other(tmp_path):
    of_run = options(**TINY, **SHORT, asynchronous="posted", run_dir=tmp_path / "run")
    code, errors = commands.done("launch", "--processes", 2, "--", "train", "tragedies", *of_run, cwd=tmp_path)
    assert code == 0, errors
    # An untrained model knows no more than that there are 256 bytes; when else it is evaluated, depends on time.
    assert losses(tmp_path / "run")[-1] < np.log(256) - 0.5


def test_the_docstring_of_the_presets_tells_the_best_loss_of_the_dialects():
    best = DIALECTS.best_loss(PRESETS["dialects"].task.data().test)
    assert f"the best possible predictor is {best:.4f} nats" in language.__doc__
