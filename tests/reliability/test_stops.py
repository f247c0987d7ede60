"""Signals that ask for a stop, wherever a run is and whatever it saves."""

import contextlib
import os
import re
import signal
import socket
import subprocess

import pytest

from lsgd_jax import cli
from lsgd_jax.distributed import interruption
from lsgd_jax.distributed.launch import _free_port
from tests.reliability import commands, faults
from tests.reliability.commands import started
from tests.reliability.faults import LSGD, until, wait_for_step
from tests.reliability.test_processes import IMAGENET, LAUNCH, TRAIN

ENDLESS = ["--steps", "1000000"]
ASYNCHRONOUS = ["--checkpoint-every", "None", "--asynchronous"]


@pytest.fixture
def ended(monkeypatch):
    """The signals on which this process would have ended, with the notes."""
    ends = []
    monkeypatch.setattr(interruption, "end_process", lambda *end: ends.append(end))
    return ends


class Callback:
    """Takes a signal where what a handler raises is lost."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_callback_is_not_lost(number, ended):
    before = signal.getsignal(number)
    with interruption.stopped_at_once("nothing was saved"):
        Callback(number)
        until(lambda: ended)
        with interruption.deferred_signals() as asked_to_stop:
            assert asked_to_stop() is None
            Callback(number)
            until(asked_to_stop)
            assert asked_to_stop() == number
    assert ended == [(number, "nothing was saved")]
    assert signal.getsignal(number) == before


def test_only_an_interrupt_overtakes_a_signal_that_waits(ended):
    with interruption.deferred_signals() as asked_to_stop:
        signal.raise_signal(signal.SIGTERM)
        until(asked_to_stop)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        until(lambda: ended)
        assert asked_to_stop() == signal.SIGTERM
    assert ended == [(signal.SIGINT, "a second signal does not wait for a checkpoint")]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert interruption.stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGINT, ["--checkpoint-every", "0"]),
        (signal.SIGTERM, ["--checkpoint-every", "0", "--asynchronous", "posted"]),
    ],
)
def test_a_run_that_is_not_saved_stops_at_once(number, options, tmp_path):
    with started(*TRAIN, "run", *ENDLESS, *options, cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run", 4)
        os.kill(command.pid, number)
        code, errors = command.end()
    assert code == 128 + number
    step = r" after step \d+ of \d+" if "posted" in options else ""  # Posted workers end their steps first.
    assert re.fullmatch(f"lsgd: stopped by {number.name}{step}; nothing was saved.", errors[-1])


def test_several_processes_that_are_not_saved_stop_at_once(tmp_path):
    with started(*LAUNCH, "--", *TRAIN, "run", *ENDLESS, *ASYNCHRONOUS, "joined", cwd=tmp_path) as launcher:
        wait_for_step(tmp_path / "run", 4)
        os.kill(launcher.pid, signal.SIGTERM)
        code, errors = launcher.end()
    assert code == 128 + signal.SIGTERM
    assert "[0] lsgd: stopped by SIGTERM; nothing was saved." in errors


def test_an_interrupt_while_waiting_for_other_processes_stops_at_once(tmp_path):
    port = _free_port()
    variables = {"LSGD_COORDINATOR": f"127.0.0.1:{port}", "LSGD_PROCESSES": "2", "LSGD_PROCESS": "0"}
    with started(*TRAIN, "run", cwd=tmp_path, **variables) as command:

        def is_waiting():
            assert not command.over
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True

        until(is_waiting)
        os.kill(command.pid, signal.SIGINT)
        code, errors = command.end()
    assert code == 128 + signal.SIGINT
    assert errors[-1].startswith("lsgd: stopped by SIGINT; no step was under way, and the same command ")


def test_an_interrupt_of_decoders_too_stops_the_run_after_a_checkpoint(prepared, tmp_path):
    """As that of a terminal, which goes to all of its processes."""
    train = [*LSGD, *IMAGENET, str(prepared[0]), "--data-processes", "2", *ENDLESS, "--checkpoint-every", "100000"]
    train += ["--run-dir", "run"]
    with subprocess.Popen(
        train, cwd=tmp_path, env=faults.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            wait_for_step(tmp_path / "run", 16)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=faults.HANG)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT, errors
    [line] = errors.splitlines()
    assert line.startswith("lsgd: stopped by SIGINT after step ")


def interrupted_at_once(*arguments):
    cli._run = lambda _: signal.raise_signal(signal.SIGINT)
    return commands.lsgd(*arguments)


def test_an_interrupt_of_any_command_is_one_sentence(tmp_path):
    """Of one that handles none itself, or is only reading its options."""
    stopped = (128 + signal.SIGINT, ["lsgd: stopped by SIGINT."])
    assert commands.called(interrupted_at_once, "info", cwd=tmp_path) == stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_jax_is_imported_is_one_sentence(number, tmp_path):
    """The module that stands for it is imported first."""
    (tmp_path / "jax.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep({faults.HANG})")
    process = subprocess.run(
        [*LSGD, *TRAIN, "run"],
        capture_output=True,
        text=True,
        timeout=faults.HANG,
        check=False,
        cwd=tmp_path,
        env=faults.environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(faults.ROOT)])},
    )
    assert process.returncode == 128 + number
    assert process.stderr == f"lsgd: stopped by {number.name}.\n"
