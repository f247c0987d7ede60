"""Files by which the processes of a run find each other."""

import os
import threading

import pytest

from lsgd_jax.asynchronous.rendezvous import addresses_in, begin_life, run_secret
from lsgd_jax.errors import UsageError


def at_once(function, times):
    """What a function returns in several threads."""
    results, start = [], threading.Barrier(times)
    threads = [threading.Thread(target=lambda i=i: (start.wait(), results.append(function(i)))) for i in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_no_life_begins_twice(tmp_path):
    """Of many who begin at the same time, also with several workers of which others have one."""
    lives = at_once(lambda i: (i % 2, begin_life(tmp_path / "members", [[1, 2], [2]][i % 2], f"host:{i}")), 12)
    assert len(set(lives)) == 12
    both, one = ([life for kind, life in lives if kind == wanted] for wanted in range(2))
    assert not set(both) & set(one)  # Those of worker 2.
    assert begin_life(tmp_path / "members", [2], "host:12") == 1 + max(both + one)


def test_addresses_are_those_of_the_newest_lives(tmp_path):
    assert addresses_in(tmp_path / "none") == set()
    begin_life(tmp_path, [0, 1], "first:1")
    begin_life(tmp_path, [2], "second:2")
    assert begin_life(tmp_path, [0], "third:3") == 2
    assert addresses_in(tmp_path) == {"first:1", "second:2", "third:3"}
    (tmp_path / "worker-2-life-2").write_text("fourth:")  # Its process is writing it.
    (tmp_path / "worker-3-life-1").write_bytes(b"\xff\n")
    (tmp_path / "worker-4-life-1").mkdir()
    os.mkfifo(tmp_path / "worker-5-life-1")
    (tmp_path / "other").write_text("fifth:5\n")
    assert addresses_in(tmp_path) == {"first:1", "third:3"}


def test_a_folder_that_can_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "members").touch()
    with pytest.raises(
        UsageError, match=r"^.*members can't be written \(.*\): a process needs a file there to join\.$"
    ):
        begin_life(tmp_path / "members", [0], "host:1")


def test_one_secret_for_a_run_that_only_its_owner_can_read(tmp_path):
    path = tmp_path / "secret"
    [secret] = set(at_once(lambda _: run_secret(path), 8))
    assert len(secret) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"^the run's secret .*secret can be read by other users: chmod 600 it\.$"):
        run_secret(path)
    with pytest.raises(
        UsageError, match=r"^the run's secret .* can't be read or written \(No such file or directory\)\.$"
    ):
        run_secret(tmp_path / "none" / "secret")


@pytest.mark.parametrize("content", ["", "g" * 64 + "\n"])
def test_what_is_no_secret_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.setattr("lsgd_jax.asynchronous.rendezvous._HURRY", 0.05)
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text(content)
    with pytest.raises(
        UsageError, match=r"secret is not a run's secret: remove it while no process of the run is alive\.$"
    ):
        run_secret(path)
