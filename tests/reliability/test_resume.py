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
