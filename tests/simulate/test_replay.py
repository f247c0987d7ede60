"""A posted run and its replay from the events."""

import json
import shutil

import pytest

from lsgd_jax import train
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate.replay import replay
from lsgd_jax.tracking.run_folder import read_metrics
from tests.mapping import need_devices

SMALL = PRESETS["digits"].replace(
    groups=2,
    workers=2,
    width=0.1,
    batch_size=8,
    steps=40,
    period=2,
    global_period=6,
    eval_every=20,
    asynchronous="posted",
    staleness=1,
    min_step_seconds=0.001,
    slowdowns=(1.0, 3.0),
    learning_rates="linear",
    learning_rate=0.02,
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a run of four workers in two groups, each at its own speed."""
    need_devices(4)
    path = tmp_path_factory.mktemp("runs") / "run"
    train.train_and_evaluate(SMALL, path, lines=False)
    return path


def test_a_run_is_replayed_to_the_bit(recorded):
    found = replay(recorded)
    assert found.differences == []
    assert (found.lives, found.steps) == (4, 4 * SMALL.steps)
    assert found.checksums == len(read_metrics(recorded, "checksum")) >= 8
    assert found.pulls == sum(
        event[f"{name}distance"] > 0
        for event in read_metrics(recorded, "exchange")
        for name in ("", "local_")
        if f"{name}leader" in event
    )
    assert found.pulls > 20
    assert str(found) == (
        f"replayed 160 steps and {found.pulls} pulls of 4 lives: all distances and {found.checksums} checksums of"
        " parameters are equal to the bit"
    )


def changed(recorded, path, change):
    """A copy of the run in which a function has changed the events."""
    shutil.copytree(recorded, path)
    for file in path.glob("events-*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [line for line in lines if change(line) is not False]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def is_pull(event):
    return event["event"] == "exchange" and event.get("local_distance", 0) > 0


def of_another_snapshot(event):
    if is_pull(event) and event["worker_step"] > 20:
        event["local_leader_step"] -= 1


def without_the_exchanges_of_one_step(event):
    return not (is_pull(event) and 20 < event["worker_step"] < 25)


def with_another_checksum(event):
    if event["event"] == "checksum" and event["worker"] == 2 and event["pulled"]:
        event["sha256"] = "0" * 64


@pytest.mark.parametrize(
    "change", [of_another_snapshot, without_the_exchanges_of_one_step, with_another_checksum], ids=lambda f: f.__name__
)
def test_whatever_has_happened_otherwise_is_found(change, recorded, tmp_path):
    found = replay(changed(recorded, tmp_path / "run", change))
    assert found.differences
    if change is with_another_checksum:
        assert found.differences == ["worker 2, life 1: other parameters after step 40"]
    assert str(found).endswith(found.differences[-1])


def without_a_start(event):
    return event["event"] != "start" or event["worker"] != 1


def from_the_future(event):
    if event["event"] == "exchange":
        event |= {"leader": 1 - event["worker"] % 2, "leader_step": 40, "leader_life": 1, "distance": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_start, r"are not those of a run \(ValueError: worker 1 has no life 1 at step \d+\)"),
        (from_the_future, r"worker \d was followed at step 40, before it came there"),
    ],
)
def test_events_that_contradict_each_other_are_one_sentence(change, message, recorded, tmp_path):
    with pytest.raises(UsageError, match=message):
        replay(changed(recorded, tmp_path / "run", change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "easgd", "groups": 1}, "only posted runs of a method with leaders can be replayed"),
        ({"learning_rate_drops": (60.0,), "learning_rate_drops_in": "seconds"}, "its learning rate drops by the clock"),
    ],
)
def test_a_run_that_events_do_not_determine_is_one_sentence(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(SMALL.replace(**fields).to_json())
    with pytest.raises(UsageError, match=message):
        replay(tmp_path)
