"""Files as a whole, files that are none, and folders with one owner."""

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from lsgd_jax import files
from lsgd_jax.errors import UsageError
from tests.reliability import faults


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "below" / "file"
    files.write(path, "old")
    with monkeypatch.context() as full:
        faults.fill_disk(full, "file")
        with pytest.raises(UsageError, match=r"file can't be written \(No space left on device\)\.$"):
            files.write(path, "new")
    assert path.read_text() == "old"
    files.write(path, b"new")
    assert path.read_text() == "new"
    files.write(path, "a lone \ud800")
    assert path.read_text() == r"a lone \ud800"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_its_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "file", [], os.fsync

    def noted(descriptor):
        synced.append(path.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files.write(path, "content")
    assert synced == [False, True]  # The file, and then the folder with its name.


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()


def test_only_files_are_read(tmp_path):
    """A pipe to which nobody writes would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        files.read_text(tmp_path / "pipe")
    (tmp_path / "large").write_text("12345")
    assert files.read_text(tmp_path / "large", 5) == "12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        files.read_text(tmp_path / "large", 4)


@pytest.mark.parametrize("text", [str(2**63), "[1e400]", "1e308", "NaN", "-Infinity", "[" * 100_000, "1" * 5000])
def test_numbers_that_are_too_large_are_no_json(text):
    with pytest.raises(ValueError, match=r"out of range|too deeply|digits"):
        files.parse_json(text)


def test_numbers_of_float32_are():
    assert files.parse_json("[3.4e38, -9223372036854775807, null]") == [3.4e38, -(2**63) + 1, None]


def test_a_folder_has_one_owner(tmp_path):
    assert files.is_empty(tmp_path)
    with files.lock(tmp_path, "name another"):
        with pytest.raises(UsageError) as error:
            files.lock(tmp_path, "name another")
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        assert str(error.value) == f"{tmp_path} is being written by {owner}: wait until it has ended, or name another."
    assert files.is_empty(tmp_path)
    files.lock(tmp_path, "name another").close()


def test_a_lock_ends_with_its_process(tmp_path):
    hold = "import sys; from pathlib import Path; from lsgd_jax import files; lock = files.lock(Path(sys.argv[1]), '');"
    hold += "print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=faults.environment(),
    )
    with process:
        process.stdout.readline()
        with pytest.raises(UsageError, match=f"is being written by process {process.pid} on "):
            files.lock(tmp_path, "name another")
        process.kill()
        process.wait()
    files.lock(tmp_path, "name another").close()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_lock_is_its_owners_whatever_forks_do(tmp_path):
    """A fork that ends does not give the folder free, and one that goes on does not keep it."""
    file, (reading, writing) = files.lock(tmp_path, "name another"), os.pipe()
    if (ended := os.fork()) == 0:
        file.close()
        os._exit(0)
    os.waitpid(ended, 0)
    with pytest.raises(UsageError, match="is being written by "):
        files.lock(tmp_path, "name another")
    if (going_on := os.fork()) == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    file.close()
    files.lock(tmp_path, "name another").close()
    os.close(writing)
    os.waitpid(going_on, 0)
    os.close(reading)


def test_who_may_write_a_folder_may_lock_it(tmp_path):
    """Whatever the umask of who has locked it first."""
    tmp_path.chmod(0o770)
    before = os.umask(0o077)
    try:
        files.lock(tmp_path, "name another").close()
    finally:
        os.umask(before)
    assert (tmp_path / files.LOCK).stat().st_mode & 0o777 == 0o660
    tmp_path.chmod(0o555)
    files.lock(tmp_path, "name another").close()
    assert (tmp_path / files.LOCK).stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_where_a_file_system_has_no_locks_there_is_none(number, goes_on, tmp_path, monkeypatch):
    def without(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    with contextlib.nullcontext() if goes_on else pytest.raises(OSError, match="Input/output error"):
        files.lock(tmp_path, "name another").close()


def test_a_lock_is_made_through_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / files.LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        files.lock(tmp_path, "name another")
    assert (tmp_path / "mine").read_text() == "mine"


def test_whether_a_folder_can_be_written_is_seen_without_a_trace(tmp_path):
    (tmp_path / ".written").write_text("mine")
    files.check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".written"]
    with pytest.raises(UsageError, match=r"\.written can't be written \(File exists\): name another out folder\.$"):
        files.check_writable(tmp_path / ".written")


def test_a_text_that_is_larger_than_any_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(OSError, match="it has more than 1,073,741,824 bytes"):
        files.read_text(path)
