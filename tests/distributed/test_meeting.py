"""Processes that meet late, twice, never, or beside strangers; most are threads here, which meet alike."""

import os
import re
import signal
import socket
import threading
from contextlib import contextmanager, suppress

import jax
import pytest

from lsgd_jax import cli, distributed
from lsgd_jax.distributed import meeting, processes
from lsgd_jax.distributed.launch import _free_port
from lsgd_jax.errors import UsageError
from tests.distributed import listening
from tests.reliability import commands
from tests.reliability.faults import until

HANG = 120
ALONE = "to train alone, give --processes 1 or set LSGD_PROCESSES=1."
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[1-4]",
}
"""What the only process of a step of four sees."""


@pytest.fixture
def address():
    return f"127.0.0.1:{_free_port()}"


class Thread(threading.Thread):
    """A process that meets the others."""

    def __init__(self, address, count, number, timeout=HANG):
        super().__init__(daemon=True)
        self._arguments = (address, count, number, address, 0.2, timeout)
        self.error = None
        self.start()

    def run(self):
        try:
            meeting.meet(*self._arguments)
        except UsageError as error:
            self.error = error

    def end(self):
        self.join(HANG)
        assert not self.is_alive()
        if self.error:
            raise self.error


def wait_for(sentence, capsys):
    """Until it is on standard error."""
    told, waited = "", threading.Event()
    for _ in range(HANG * 20):
        told += capsys.readouterr().err
        if sentence in told:
            return
        waited.wait(0.05)
    raise TimeoutError(f"{sentence!r} is not in {told!r}")


def test_whoever_is_missing_is_named_until_all_have_come(address, capsys):
    second = Thread(address, 4, 2)
    wait_for(f"process 2 of 4 finds no process 0 at {address} (Connection refused); {ALONE}\n", capsys)
    first = Thread(address, 4, 0)
    wait_for(f"process 0 of 4 waits at {address} for processes 1 and 3; {ALONE}\n", capsys)
    others = [Thread(address, 4, 3)]
    wait_for(f"process 0 of 4 waits at {address} for process 1; {ALONE}\n", capsys)
    others.append(Thread(address, 4, 1))
    for process in (first, second, *others):
        process.end()


def test_after_a_while_they_give_up(address):
    first = Thread(address, 20, 0, timeout=1)
    missing = "1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 others"
    with pytest.raises(
        UsageError, match=f"^after 1 seconds process 0 of 20 waits at {address} for processes {missing}: "
    ):
        first.end()
    with pytest.raises(UsageError, match=f"^after 1 seconds process 1 of 2 finds no process 0 at {address} "):
        Thread(address, 2, 1, timeout=1).end()


@pytest.mark.parametrize(("given", "seconds"), [({}, (300, 100)), ({"JOIN_TIMEOUT": "7", "HEARTBEAT": "9"}, (7, 9))])
def test_how_long_processes_wait_is_what_the_environment_says(given, seconds, address, monkeypatch):
    here = {"LSGD_COORDINATOR": address, "LSGD_PROCESSES": "2", "LSGD_PROCESS": "0"}
    for name, value in (here | {f"LSGD_{name}": value for name, value in given.items()}).items():
        monkeypatch.setenv(name, value)
    met, connected = [], {}
    monkeypatch.setattr(processes, "meet", lambda *arguments: met.append(arguments))
    monkeypatch.setattr(processes, "_keep_collectives_on_loopback", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: connected.update(options))
    distributed.initialize()
    assert met == [(address, 2, 0, address, 5, seconds[0])]
    assert (connected["initialization_timeout"], connected["heartbeat_timeout_seconds"]) == seconds


@pytest.mark.parametrize("name", ["LSGD_JOIN_TIMEOUT", "LSGD_HEARTBEAT"])
@pytest.mark.parametrize("value", ["0", "1.5", "-1", "soon", str(2**31)])
def test_seconds_that_are_none_are_one_sentence(name, value, address, monkeypatch):
    here = {"LSGD_COORDINATOR": address, "LSGD_PROCESSES": "2", "LSGD_PROCESS": "0", name: value}
    for variable, text in here.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"^{name} must be a whole number of seconds, at least 1, got '{value}'\\.$"):
        distributed.initialize()


@contextmanager
def connected(address, text):
    with socket.create_connection(meeting.host_and_port(address), timeout=HANG) as connection:
        connection.sendall(text)
        yield connection


def test_strangers_and_those_who_leave_are_not_counted(address, capsys):
    first = Thread(address, 3, 0)
    wait_for("for processes 1 and 2; ", capsys)
    with connected(address, bytes(2**16)) as stranger, connected(address, b"lsgd process 0 of 3\n"):
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        with connected(address, b"lsgd process 1 of 3\n") as process:
            assert process.recv(7) == b"joined\n"
            wait_for("for process 2; ", capsys)
        wait_for("for processes 1 and 2; ", capsys)
        others = [Thread(address, 3, number) for number in (1, 2)]
        for process in (first, *others):
            process.end()


def test_two_of_one_number_and_other_counts_are_refused(address, capsys):
    first, second = Thread(address, 3, 0), Thread(address, 3, 1)
    wait_for("for process 2; ", capsys)
    with pytest.raises(UsageError, match=r"^there is no place for another process 1 of 3: give each "):
        Thread(address, 3, 1).end()
    with pytest.raises(UsageError, match=r"^process 0 is one of 3 processes, process 2 one of 4: tell all the same "):
        Thread(address, 4, 2).end()
    for process in (first, second, Thread(address, 3, 2)):
        process.end()


