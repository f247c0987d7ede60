"""A run that was stopped goes on to the bits of one that was not."""

import dataclasses
import os
import random
import signal

import pytest

from lsgd_jax import train
from lsgd_jax.errors import Interrupted
from lsgd_jax.methods import METHODS
from tests.reliability import faults
from tests.reliability.runs import SMALL, assert_same

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
        faults.stop_at(patched, stop, signal.SIGTERM)
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
    before, scores = arrays(path, 12), metrics(path)[-2 if config.method == "lsgd" else -1]
    resized = dataclasses.replace(config, groups=now[0], workers=now[1], steps=24)
    faulty = pytest.MonkeyPatch()
    starts = []
    faulty.setattr(train, "local_steps", lambda *arguments: starts.append(arguments) or LOCAL_STEPS(*arguments))
    with faulty.context():
        assert train.train_and_evaluate(resized, path, lines=False, resume=True) < 0.95
    faulty.undo()
    [event] = [event for event in metrics(path) if event["event"] == "resume"]
    sources = np.ravel(event["workers_from"]).tolist()
    assert np.shape(event["workers_from"]) == now
    if config.method == "lsgd":
        best = np.argsort(np.ravel(scores["scores"]), kind="stable").tolist()
        fewer = sorted(best[: len(sources)])
        assert sources == (fewer if len(sources) < 4 else [0, 1, 2, 3] + [best[0]] * 4)
    assert Config.load(path) == resized
    assert np.shape(metrics(path)[-1]["worker_errors"]) == now
    assert draw(path).exists()
    assert " workers in place of " in capsys.readouterr().err
    assert before.keys() >= {".params['layers'][0]"} or before
