"""Workers at their own speed in training: in step they do what synchronous training does, and they end together."""

import contextlib
import dataclasses
import re
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest

import lsgd_jax.asynchronous.workers as driving
from lsgd_jax import asynchronous, cli, distributed
from lsgd_jax.asynchronous import Joined, Threads
from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED, STACKED, StepCount, place
from lsgd_jax.errors import Interrupted, RunFailed, UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.member_folder import MemberFolder
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train import asynchronous as loop
from lsgd_jax.train import posted, setup
from lsgd_jax.train.asynchronous_step import exchange_of_all
from lsgd_jax.train.recorder import AsynchronousRecorder
from lsgd_jax.train.step import init_state, local_steps
from tests.asynchronous.schedule import drive_in_step, scripted

SMALL = PRESETS["digits"].replace(
    groups=2,
    workers=2,
    width=0.25,
    steps=12,
    period=2,
    global_period=4,
    eval_every=6,
    asynchronous="posted",
)
DEADLINE = 60
"""Seconds after which a test of what must not wait for ever fails."""


@contextlib.contextmanager
def run_of(config, path):
    """The workers of a run, which a test drives."""
    if config.asynchronous == "joined":
        with RunFolder(path, config) as folder:
            display = RunProgress(config.steps, log=folder.log, lines=False)
            yield loop._Run(config, setup.prepare(config), AsynchronousRecorder(config, folder, display))
        return
    positions = range(config.groups * config.workers)
    with MemberFolder(path, config, positions) as folder:
        display = RunProgress(config.steps, log=folder.log, lines=False)
        placement = place(config.groups, config.workers, jax.devices())
        made = placement, setup.make_feed(config), setup.make_model(config)
        yield posted._Member(config, positions, *made, folder, display, resume=False, host="127.0.0.1")


def params_of(run):
    return jax.device_get([worker.model.params for worker in run.workers])


def assert_same_bits(tree, other):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), tree, other)


def synchronous(run):
    """All workers take each step with the same compiled step, and then exchange at once by `leader_pull`."""
    config, placement = run.config, run.placement
    every_time = dataclasses.replace(config, asynchronous="joined", period=1, global_period=2, window=1)
    pulls = setup.make_method(every_time, placement, optax.identity())
    state = init_state(run.model, pulls, placement).optimizer
    exchange, found = exchange_of_all(pulls, placement), []
    for step in range(1, config.steps + 1):
        for worker in run.workers:
            worker.take_step()
        if step % config.period == 0:
            params = placement.stacked([worker.model.params for worker in run.workers])
            scores = placement.put(np.array([worker.score for worker in run.workers], np.float32), STACKED)
            steps = placement.put(np.full(4, step, np.int32), STACKED)
            params, state, (leaders, _) = exchange(params, state, scores, steps)
            found.append(jax.device_get(leaders))
            for worker, part in zip(run.workers, placement.parts(params), strict=True):
                worker.move(part)
    return params_of(run), found


@pytest.fixture(scope="module")
def in_step(tmp_path_factory):
    """The same run by hand, joined and posted, all with workers in step."""
    path = tmp_path_factory.mktemp("runs")
    with run_of(SMALL.replace(asynchronous="joined"), path / "by_hand") as run:
        by_hand = synchronous(run)
    params = {}
    for way in ("joined", "posted"):
        config = dataclasses.replace(SMALL, asynchronous=way)
        with run_of(config, path / way) as run:
            drive_in_step(run.workers, run.exchanges)
        params[way] = params_of(run)
    return by_hand, params, path


@pytest.mark.parametrize("way", ["joined", "posted"])
def test_workers_in_step_have_the_bits_of_synchronous_ones(way, in_step):
    (expected, _), params, _ = in_step
    assert_same_bits(params[way], expected)


def test_nothing_constant_is_sent(tmp_path):
    """A collective of a constant depends on nothing, so that two processes may come to it in different orders."""
    with run_of(SMALL.replace(asynchronous="joined"), tmp_path / "run") as run:
        pass
    pulls = setup.make_method(SMALL.replace(period=1, global_period=2, window=1), run.placement, optax.identity())
    exchange, state = exchange_of_all(pulls, run.placement), init_state(run.model, pulls, run.placement)
    scores, steps = run.placement.put((np.zeros(4, np.float32), np.zeros(4, np.int32)), STACKED)
    text = exchange.lower(state.params, state.optimizer, scores, steps).compile().as_text()
    sent = re.findall(r" = .* (?:all-\w+|collective-permute)(?:-start)?\((.*?)\)", text)
    assert len(sent) >= 4
    assert not [operands for operands in sent if "%constant" in operands]