def test_whatever_else_answers_is_no_process_0(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = Thread(address, 2, 1)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0\r\n")
        connection.close()
        wait_for(f"process 1 of 2 finds no process 0 at {address} (timed out); ", capsys)  # It says nothing any more.
    Thread(address, 2, 0).end()
    process.end()


@pytest.mark.parametrize(
    ("coordinator", "listens_at"),
    [
        ("127.0.0.1:1234", "127.0.0.1:1234"),
        ("localhost:1234", "localhost:1234"),
        ("[::1]:1234", "[::1]:1234"),
        ("host0:1234", "[::]:1234"),
    ],
)
def test_an_ip_address_is_where_process_0_listens(coordinator, listens_at):
    assert processes._named_place(coordinator, "2", "0").listens_at == listens_at


def impatient(function, *arguments):
    """Say after a second whom a function waits for."""
    meet = meeting.meet
    processes.meet = lambda *where: meet(*where[:4], 1.0, where[5])
    return function(*arguments)


def by_hand():
    distributed.initialize()
    jax.devices()
    print(distributed.process_count(), listening.only_loopback(), flush=True)


def test_processes_started_by_hand_meet_on_loopback_alone(address, tmp_path):
    """The first to come says whom it waits for."""
    named = {"LSGD_COORDINATOR": address, "LSGD_PROCESSES": "2"}
    with commands.calling(impatient, by_hand, cwd=tmp_path, output="1", **named, LSGD_PROCESS="1") as second:
        until(lambda: second.errors)
        told = f"process 1 of 2 finds no process 0 at {address} (Connection refused); {ALONE}"
        assert second.errors == [told]
        with commands.calling(by_hand, cwd=tmp_path, output="0", **named, LSGD_PROCESS="0") as first:
            for name, process in {"0": first, "1": second}.items():
                code, errors = process.end()
                assert code == 0, errors
                assert (tmp_path / f"{name}.out").read_text().endswith("2 True\n"), errors


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        named = {"LSGD_COORDINATOR": address, "LSGD_PROCESSES": "2", "LSGD_PROCESS": "0"}
        code, errors = commands.done("train", "digits", cwd=tmp_path, **named)
    assert code == 2
    assert errors == [
        f"lsgd: process 0 can't listen at {address} (Address already in use):"
        " name a free port of its machine in LSGD_COORDINATOR or, in a cluster, in JAX_COORDINATOR_PORT."
    ]


def test_one_process_of_a_slurm_step_of_four_names_the_others_and_can_be_interrupted(tmp_path):
    port = str(_free_port())
    train = [impatient, commands.lsgd, "train", "digits"]
    with commands.calling(*train, cwd=tmp_path, **SLURM, JAX_COORDINATOR_PORT=port) as waiting:
        until(lambda: waiting.errors)
        assert waiting.errors == [f"process 0 of 4 waits at node1:{port} for processes 1, 2 and 3; {ALONE}"]
        os.kill(waiting.pid, signal.SIGINT)
        code, [_, stopped] = waiting.end()
    assert stopped.startswith("lsgd: stopped by SIGINT; no step was under way, and the same command resumes with")
    assert code == 128 + signal.SIGINT


@pytest.mark.parametrize("launched", [True, False])
def test_whoever_is_missing_is_named_within_10_seconds(launched, address, monkeypatch):
    class Meeting(Exception):  # noqa: N818 - it is no error.
        pass

    def meet(address, count, number, listens_at, patience, seconds):
        raise Meeting(patience)

    monkeypatch.setattr(processes, "meet", meet)
    monkeypatch.setattr(processes, "_end_with_launcher", lambda _: None)
    for name, value in {"COORDINATOR": address, "PROCESSES": "2", "PROCESS": "0"}.items():
        monkeypatch.setenv(f"LSGD_{name}", value)
    if launched:
        monkeypatch.setenv("LSGD_LAUNCHER", "3")
    with pytest.raises(Meeting) as met:
        distributed.initialize()
    assert met.value.args[0] <= 10


@pytest.mark.parametrize(("variables", "count"), [({"LSGD_PROCESSES": "1"}, None), ({}, 1)])
def test_one_process_trains_alone_wherever_it_is(variables, count, monkeypatch):
    for name, value in (SLURM | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "meet", None)
    distributed.initialize(count)
    assert distributed.process_count() == 1


def test_the_option_counts_as_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("LSGD_PROCESSES", "2")
    assert cli.main(["train", "digits", "--processes", "1"]) == 2
    assert capsys.readouterr().err == "lsgd: --processes 1 contradicts LSGD_PROCESSES=2: leave out one of them.\n"


@pytest.mark.parametrize(
    ("variables", "processes", "message"),
    [
        ({}, 3, "must be host:port, a number and a lower number, got '', '3' and ''."),
        (SLURM | {"JAX_COORDINATOR_BIND_ADDRESS": "eth0"}, None, "an address must be host:port, got 'eth0'."),
        ({"LSGD_COORDINATOR": "host0:99999"}, 2, "must be host:port, a number and a lower number, got 'host0:99999'"),
        (SLURM | {"SLURM_NTASKS": "four"}, None, "JAX can't tell this process's place in its cluster: invalid literal"),
        ({"JAX_COORDINATOR_ADDRESS": "host0:1"}, None, "JAX_COORDINATOR_ADDRESS is set, but JAX detects no cluster: "),
        (
            {"LSGD_LAUNCHER": "x"},
            None,
            "LSGD_LAUNCHER is for lsgd launch to set, to a pipe's number, got 'x': unset it.",
        ),
        ({"LSGD_LAUNCHER": "9999"}, None, "to a pipe's number, got '9999': unset it."),
    ],
)
def test_variables_that_name_no_place_are_one_sentence(variables, processes, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(message)):
        distributed.initialize(processes)
