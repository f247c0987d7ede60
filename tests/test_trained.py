"""Networks out of a run's folder do what the run has told of them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from lsgd_jax import train
from lsgd_jax.data import load
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import report
from lsgd_jax.figures.run import draw
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.trained import load_trained

SMALL = PRESETS["digits"].replace(width=0.1, groups=2, workers=2, steps=12, eval_every=4)


@pytest.fixture(scope="module", params=["lsgd", "easgd"])
def run_dir(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / request.param
    train.train_and_evaluate(dataclasses.replace(SMALL, method=request.param), str(path), lines=False)
    return path


def error(network):
    data = load("digits")
    return float(np.mean(np.argmax(network(data.test_x), -1) != data.test_y))


@pytest.mark.parametrize("step", [None, 8])
def test_they_have_the_errors_that_the_run_has_told(run_dir, step):
    trained = load_trained(run_dir, step)
    assert trained.step == (step or 12)
    (told,) = (entry for entry in read_metrics(run_dir, "evaluation") if entry["step"] == trained.step)
    np.testing.assert_allclose(error(trained.center), told["center_error"], atol=1 / 360)
    np.testing.assert_allclose([*map(error, trained.workers)], np.ravel(told["worker_errors"]), atol=1 / 360)
    assert len({error(network) for network in trained.workers}) > 1
    if run_dir.name == "lsgd" and trained.step == 8:
        exchanges = {entry["step"]: entry for entry in read_metrics(run_dir, "exchange")}
        assert trained.best == np.argmin(exchanges[8]["scores"])


def test_paths_may_be_strings(run_dir, tmp_path):
    assert load_trained(str(run_dir)).step == 12
    assert draw(str(run_dir)) == run_dir / "curves.png"
    report.write([str(run_dir)], str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").exists()
    for function in (load_trained, draw, lambda path: train.train_and_evaluate(SMALL, path)):
        with pytest.raises(UsageError, match=r"must be without NUL characters, got 'a\\x00b'\."):
            function("a\0b")


def test_a_checkpoint_of_other_workers_is_read(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    config = dataclasses.replace(SMALL, method=run_dir.name, groups=1, workers=3, steps=16)
    train.train_and_evaluate(config, tmp_path / "run", lines=False, resume=True)
    assert len(load_trained(tmp_path / "run").workers) == 3
    before = load_trained(tmp_path / "run", 12)
    assert [*map(error, before.workers)] == [*map(error, load_trained(run_dir, 12).workers)]


def test_what_is_not_there_is_one_sentence(run_dir, tmp_path):
    with pytest.raises(UsageError, match=r"there is no checkpoint of step 5 in .*; there are \[8, 12\]\."):
        load_trained(run_dir, 5)
    with pytest.raises(UsageError, match="is not a run folder"):
        load_trained(tmp_path)
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12" / "state")
    with pytest.raises(UsageError, match=r"the checkpoint of step 12 in .* can't be read: its arrays can't be read"):
        load_trained(tmp_path / "run")
    told = tmp_path / "run" / "checkpoints" / "8" / "progress" / "metadata"
    about = json.loads(told.read_text())
    about["progress"] |= {"shape": [1, 0], "scores": [[]], "losses": []}
    told.write_text(json.dumps(about))
    with pytest.raises(
        UsageError, match=r"the checkpoint of step 8 in .* can't be read: workers must be at least 1, got 0"
    ):
        load_trained(tmp_path / "run", 8)
    about.pop("format")
    told.write_text(json.dumps(about))
    with pytest.raises(
        UsageError,
        match=r"the checkpoint of step 8 in .* can't be read: it was written by another version of lsgd_jax, without a"
        r" format version .*: start anew in another folder, or use that version\.$",
    ):
        load_trained(tmp_path / "run", 8)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match=r"there is no checkpoint in .*/run\."):
        load_trained(tmp_path / "run")
