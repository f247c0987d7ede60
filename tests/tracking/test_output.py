"""Output that goes away, and files of a run that do."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from lsgd_jax import cli, distributed, train
from lsgd_jax.errors import UsageError
from lsgd_jax.tracking import environment
from lsgd_jax.tracking.output import Output
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train.checkpoint import Checkpoints
from tests.reliability import faults
from tests.reliability.runs import SMALL


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def full_device():
    return open("/dev/full", "w")


def test_a_source_tree_that_is_not_installed_has_no_version(monkeypatch):
    def version(package):
        if package == "lsgd-jax":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(environment, "version", version)
    packages = environment.environment()["packages"]
    assert (packages["lsgd-jax"], packages["jax"]) == ("not installed", "1.0")


GONE = [(closed_pipe, "Broken pipe"), (full_device, "No space left on device")]


@pytest.mark.parametrize(("stream", "reason"), GONE)
def test_a_stream_that_is_gone_never_fails(stream, reason):
    with stream() as gone:
        output = Output(gone)
        output.write("dropped")
        assert output.problem is None  # It is buffered.
        output.flush()
        print("dropped", file=output, flush=True)
        assert output.problem.strerror == reason


@pytest.mark.parametrize(("stream", "reason"), GONE)
@pytest.mark.parametrize("asynchronous", [None, "joined"])
def test_training_goes_on_without_output_and_says_so_once(stream, reason, asynchronous, tmp_path, monkeypatch):
    config = SMALL.replace(asynchronous=asynchronous, steps=24, eval_every=8)
    with stream() as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        train.train_and_evaluate(config, tmp_path / "run")
    [event] = read_metrics(tmp_path / "run", "output_lost")
    assert event["reason"] == reason
    assert 8 <= event["step"] < 24
    assert read_metrics(tmp_path / "run", "evaluation")[-1]["step"] == 24


@pytest.mark.parametrize(
    ("stream", "code", "message"),
    [(closed_pipe, 0, ""), (full_device, 2, "lsgd: the output can't be written (No space left on device).\n")],
)
def test_a_short_command_whose_output_is_gone(stream, code, message, monkeypatch, capsys):
    with stream() as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["info"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("stream", [closed_pipe, full_device])
def test_a_run_whose_last_line_is_lost_is_done(stream, tmp_path, monkeypatch):
    """And so is one whose errors can't be told: it has the same exit code."""
    for name in ("initialize", "simulate_devices"):
        monkeypatch.setattr(distributed, name, lambda *_: None)
    command = ["train", "digits", "--width", "0.1", "--steps", "8", "--run-dir", str(tmp_path / "run")]
    with stream() as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(sys, "stderr", gone)
        assert cli.main(command) == 0
        assert cli.main(command) == 2  # The folder is not empty.


PRINTING = """
import sys
try:
    while True:
        print("line", flush=True)
except BrokenPipeError:
    open("told", "w").close()
    sys.stdout = None
"""


def test_processes_know_when_what_they_print_goes_nowhere(tmp_path):
    launch = "import sys; from lsgd_jax.distributed.launch import launch; sys.exit(launch(sys.argv[1:], 1))"
    command = [sys.executable, "-c", launch, sys.executable, "-c", PRINTING]
    environment = faults.environment()
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == b"[0] line\n"
        launcher.stdout.close()
        launcher.wait(faults.HANG)
    assert (tmp_path / "told").exists()


def test_streams_may_be_closed_from_the_start():
    command = f"{sys.executable} -m lsgd_jax --version >&- 2>&-"
    assert subprocess.run(command, shell=True, timeout=60).returncode == 0


def test_metrics_that_are_gone_are_one_sentence(tmp_path):
    message = r"^the metrics in .*run can't be written \(No such file or directory\)\.$"
    with RunFolder(tmp_path / "run", SMALL) as folder:
        folder.log("exchange", step=4)
        (tmp_path / "run" / "metrics.jsonl").unlink()
        with pytest.raises(UsageError, match=message):
            folder.log("exchange", step=8)
        with pytest.raises(UsageError, match=message):
            folder.length()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("kind", "name"), [(RunFolder, "log"), (Checkpoints, "save")])
def test_a_folder_that_is_removed_ends_the_run(kind, name, tmp_path, monkeypatch):
    """After an event, or after a checkpoint is written."""
    method = getattr(kind, name)

    def removing(owner, *arguments, **values):
        method(owner, *arguments, **values)
        if kind is Checkpoints:
            owner._finish()
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(kind, name, removing)
    with pytest.raises(UsageError, match=r"^the metrics in .*run can't be written \(No such file or directory\)\.$"):
        train.train_and_evaluate(SMALL, tmp_path / "run", lines=False)
    assert not (tmp_path / "run").exists()