def test_workers_in_step_log_the_leaders_of_synchronous_ones(in_step):
    (_, leaders), _, path = in_step
    joined = read_metrics(path / "joined", "exchange")
    posted = read_metrics(path / "posted", "exchange")
    assert len(joined) == len(leaders) == 6
    assert len(posted) == 4 * 6
    for k, of_all in enumerate(leaders):
        assert joined[k]["local_leaders"] == of_all.positions[:, 0, 0].tolist()
        assert joined[k]["worker_steps"] == [[2 * k + 2] * 2] * 2
        assert joined[k]["count"] == 4 * (2 * k + 2)
        for event in posted[4 * k : 4 * k + 4]:
            at = divmod(event["worker"], 2)
            assert event["local_leader"] == of_all.positions[*at, 0]
            np.testing.assert_allclose(event["local_distance"], of_all.distances[*at, 0], rtol=1e-6)
            assert (event["worker_step"], event["count"]) == (2 * k + 2, 4 * (2 * k + 2))
            assert ("leader" in event) == (k % 2 == 1) == ("leader" in joined[k])
            if k % 2 == 1:
                assert event["leader"] == joined[k]["leader"] == of_all.positions[*at, 1]
                np.testing.assert_allclose(event["distance"], of_all.distances[*at, 1], rtol=1e-6)


def test_synchronous_training_is_the_same_up_to_rounding(in_step):
    """Its program has step and pull in one."""
    (expected, leaders), _, _ = in_step
    config = dataclasses.replace(SMALL, asynchronous=None)
    placement, feed, model, optimizer = setup.prepare(config)
    program = local_steps(config.task, model, optimizer, placement, feed)
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    for step, batch in enumerate(setup.rounds(feed, placement, config.steps, 1)):
        state, metrics = jax.block_until_ready(
            program(state, shared, batch, np.int32(step), np.float32(1), setup.step_key(config.seed))
        )
    np.testing.assert_array_equal(metrics.leaders.positions, leaders[-1].positions)
    for params, other in zip(jax.device_get(placement.parts(state.params)), expected, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), params, other)


def test_a_step_takes_its_minimum_duration():
    worker = scripted(0, 2)
    worker._min_seconds = 0.05
    begun = time.perf_counter()
    worker.take_step()
    worker.take_step()
    assert time.perf_counter() - begun >= 0.1


def dying(step):
    if step == 3:
        raise ZeroDivisionError("as the test wants it\nand no more")
    return asynchronous.StepReport(0.0, 0.0, True)


def test_a_worker_that_fails_ends_those_who_wait_for_it():
    workers = [scripted(i, 10) for i in range(3)] + [scripted(3, 10, dying)]
    joined = Joined(StepCount(), lambda number: None, own_workers=4, steps_between=8, most=5)
    begun = time.monotonic()
    message = r"worker 3 failed after 3 steps and has ended the run \(ZeroDivisionError: as the test wants it\)\."
    with pytest.raises(RunFailed, match=message), Threads(workers, joined) as threads:
        threads.have_ended(DEADLINE)
    assert time.monotonic() - begun < DEADLINE
    wait_for_no_threads()


def test_what_the_user_has_to_change_is_not_taken_for_a_failure():
    def refusing(step):
        raise UsageError("the metrics can't be written.")

    joined = Joined(StepCount(), lambda number: None, own_workers=2, steps_between=100, most=0)
    workers = [scripted(0, 10), scripted(1, 10, refusing)]
    with pytest.raises(UsageError, match=r"^the metrics can't be written\.$"), Threads(workers, joined) as threads:
        threads.have_ended(DEADLINE)


def test_a_worker_that_hangs_does_not_keep_the_run_from_ending(monkeypatch):
    monkeypatch.setattr(driving, "GRACE", 0.5)
    released = threading.Event()
    hanging = scripted(0, 10, lambda step: released.wait(DEADLINE))
    joined = Joined(StepCount(), lambda number: None, own_workers=2, steps_between=100, most=0)
    begun = time.monotonic()
    with pytest.raises(RunFailed), Threads([hanging, scripted(1, 10, dying)], joined) as threads:
        threads.have_ended(DEADLINE)
    assert time.monotonic() - begun < DEADLINE / 2
    released.set()
    wait_for_no_threads()


def test_a_worker_still_in_a_step_is_not_saved_when_its_process_leaves(tmp_path, monkeypatch):
    """Its optimizer state has been donated to the step."""
    monkeypatch.setattr(driving, "GRACE", 0.1)
    config = dataclasses.replace(SMALL, groups=1, global_period=None)
    released = threading.Event()
    with MemberFolder(tmp_path, config, range(2)) as folder:
        display = RunProgress(config.steps, log=folder.log, lines=False)
        made = place(1, 2, jax.devices()), setup.make_feed(config), setup.make_model(config)
        member = posted._Member(config, range(2), *made, folder, display, resume=False, host="127.0.0.1")
        hanging = member.workers[0]
        jax.tree.map(lambda x: x.delete(), hanging.optimizer)
        hanging._take_step = lambda *_: released.wait(DEADLINE)
        told = []
        monkeypatch.setattr(display, "message", told.append)

        def until_end(threads, _):
            wait_for(lambda: threads.running() == [hanging])
            return "left", signal.SIGTERM

        monkeypatch.setattr(member, "_until_end", until_end)
        with pytest.raises(Interrupted):
            member.train()
    assert told == ["worker 0 is still in a step, and is not saved again"]
    assert {event["worker"] for event in read_metrics(tmp_path, "checksum")} == {1}
    assert [event["worker"] for event in read_metrics(tmp_path, "end")] == [0, 1]
    released.set()
    wait_for_no_threads()


