"""Atomic writes, safe reads of untrusted files, and locks on folders."""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lsgd_jax.checks import check_path
from lsgd_jax.errors import InUseError, UsageError

LOCK = ".lock"
"""File that a process locks while it writes a folder; it is never removed."""
LARGEST_NUMBER = 1e39
"""Bound beyond the range of float32, in which runs compute; sums and percentages stay finite in float64."""
MOST_TEXT = 2**30
"""Limit in bytes on text files that are read: a file may claim to be larger than the memory."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file atomically: after a crash or on a full disk, it has either its old or all of its new content.

    Args:
      path: path of the file; an existing file is replaced, and so is a symbolic link (it is not followed).

    Yields:
      The file to write to.

    Raises:
      OSError: if it can't be written.
    """
    new = path.with_name(f".{secrets.token_hex(4)}.new")
    try:
        with new.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically, creating its parent folders.

    Args:
      path: path of the file.
      content: bytes, or text to encode as UTF-8 with lone surrogates as escapes.

    Raises:
      UsageError: if it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
    except OSError as error:
        raise UsageError(f"{path} can't be written ({error.strerror}).") from None


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # From file systems that can't sync folders.
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush everything in a folder to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def check_writable(folder: Path) -> None:
    """Create a folder and check that files can be written there, before a long computation.

    Raises:
      UsageError: if they can't.
    """
    check_path("out", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"the folder {folder} can't be written ({error.strerror}): name another out folder.") from None


def is_empty(folder: Path) -> bool:
    """Return whether a folder is empty except for what `lock` and an interrupted `replacing` leave there."""
    ours = re.compile(re.escape(LOCK) + r"|\.[0-9a-f]{8}\.new")
    return all(ours.fullmatch(path.name) for path in folder.iterdir())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Yields:
      The file.

    Raises:
      OSError: if it can't be opened, or is a pipe or a device, which might block forever.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        yield file


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Read a UTF-8 text file.

    Args:
      path: path of the file.
      most: maximum size in bytes.

    Raises:
      OSError: if it can't be read, or is too large.
      ValueError: if it is not text.
    """
    with reading(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
        return file.read().decode()


def parse_json(text: str) -> Any:
    """Parse JSON whose numbers NumPy can represent and compute with.

    Raises:
      ValueError: if it is not valid JSON, or a number is out of range.
    """

    def number(text: str, kind: type) -> Any:
        value = kind(text)
        if not abs(value) < (2**63 if kind is int else LARGEST_NUMBER):
            raise ValueError(f"the number {text[:40]} is out of range")
        return value

    def integer(text: str) -> int:
        return number(text, int)

    def fraction(text: str) -> float:
        return number(text, float)

    try:
        return json.loads(text, parse_int=integer, parse_float=fraction, parse_constant=fraction)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Locked(io.FileIO):
    """An open file whose lock ends when the process that has opened it closes it, whatever its forks do."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "r+")
        self._owner = os.getpid()

    def close(self) -> None:
        if not self.closed and os.getpid() == self._owner:
            with contextlib.suppress(OSError):
                fcntl.flock(self, fcntl.LOCK_UN)
        super().close()


def is_locked(folder: Path) -> bool:
    """Return whether a folder is locked, by this process or another one.

    The look itself locks the folder for an instant: nobody may try to lock it meanwhile.
    """
    with contextlib.suppress(FileNotFoundError), reading(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return False


def lock(folder: Path, advice: str) -> io.FileIO:
    """Lock a folder against writes by other processes, of those that may write it.

    Closing the returned file, or the end of the process, releases the lock. On file systems without locks, nothing is
    locked.

    Args:
      folder: existing folder.
      advice: alternative for the user while another process holds the lock, as the end of a sentence.

    Raises:
      InUseError: if another process holds the lock.
      OSError: if the lock file can't be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = _Locked(os.open(folder / LOCK, flags, 0o666))
    with contextlib.ExitStack() as opened:
        opened.enter_context(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = " ".join(file.read(200).decode(errors="replace").split()) or "another process"
            raise InUseError(f"{folder} is being written by {owner}: wait until it has ended, or {advice}.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        mode = os.fstat(file.fileno()).st_mode
        with contextlib.suppress(OSError):  # Another user's file has been made wide enough by its owner.
            os.fchmod(file.fileno(), mode | folder.stat().st_mode & 0o666)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        opened.pop_all()
    return file
