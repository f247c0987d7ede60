"""Several real processes, which do what one does, and end together."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lsgd_jax import distributed
from lsgd_jax.distributed.launch import _free_port, launch
from lsgd_jax.tracking.run_folder import read_metrics
from tests.distributed import large_broadcasts, methods
from tests.distributed.methods import BROADCASTS, OF_EACH_EXCHANGE, RUNS
from tests.reliability import commands, faults

DEADLINE = 60
"""Seconds in which all have to end when one has."""


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "results.npz"
    faults.called(1, methods.train, path)
    return np.load(path)


@pytest.mark.parametrize(("processes", "labels"), [(2, OF_EACH_EXCHANGE), (4, list(RUNS))], ids=["2", "4"])
def test_every_method_does_what_it_does_in_one_process(processes, labels, in_one_process, tmp_path):
    """With a group for each process, and with a worker for each, whose groups span processes."""
    faults.called(processes, methods.train, tmp_path / "results.npz", labels)
    results = np.load(tmp_path / "results.npz")
    np.testing.assert_array_equal(results["processes"].flat, np.repeat(range(processes), 4 // processes))
    for label in ("lsgd", "lsgd streamed"):
        np.testing.assert_array_equal(results[f"{label} leaders"], in_one_process[f"{label} leaders"])
        assert len(np.unique(results[f"{label} leaders"])) > 2
    for label in labels:
        for what in (f"{label} path", f"{label} center"):
            np.testing.assert_allclose(results[what], in_one_process[what], rtol=1e-9, atol=1e-9)
    for broadcast in BROADCASTS:
        assert results[f"lsgd by {broadcast} path"].tobytes() == results["lsgd path"].tobytes()


def test_large_parts_arrive_whole():
    faults.called(2, large_broadcasts.main)


def metrics(path):
    return [
        {key: value for key, value in entry.items() if key != "seconds"}
        for event in ("exchange", "evaluation")
        for entry in read_metrics(path, event)
    ]


def assert_same_metrics(path, other):
    assert len(metrics(path)) == len(metrics(other)) > 0
    for entry, expected in zip(metrics(path), metrics(other), strict=True):
        assert entry.keys() == expected.keys()
        for name, value in expected.items():
            if name in ("event", "step", "leader", "local_leaders"):
                assert entry[name] == value
            else:
                np.testing.assert_allclose(entry[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture
def launched(tmp_path):
    """A folder of its own, since what runs in it in the end is killed."""
    (folder := tmp_path / "launched").mkdir()
    return folder


def test_training_writes_the_run_folder_of_one_process(lsgd, launched, tmp_path):
    """With learning rates by the clock, which all processes have to read alike."""
    train = ["train", "digits", "--workers", "2", "--width", "0.1", "--steps", "20", "--eval-every", "10"]
    train += ["--learning-rate-drops", "1e-9", "--learning-rate-drops-in", "seconds", "--run-dir"]
    code, _, errors = lsgd(*train, "one")
    assert code == 0, errors
    code, errors = commands.done("launch", "--processes", "2", "--", *train, "two", cwd=launched)
    assert code == 0, errors
    assert (launched / "output.out").read_text().startswith("[0] test error of the evaluated model after 20 steps: ")
    assert [line[:12] for line in errors] == ["[0] step 10/", "[0] step 20/"]
    assert sorted(os.listdir(launched / "two")) == sorted(os.listdir(tmp_path / "one"))
    told = json.loads((launched / "two" / "environment.json").read_text())
    assert told["command"] == " ".join(["lsgd", *train, "two"])
    assert_same_metrics(launched / "two", tmp_path / "one")


def test_processes_decode_the_images_of_their_own_workers(lsgd, launched, prepared, tmp_path):
    train = ["train", "resnet50-imagenet-4", "--model", "mlp", "--width", "0.1", "--image-size", "16"]
    train += ["--groups", "1", "--workers", "2", "--batch", "per_worker", "--batch-size", "2", "--steps", "4"]
    train += ["--eval-every", "4", "--learning-rate", "0.001", "--data-dir", str(prepared[0]), "--run-dir"]
    code, _, errors = lsgd(*train, "one", "--data-processes", "0")
    assert code == 0, errors
    train += ["two", "--data-processes", "1"]
    code, errors = commands.done("launch", "--processes", "2", "--devices-per-process", "1", "--", *train, cwd=launched)
    assert code == 0, errors
    assert_same_metrics(launched / "two", tmp_path / "one")


def test_what_gloo_tells_is_left_out_and_nothing_else(tmp_path):
    """Two of its threads can mix their lines; what they leave over is empty or a number."""
    told = "[Gloo] Rank 0 is [Gloo] Rank 1 is connected to 1 peer ranks. Expected"
    lines = ["first", "", told, "", "1", "1 is the last", "", "1", told, "end"]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    assert commands.called(launch, ["cat", "lines"], 1, cwd=tmp_path)[0] == 0
    forwarded = (tmp_path / "output.out").read_text().splitlines()
    assert forwarded == ["[0] " + lines[i] for i in (0, 1, 5, 6, 7, 9)]


def test_a_mistake_that_all_see_is_told_by_the_first(tmp_path):
    train = ["train", "digits", "--workers", "3", "--groups", "1"]
    variables = {distributed.COORDINATOR: f"127.0.0.1:{_free_port()}", distributed.PROCESSES: "2"}

    def started(number):
        return commands.started(*train, cwd=tmp_path, output=number, **variables, **{distributed.PROCESS: number})

    with started("0") as first, started("1") as second:
        code, [error] = first.end()
        assert second.end() == (2, [])
    assert code == 2
    assert error.startswith("lsgd: 3 workers can't be distributed evenly among 2 processes: change groups")


def test_a_mistake_that_only_the_first_sees_ends_all_with_one_sentence(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    train = ["train", "digits", "--run-dir", "full"]
    code, errors = commands.done("launch", "--processes", "2", "--", *train, cwd=tmp_path)
    message = "the run folder full is not empty: name another run_dir, or resume the run."
    assert (code, errors) == (2, [f"[0] lsgd: {message}"])


@pytest.mark.parametrize("process", [0, 1])
def test_compare_is_for_one_process(process, lsgd, monkeypatch):
    """Which the first process says."""
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "process_index", lambda: process)
    message = "compare runs in one process, but this is one of several: only train supports several."
    assert lsgd("compare", "digits") == (2, "", "" if process else f"lsgd: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--processes", "2", "--", "compare", "digits"],
            "launch supports only train, as in lsgd launch ",
        ),
        (["--processes", "0", "--", "train", "digits"], "processes must be at least 1, got 0."),
        (["--processes", "2", "--heartbeat", "0", "--", "train", "digits"], "heartbeat must be at least 1, got 0."),
        (
            ["--processes", "2", "--", "train", "digits", "--perid", "4"],
            "there is no option '--perid'; did you mean --period?",
        ),
    ],
)
def test_a_wrong_command_exits_with_2(arguments, message, lsgd):
    code, _, errors = lsgd("launch", *arguments)
    assert code == 2
    assert message in errors


def test_wrong_variables_are_one_sentence(tmp_path):
    variables = {"LSGD_COORDINATOR": "localhost:1234", "LSGD_PROCESSES": "2"}
    code, [error] = commands.done("train", "digits", cwd=tmp_path, **variables)
    assert code == 2
    assert error.endswith(" must be host:port, a number and a lower number, got 'localhost:1234', '2' and ''.")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # The latter if it ends between opening and reading.
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.fixture
def training(tmp_path):
    """A launcher of two processes without an end."""
    command = ["launch", "--processes", "2", "--", "train", "digits", "--steps", "10000000", "--eval-every", "4"]
    with commands.started(*command, "--run-dir", "run", cwd=tmp_path) as launcher:
        wait_until(lambda: len(faults.children(launcher.pid)) == 2, 60)
        yield launcher, faults.children(launcher.pid), tmp_path / "output.err"


def assert_all_end(launcher, processes, code):
    wait_until(lambda: launcher.over, DEADLINE)
    assert launcher.end()[0] == code
    wait_until(lambda: not any(alive(pid) for pid in processes), DEADLINE)


def test_a_killed_process_ends_all(training):
    launcher, processes, output = training
    wait_until(lambda: "[0] step" in output.read_text(), 120)
    os.kill(processes[1], signal.SIGKILL)
    assert_all_end(launcher, processes, 128 + signal.SIGKILL)
    assert output.read_text().endswith("lsgd: process 1 was killed by SIGKILL; the others were stopped.\n")


def test_a_killed_launcher_ends_all(training):
    launcher, processes, output = training
    wait_until(lambda: "[0] step" in output.read_text(), 120)
    os.kill(launcher.pid, signal.SIGKILL)
    assert_all_end(launcher, processes, -signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_and_a_termination_end_all(number, training):
    launcher, processes, _ = training
    os.kill(launcher.pid, number)
    assert_all_end(launcher, processes, 128 + number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_tells_of_a_stop_that_its_processes_can_not(number, tmp_path):
    stopped = f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(300)"
    told = [f"lsgd: stopped by {number.name}."]
    assert commands.called(launch, [sys.executable, "-c", stopped], 1, cwd=tmp_path) == (128 + number, told)


@pytest.mark.parametrize(("last", "code", "told"), [(0, 0, []), (143, 143, ["lsgd: stopped by SIGTERM."])])
def test_a_stop_when_all_is_done_is_none(last, code, told, tmp_path):
    """Unless another process than the first, which is done and says nothing, was stopped."""
    program = f"""
import os, signal, sys, time
from pathlib import Path

number = int(os.environ["LSGD_PROCESS"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(number and {last}))
Path(str(number)).touch()
while not (Path("0").exists() and Path("1").exists()):
    time.sleep(0.01)
if number == 0:
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(300)
"""
    assert commands.called(launch, [sys.executable, "-c", program], 2, cwd=tmp_path) == (code, told)