def wait_for(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for_no_threads():
    wait_for(lambda: not any("_drive" in thread.name for thread in threading.enumerate()))


@pytest.fixture
def command_line(monkeypatch):
    """The command line in this process, whose devices are awake already."""
    monkeypatch.setattr(distributed, "initialize", lambda *_: None)
    monkeypatch.setattr(distributed, "simulate_devices", lambda count: None)


TINY = ["train", "digits", "--groups", "1", "--workers", "2", "--width", "0.25", "--steps", "12", "--eval-every", "4"]


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize(
    "way",
    [
        ["joined", "--min-step-seconds", "0.01", "--slowdowns", "5"],
        ["posted", "--staleness", "2"],
        ["posted", "--method", "easgd"],
        ["posted", "--method", "downpour", "--learning-rates", "linear", "--learning-rate", "0.01"],
    ],
    ids=lambda way: " ".join(way),
)
def test_a_run_writes_its_folder(way, tmp_path):
    assert cli.main([*TINY, "--run-dir", str(tmp_path / "run"), "--asynchronous", *way]) == 0
    assert Config.load(tmp_path / "run").asynchronous == way[0]
    assert (tmp_path / "run" / "curves.png").exists()
    *_, last = read_metrics(tmp_path / "run", "evaluation")
    assert (last["step"], last["count"], last["worker_steps"]) == (12, 24, [[12, 12]])
    assert 0 <= last["center_error"] < 0.9
    assert last["bytes_sent"] > 0
    events = read_metrics(tmp_path / "run", "exchange")
    if way[0] == "joined":
        assert [event["step"] for event in events] == [4, 8, 12]
        assert all(event["count"] >= 2 * event["step"] for event in events)
        assert last["seconds"] >= 12 * 0.05  # What the first worker has slept.
    elif "--method" in way:
        assert sorted((event["worker"], event["worker_step"]) for event in events) == [
            (worker, step) for worker in range(2) for step in (4, 8, 12)
        ]
    else:
        assert {event["worker"] for event in events} == {0, 1}
        assert all(event["leader"] in (0, 1) and event["staleness"] <= 2 for event in events)


@pytest.mark.usefixtures("command_line")
def test_a_failure_is_one_sentence_and_the_exit_code_1(tmp_path, monkeypatch, capsys):
    take_step = asynchronous.Worker.take_step

    def failing(worker):
        take_step(worker)
        if worker.step == 5:
            raise RuntimeError("no more")

    monkeypatch.setattr(asynchronous.Worker, "take_step", failing)
    assert cli.main([*TINY, "--run-dir", str(tmp_path / "run"), "--asynchronous", "joined"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lsgd: ")]
    assert line in [
        f"lsgd: worker {i} failed after 5 steps and has ended the run (RuntimeError: no more)." for i in range(2)
    ]


@pytest.mark.usefixtures("command_line")
def test_workers_who_share_a_device_are_refused(tmp_path, capsys):
    command = ["train", "digits", "--groups", "3", "--workers", "3", "--asynchronous", "posted", "--run-dir"]
    assert cli.main([*command, str(tmp_path / "run")]) == 2
    message = (
        "asynchronous needs one device per worker, but there are 3 devices for 9 workers: lower groups or workers."
    )
    assert capsys.readouterr().err == f"lsgd: {message}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    [["compare", "digits"], ["compile", "digits", "--topology", "v5e:2x4"]],
)
def test_other_commands_refuse_it(command, capsys):
    assert cli.main([*command, "--asynchronous", "joined"]) == 2
    message = f"{command[0]} supports only synchronous training: asynchronous is for train."
    assert capsys.readouterr().err == f"lsgd: {message}\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "local_sgd", "global_period": None}, "asynchronous must be not given for local_sgd, got posted."),
        (
            {"method": "easgd", "global_period": None, "asynchronous": "joined"},
            "asynchronous must be posted or not given for easgd, got joined.",
        ),
        ({"asynchronous": "now"}, "asynchronous must be joined, posted or not given, got 'now'."),
        ({"staleness": -1}, "staleness must be at least 0, got -1."),
        ({"min_step_seconds": -1.0}, "min_step_seconds must be at least 0, got -1.0."),
        ({"slowdowns": (0.0,), "min_step_seconds": 1.0}, r"slowdowns must be positive, got \(0.0,\)."),
        ({"slowdowns": (1.0,) * 5, "min_step_seconds": 1.0}, "slowdowns must be at most 4, one per worker, got"),
        (
            {"task": dataclasses.replace(SMALL.task, model="resnet20"), "batch_statistics": "leader"},
            "batch_statistics must be own, mean or reestimate with posted, got leader.",
        ),
    ],
)
def test_a_configuration_out_of_range_is_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
