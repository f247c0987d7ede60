"""A run that was stopped goes on to the bits of one that was not."""

import dataclasses
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lsgd_jax import cli, distributed, train
from lsgd_jax.config import Config
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.figures.run import draw
from lsgd_jax.methods import METHODS
from lsgd_jax.run_folder import read_metrics
from tests.reliability import faults
from tests.reliability.runs import SMALL, assert_same, metrics

SEEDS = range(int(os.environ.get("LSGD_SOAK", "1")))
"""More are tried by `make soak`."""
LSGD_OPTIONS = {
    "plain": {},
    "one group": {"groups": 1, "workers": 4},
    "int8 wire": {"wire": "int8", "global_period": 8},
    "delay and stale pulls": {"delay": 1, "stale_pull": 0.1, "global_stale_pull": 0.1, "global_period": 8},
    "adamw": {"local_optimizer": "adamw", "learning_rate": 0.01, "learning_rate_drops": (0.4,)},
    "independent sampling": {"sampling": "independent", "global_period": 4},
}
CONFIGS = {name: {"method": name, "groups": 1} for name in METHODS if name != "lsgd"}
CONFIGS["downpour"]["learning_rate"] = 0.02
CONFIGS |= {f"lsgd, {name}": options for name, options in LSGD_OPTIONS.items()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("quick_compilation")
def test_a_stop_at_any_step_changes_no_bit(name, seed, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, seed=seed, **CONFIGS[name])
    error = train.train_and_evaluate(config, tmp_path / "whole", lines=False)
    stop = random.Random(f"{name} {seed}").choice(range(4, config.steps, 4))
    with monkeypatch.context() as patched:
        faults.stop_after(patched, stop // 4, signal.SIGTERM)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {stop} of 24; the same command goes on"):
            train.train_and_evaluate(config, tmp_path / "parts", lines=False)
    assert train.train_and_evaluate(config, tmp_path / "parts", lines=False, resume=True) == error
    assert_same(tmp_path / "parts", tmp_path / "whole", config.steps)


@pytest.mark.parametrize(
    ("saved", "now", "options"),
    [
        ((1, 4), (1, 2), {"method": "lsgd"}),
        ((1, 4), (2, 4), {"method": "lsgd", "wire": "int8", "stale_pull": 0.1}),
        ((2, 2), (1, 2), {"method": "easgd"}),
    ],
)
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_goes_on_with_other_workers(saved, now, options, tmp_path, capsys):
    config = dataclasses.replace(SMALL, groups=saved[0], workers=saved[1], steps=12, **options)
    path = tmp_path / "run"
    train.train_and_evaluate(config, path, lines=False)
    resized = dataclasses.replace(config, groups=now[0], workers=now[1], steps=24)
    train.train_and_evaluate(resized, path, lines=False, resume=True)
    [event] = [event for event in metrics(path) if event["event"] == "resume"]
    assert np.shape(event["workers_from"]) == now
    sources = np.ravel(event["workers_from"]).tolist()
    if config.method == "lsgd":
        [scores] = [e["scores"] for e in metrics(path) if e["event"] == "exchange" and e["step"] == 12]
        best = np.argsort(np.ravel(scores), kind="stable").tolist()
        assert sources == (sorted(best[:2]) if now == (1, 2) else [0, 1, 2, 3] + [best[0]] * 4)
    assert Config.load(path) == resized
    assert np.shape(metrics(path)[-1]["worker_errors"]) == now
    assert draw(path).exists()
    assert f"{now[0]} x {now[1]} workers in place of {saved[0]} x {saved[1]}: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of the steps 8, 12 (its best or not), 16 and 24."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train.train_and_evaluate(dataclasses.replace(SMALL, keep_checkpoints=9), path, lines=False)
    return path


LONGER = dataclasses.replace(SMALL, keep_checkpoints=9, steps=28)


@pytest.mark.parametrize("damage", ["bit", "cut", "progress", "missing", "metrics"])
def test_the_newest_good_checkpoint_is_found(damage, finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    newest = path / "checkpoints" / "24"
    if damage == "bit":
        for file in faults.files(newest / "state"):
            faults.flip_a_bit(file)
    elif damage == "cut":
        for file in faults.files(newest / "state"):
            faults.cut(file, 0.5)
    elif damage == "progress":
        (newest / "progress" / "metadata").write_text('{"progress": {"step": "24"}, "sums": 1}')
    elif damage == "missing":
        shutil.rmtree(newest / "state")
    else:
        faults.cut(path / "metrics.jsonl", 0.9)
    train.train_and_evaluate(LONGER, path, lines=False, resume=True)
    told = capsys.readouterr().err
    assert "the checkpoint of step 24 can't be read, since " in told
    assert "the run goes on from step 16" in told
    assert (path / "unreadable-checkpoint-24").is_dir()
    assert [e["step"] for e in metrics(path) if e["event"] == "evaluation"] == [12, 24, 28]
    assert metrics(path)[: len(metrics(finished))] == metrics(finished)


def test_a_line_that_was_not_finished_is_written_anew(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "exchange", "step": 28, "sco')
    assert read_metrics(path, "evaluation") == read_metrics(finished, "evaluation")
    train.train_and_evaluate(LONGER, path, lines=False, resume=True)
    assert metrics(path)[: len(metrics(finished))] == metrics(finished)
    assert metrics(path)[-1]["step"] == 28


def damage_all(path):
    for folder in (path / "checkpoints").iterdir():
        for file in faults.files(folder / "state"):
            faults.cut(file, 0.1)


def link_checkpoints(path):
    (path / "checkpoints").rename(path.parent / "elsewhere")
    (path / "checkpoints").symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "changed", "message"),
    [
        (damage_all, {}, "none of the checkpoints in .* can be read, that of step 24 since "),
        (link_checkpoints, {}, "checkpoints is a link, through which the run would write elsewhere"),
        (lambda path: (path / "config.json").unlink(), {}, "is no folder of a run, its config.json can't be read"),
        (lambda path: None, {"learning_rate": 0.2}, "can't go on with another learning_rate: 0.2, not 0.1"),
        (lambda path: None, {"steps": 20}, "steps must be at least the 24 that the run has taken, got 20"),
    ],
)
def test_what_cannot_go_on_is_one_sentence_and_stays_as_it_is(damage, changed, message, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    damage(path)
    with pytest.raises(UsageError, match=message):
        train.train_and_evaluate(dataclasses.replace(LONGER, **changed), path, lines=False, resume=True)
    assert metrics(path) == metrics(finished)


def test_a_finished_run_is_finished(finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    config = dataclasses.replace(SMALL, keep_checkpoints=9)
    error = train.train_and_evaluate(config, path, lines=False, resume=True)
    assert error == read_metrics(finished, "evaluation")[-1]["center_error"]
    assert metrics(path) == metrics(finished)
    assert "the run has taken its 24 steps already" in capsys.readouterr().err


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    config = dataclasses.replace(SMALL, keep_checkpoints=1, steps=48, eval_every=4, checkpoint_every=4)
    train.train_and_evaluate(config, tmp_path / "run", lines=False)
    errors = {e["step"]: e["center_error"] for e in read_metrics(tmp_path / "run", "evaluation")}
    kept = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert 48 in kept
    assert len(kept) <= 2
    assert min(errors[step] for step in kept) == min(errors.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Config)]), JSON, max_size=4)


@settings(max_examples=20 * len(SEEDS), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=JSON.map(json.dumps) | FIELDS.map(lambda f: json.dumps(json.loads(SMALL.to_json()) | f)) | st.text())
def test_whatever_a_folder_holds_is_one_sentence(text, finished, tmp_path, monkeypatch, capsys):
    """Of a configuration that no run of this preset has written."""
    monkeypatch.setattr(distributed, "initialize", lambda: None)
    monkeypatch.setattr(distributed, "simulate_devices", lambda count: None)
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "config.json").write_text(text, errors="replace")
    capsys.readouterr()
    assert cli.main(["train", "mnist1d", "--run-dir", str(path), "--resume"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lsgd: ")
