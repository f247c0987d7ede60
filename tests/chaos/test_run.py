"""A run with faults from its launch to its summary, of processes that only sleep."""

import json
import sys
from pathlib import Path

import pytest

from lsgd_jax.chaos import Fault, run
from lsgd_jax.errors import RunFailed
from lsgd_jax.presets import PRESETS

CONFIG = PRESETS["digits"].replace(groups=1, workers=3, asynchronous="posted")


@pytest.fixture
def chaos(monkeypatch, tmp_path):
    """Runs the stub with faults; returns the outcome and what was printed."""
    monkeypatch.setattr(run, "LSGD", (sys.executable, str(Path(__file__).with_name("stub.py"))))

    def chaos(plan, config=CONFIG, preset="digits"):
        said = []
        options = {"seconds": 2.0, "quiet": 0.5, "message": said.append}
        return run.chaos(["train", preset], config, 3, plan, tmp_path, **options), said

    return chaos


def test_faults_are_injected_and_summed_up(chaos, tmp_path):
    plan = [Fault(0.9, "stop", (2,), 0.1), Fault(0.5, "kill", (-1,)), Fault(0.7, "partition", (0,), 0.2)]
    (summary, replayed, is_equal), said = chaos(plan)
    assert said == [
        "all 3 processes train",
        "0.5 kill leader",
        "0.7 partition 0 0.2",
        "0.9 stop 2 0.1",
        "replaying the run",
    ]
    assert (replayed, is_equal) == (f"replayed {tmp_path / 'run'}", True)
    assert summary.faults == {"kill": 1, "partition": 1, "stop": 1}
    assert (summary.noticed.times, summary.back.times, summary.away) == (1, 1, 0)
    assert (summary.lost, summary.ended, summary.wrong, summary.error) == ([0], [], 0, 0.25)
    faults = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [fault["hit"][0]["worker"] for fault in faults] == [1, 0, 2]  # Worker 1 led.
    assert json.loads((tmp_path / "links.json").read_text()) == {}  # The partition is over.
    assert (tmp_path / "output.txt").read_text() == f"launched with {tmp_path / 'links.json'}\n"


def test_what_has_no_leaders_is_not_replayed(chaos):
    (_, replayed, is_equal), _ = chaos([], CONFIG.replace(method="easgd"))
    assert (replayed, is_equal) == ("not replayed, since easgd has no leaders", True)


def test_a_run_that_does_not_begin_is_one_sentence(chaos, tmp_path):
    with pytest.raises(RunFailed, match=r"not all workers have begun to train: see .*output.txt"):
        chaos([], preset="unknown")
    assert "not understood" in (tmp_path / "output.txt").read_text()
