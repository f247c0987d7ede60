"""The options of `lsgd launch` and `lsgd join`, without the processes."""

import contextlib
import re
import sys

import pytest

from lsgd_jax import cli
from lsgd_jax.distributed import launch, supervision
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.member_folder import MemberFolder
from lsgd_jax.tracking.run_folder import RunFolder

CONFIG = PRESETS["digits"].replace(groups=1, workers=4, asynchronous="posted")
POSTED = ["--", "train", "digits", "--asynchronous", "posted"]


@pytest.fixture
def started(monkeypatch):
    """What is started instead of processes."""
    calls = []
    for module, name in ((supervision, "supervise"), (launch, "launch")):
        monkeypatch.setattr(module, name, lambda *a, _name=name, **options: calls.append((_name, a, options)) or 0)
    return calls


def test_posted_processes_are_supervised_in_one_folder(started):
    assert cli.main(["launch", "--processes", "2", *POSTED]) == 0
    assert cli.main(["launch", "--processes", "2", "--restarts", "3", "--hang-seconds", "9", "--detach", *POSTED]) == 0
    assert cli.main(["launch", "--processes", "2", *POSTED, "--run-dir", "here"]) == 0
    [(_, (command, *_), first), (_, _, second), (name, (in_folder, processes, devices), _)] = started
    assert first == {"restarts": 10, "hang_seconds": 300.0, "detached": False}
    assert second == {"restarts": 3, "hang_seconds": 9.0, "detached": True}
    assert command[:-2] == [sys.executable, "-m", "lsgd_jax", *POSTED[1:]]
    assert re.fullmatch(r"runs/mlp-digits-\d{8}-\d{6}", command[-1])
    assert in_folder == [sys.executable, "-m", "lsgd_jax", *POSTED[1:], "--run-dir", "here"]
    assert (name, processes, devices) == ("supervise", 2, None)


def test_others_are_launched_together(started):
    assert cli.main(["launch", "--processes", "2", "--restarts", "1", "--", "train", "digits", "--run-dir", "a"]) == 0
    [(name, arguments, _)] = started
    assert (name, arguments[1:]) == ("launch", (2, None, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--restarts", "1", "--", "train", "digits"], "restarts resume in the run's folder: name it with --run-dir."),
        (["--restarts", "-1", *POSTED], "restarts must be at least 0, got -1."),
        (["--hang-seconds", "nan", *POSTED], "hang_seconds must be at least 0, got nan."),
        (["--detach", "--", "train", "digits"], "detach has no effect unless training is posted."),
        (["--hang-seconds", "1", "--", "train", "digits"], "hang_seconds has no effect unless training is posted."),
        ([*POSTED, "--period", "0"], "period must be at least 1, got 0."),
    ],
)
def test_a_mistake_is_one_sentence_of_the_launcher(arguments, message, started, capsys):
    assert cli.main(["launch", "--processes", "2", *arguments]) == 2
    assert capsys.readouterr().err == f"lsgd: {message}\n"
    assert started == []


@pytest.fixture
def joined(monkeypatch):
    """The workers of each process that has joined."""
    found = []
    monkeypatch.setattr("lsgd_jax.distributed.simulate_devices", lambda count: None)
    train = "lsgd_jax.train.train_and_evaluate"
    monkeypatch.setattr(train, lambda *_, positions, **options: found.append((positions, options)))
    return found


def test_who_joins_takes_the_first_vacant_places(joined, tmp_path):
    run = tmp_path / "run"
    with MemberFolder(run, CONFIG, [0]), MemberFolder(run, CONFIG, [2]):
        assert cli.main(["join", str(run)]) == 0
    with MemberFolder(run, CONFIG, [0], resume=True):
        assert cli.main(["join", str(run), "--workers", "2", "--host", "10.0.0.1"]) == 0
        assert cli.main(["join", str(run), "--first", "3"]) == 0
    assert [positions for positions, _ in joined] == [range(1, 2), range(1, 3), range(3, 4)]
    assert [options["host"] for _, options in joined] == ["127.0.0.1", "10.0.0.1", "127.0.0.1"]
    assert all(options["resume"] for _, options in joined)


def test_who_comes_too_late_to_a_place_takes_the_next(tmp_path, monkeypatch, capsys):
    """Others take the first place while this process reads the data; the place that is named is not changed."""
    tried, others = [], contextlib.ExitStack()

    def train(config, path, *, positions, **_):
        tried.append(positions)
        if positions == range(1):
            others.enter_context(MemberFolder(tmp_path, CONFIG, [0]))
        with MemberFolder(path, config, positions, resume=True):
            pass

    monkeypatch.setattr("lsgd_jax.distributed.simulate_devices", lambda count: None)
    monkeypatch.setattr("lsgd_jax.train.train_and_evaluate", train)
    with others, MemberFolder(tmp_path, CONFIG, [2]):
        assert cli.main(["join", str(tmp_path)]) == 0
        assert cli.main(["join", str(tmp_path), "--first", "2"]) == 2
    assert tried == [range(1), range(1, 2), range(2, 3)]
    assert " is being written by process " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "5"], "workers must be in [1, 4], got 5."),
        (["--workers", "2", "--first", "3"], "first must be in [0, 2], got 3."),
        (
            ["--workers", "3"],
            "there is no place for 3 consecutive workers in {run}: 2 of its 4 workers are training.",
        ),
    ],
)
def test_where_nobody_can_join_it_is_one_sentence(options, message, joined, tmp_path, capsys):
    run = tmp_path / "run"
    with MemberFolder(run, CONFIG, [1, 2]):
        assert cli.main(["join", str(run), *options]) == 2
    assert capsys.readouterr().err == f"lsgd: {message.format(run=run)}\n"
    assert joined == []


def test_who_can_not_write_the_folder_is_told_so(joined, tmp_path, capsys):
    with MemberFolder(tmp_path, CONFIG, [0]):
        (tmp_path / "workers" / "1").write_text("no folder")
        assert cli.main(["join", str(tmp_path)]) == 2
    lock = tmp_path / "workers" / "1" / ".lock"
    message = f"{lock} can't be opened (Not a directory): nobody can join from here."
    assert (capsys.readouterr().err, joined) == (f"lsgd: {message}\n", [])


def test_a_run_that_is_not_posted_is_not_joined(tmp_path, capsys):
    with RunFolder(tmp_path, CONFIG.replace(asynchronous=None)):
        assert cli.main(["join", str(tmp_path)]) == 2
    message = f"only a posted run can be joined, and the one in {tmp_path} is not posted."
    assert capsys.readouterr().err == f"lsgd: {message}\n"


def test_an_interface_is_for_posted_processes(capsys):
    assert cli.main(["train", "digits", "--host", "10.0.0.1"]) == 2
    assert capsys.readouterr().err == "lsgd: host has no effect unless training is posted.\n"
