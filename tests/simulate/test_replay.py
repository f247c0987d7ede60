"""A posted run and its replay from the events."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

from lsgd_jax import train
from lsgd_jax.asynchronous.exchanges import pulled_towards
from lsgd_jax.distributed import place
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate.replay import replay
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import setup
from lsgd_jax.train.asynchronous_workers import Start, Trainers
from lsgd_jax.train.recorder import Clock
from lsgd_jax.train.saved_worker import checksum
from lsgd_jax.train.step import TrainState
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


ALONE = SMALL.replace(groups=1, workers=3, slowdowns=(), steps=200)


@pytest.fixture(scope="module")
def trainers():
    placement = place(1, 3, jax.devices()[:3])
    feed, model = setup.make_feed(ALONE, rows=range(3)), setup.make_model(ALONE)
    return Trainers(ALONE, range(3), placement, feed, model, Clock())


class History:
    """Three workers who take turns, die, come back and are pulled to each other, by chance; with what they record."""

    def __init__(self, trainers, seed):
        self.trainers, self.rng, self.events = trainers, random.Random(seed), []
        self.posts, self.saves, self.workers, self.lives = {}, [{}, {}, {}], [None] * 3, [0] * 3
        for i in range(3):
            self.start(i, trainers.starts[i], None)

    def log(self, event, **values):
        self.events.append({"event": event, "step": 0} | values)

    def start(self, i, start, source):
        starts = [*self.trainers.starts]
        starts[i] = start._replace(state=jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), start.state))
        self.workers[i] = self.trainers.workers(starts)[i]
        self.lives[i] += 1
        self.log("start", worker=i, life=self.lives[i], step=start.step, **{"from": source})
        self.post(i)

    def post(self, i):
        worker = self.workers[i]
        self.posts[i, self.lives[i], worker.step] = worker.model

    def save(self, i, *, pulled):
        worker = self.workers[i]
        self.saves[i][self.lives[i], worker.step, pulled] = jax.device_get(TrainState(*worker.model, worker.optimizer))
        values = {"sha256": checksum(worker.model.params), "pulled": pulled}
        self.log("checksum", worker=i, life=self.lives[i], step=worker.step, **values)

    def turn(self):
        i = self.rng.randrange(3)
        self.workers[i].take_step()
        self.post(i)
        if self.rng.random() < 0.1:
            self.save(i, pulled=False)
        if self.rng.random() < 0.3:
            self.pull(i)
        if self.rng.random() < 0.06:
            self.replace(i)

    def pull(self, i):
        others = [post for post in self.posts if post[0] != i]
        (j, life, step), worker = self.rng.choice(others[-20:]), self.workers[i]
        params = jax.device_put(self.posts[j, life, step].params, self.trainers._device(i))
        moved, [distance] = pulled_towards(
            worker.model.params, (params,), (np.float32(ALONE.levels[0].options["pull"]),), np.int32(worker.step)
        )
        worker.move(moved)
        leader = {"leader": j, "leader_life": life, "leader_step": step, "distance": float(distance)}
        self.log("exchange", worker=i, life=self.lives[i], worker_step=worker.step, **leader)
        if self.rng.random() < 0.2:
            self.save(i, pulled=True)

    def replace(self, i):
        """By a life that starts from somebody's post, from what was saved, or from the common start."""
        step, common, saves = self.workers[i].step, self.trainers.starts[i], self.saves[i]
        way = self.rng.choice(["leader", "saved", "common"])
        if way == "leader":
            j, life, of = self.rng.choice(list(self.posts))
            model = jax.device_put(self.posts[j, life, of], self.trainers._device(i))
            state = TrainState(*model, common.state.optimizer)
            self.start(i, Start(state, step), {"worker": j, "life": life, "step": of})
        elif way == "saved" and saves:
            life, of, pulled = self.rng.choice(list(saves))
            saved = saves[life, of, pulled]
            state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved, common.state)
            self.start(i, Start(state, step), {"saved": of, "life": life, "pulled": pulled})
        else:
            self.start(i, common._replace(step=step), None)

    def write(self, path):
        for i in range(3):
            self.save(i, pulled=True)
        self.rng.shuffle(self.events)
        (path / "config.json").write_text(ALONE.to_json())
        (path / "events-0.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))


@pytest.mark.parametrize("seed", range(2))
def test_lives_are_replayed_whoever_they_came_from(seed, trainers, tmp_path):
    history = History(trainers, seed)
    for _ in range(150):
        history.turn()
    history.write(tmp_path)
    found = replay(tmp_path)
    assert found.differences == []
    assert found.lives == sum(history.lives) >= 6
    assert found.pulls > 20
    assert found.checksums >= 3


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


def with_another_checksum(event):
    if event["event"] == "checksum" and event["worker"] == 2 and event["pulled"]:
        event["sha256"] = "0" * 64


@pytest.mark.parametrize("change", [of_another_snapshot, with_another_checksum], ids=lambda change: change.__name__)
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
