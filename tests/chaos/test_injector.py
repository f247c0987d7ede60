"""The injector, on processes that sleep and a folder as if they trained."""

import json
import os
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lsgd_jax.asynchronous.links import Links
from lsgd_jax.chaos import Fault, Injector
from lsgd_jax.chaos.faults import DELAY, LEADER

HANG = 30


@pytest.fixture
def sleeping(tmp_path):
    """Three processes of two workers each."""
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(3)]
    (tmp_path / "members").mkdir()
    for number, process in enumerate(processes):
        for worker in (2 * number, 2 * number + 1):
            folder = tmp_path / "workers" / str(worker)
            folder.mkdir(parents=True)
            (folder / ".lock").write_text(f"process {process.pid} on {socket.gethostname()}\n")
            (tmp_path / "members" / f"worker-{worker}-life-1").write_text(f"127.0.0.1:{number}\n")
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def injector(sleeping, tmp_path):
    workers = [range(2), range(2, 4), range(4, 6)]
    injector = Injector(tmp_path, os.getpid(), tmp_path / "links.json", workers)
    yield injector
    injector.close()


def state(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(state_of, process):
    end = time.monotonic() + HANG
    while state(process) not in state_of:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_kill_kills_and_says_whom(injector, sleeping):
    record = injector.inject(Fault(1.0, "kill", (1,)))
    assert sleeping[1].wait(HANG) == -signal.SIGKILL
    assert record["hit"] == [{"worker": 2, "life": 1}, {"worker": 3, "life": 1}]
    assert (record["fault"], record["kind"], record["seconds"]) == ("1 kill 1", "kill", 0.0)
    assert abs(record["time"] - time.time()) < HANG
    assert injector.inject(Fault(2.0, "kill", (1,)))["hit"] == []
    assert [process.poll() for process in sleeping] == [None, -signal.SIGKILL, None]


def test_a_stopped_process_goes_on(injector, sleeping, monkeypatch):
    clock = SimpleNamespace(time=time.time, monotonic=lambda: 100.0)
    monkeypatch.setattr("lsgd_jax.chaos.injector.time", clock)
    injector.inject(Fault(1.0, "stop", (0, 2), 3.0))
    clock.monotonic = lambda: 102.9
    injector.tick()
    wait_for("T", sleeping[0])
    wait_for("T", sleeping[2])
    assert state(sleeping[1]) != "T"
    clock.monotonic = lambda: 103.1
    injector.tick()
    wait_for("SR", sleeping[0])
    wait_for("SR", sleeping[2])


def test_a_process_with_a_full_disk_can_write_again(injector, sleeping):
    pids = [process.pid for process in sleeping]
    before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
    injector.inject(Fault(1.0, "disk", (1,), 60.0))
    during = [resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] for pid in pids]
    assert during == [before[0][0], 0, before[2][0]]
    injector.close()
    assert [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids] == before


def test_processes_of_others_are_left_alone(injector, sleeping, tmp_path):
    """As where the id of one that has died is that of another program by now."""
    (tmp_path / "workers" / "0" / ".lock").write_text(f"process {os.getppid()} on {socket.gethostname()}\n")
    assert injector.pid(0) is None
    assert injector.pid(1) == sleeping[1].pid
    assert injector.inject(Fault(1.0, "stop", (0,), 1.0))["hit"] == []


def test_the_leader_is_who_was_followed_last(injector, tmp_path):
    for number, (at, leader) in enumerate([(1.0, 0), (3.0, 5), (2.0, 2)]):
        event = {"event": "exchange", "time": at, "leader": leader}
        text = json.dumps(event | {"time": at - 1, "leader": 1}) + "\n" + json.dumps(event) + "\n" + '{"event": "exch'
        (tmp_path / f"events-{number}.jsonl").write_text(text)
    record = injector.inject(Fault(1.0, "stop", (LEADER,), 1.0))
    assert [hit["worker"] for hit in record["hit"]] == [4, 5]


def test_links_are_cut_between_those_who_are_apart(injector, tmp_path):
    def links():
        """By process: what becomes of its requests to each."""
        of = [Links(tmp_path / "links.json", 2 * number) for number in range(3)]
        return [[links(f"127.0.0.1:{other}") for other in range(3)] for links in of]

    nothing = [[0.0] * 3] * 3
    assert links() == nothing
    injector.inject(Fault(1.0, "partition", (0,), 60.0))
    assert links() == [[0.0, "drop", "drop"], ["drop", 0.0, 0.0], ["drop", 0.0, 0.0]]
    injector.inject(Fault(2.0, "slow", (1,), 60.0))
    assert links() == [[0.0, "drop", "drop"], ["drop", 0.0, DELAY], ["drop", DELAY, 0.0]]
    (tmp_path / "members" / "worker-0-life-2").write_text("127.0.0.1:7\n")  # It was replaced.
    injector.tick()
    assert Links(tmp_path / "links.json", 2)("127.0.0.1:7") == "drop"
    injector.close()
    assert links() == nothing
