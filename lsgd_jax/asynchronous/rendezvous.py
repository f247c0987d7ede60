"""Files in the run's folder by which its processes find each other, and the secret by which they know each other."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from lsgd_jax.errors import UsageError
from lsgd_jax.files import read_text, reading

_CLAIM = re.compile(r"worker-(\d{1,9})-life-(\d{1,9})")
_HURRY = 1.0
"""Seconds within which a process that has created a file has also written it."""


def run_secret(path: Path) -> bytes:
    """The secret of a run, from a file that only its owner can read; the first process to come creates it.

    Raises:
      UsageError: if the file can't be read or written, or others can read it.
    """
    end = time.monotonic() + _HURRY
    try:
        with contextlib.suppress(FileExistsError), open(path, "x", opener=partial(os.open, mode=0o600)) as file:
            file.write(secrets.token_hex(32) + "\n")
        while True:
            with reading(path) as opened:
                mode, content = os.fstat(opened.fileno()).st_mode, opened.read(66)
            if mode & 0o077:
                raise UsageError(f"the run's secret {path} can be read by other users: chmod 600 it.")
            if re.fullmatch(rb"[0-9a-f]{64}\n", content):
                return bytes.fromhex(content.decode())
            if time.monotonic() > end:
                raise UsageError(f"{path} is not a run's secret: remove it while no process of the run is alive.")
            time.sleep(0.01)  # Another process is writing it.
    except OSError as error:
        raise UsageError(f"the run's secret {path} can't be read or written ({error.strerror}).") from None


def begin_life(folder: Path, positions: Sequence[int], address: str) -> int:
    """Begin the next life of some workers, with one file for each that no other process can create for this life.

    Args:
      folder: created if it does not exist.
      positions: of the workers.
      address: of their process, for those who look for it.

    Returns:
      The life, from 1.

    Raises:
      UsageError: if the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            older = [(life, path) for position, life, path in claims(folder) if position in positions]
            life = 1 + max((life for life, _ in older), default=0)
            created = []
            try:
                for position in positions:
                    path = folder / f"worker-{position}-life-{life}"
                    with path.open("x") as file:
                        created.append(path)
                        file.write(f"{address}\n")
                # A life's file is removed once there is a newer one, and could have been created here again.
                overtaken = any(newer > life and position in positions for position, newer, _ in claims(folder))
            except FileExistsError:  # Another process has been faster.
                overtaken = True
            if overtaken:
                for path in created:
                    path.unlink(missing_ok=True)
                continue
            for _, path in older:
                path.unlink(missing_ok=True)
            return life
    except OSError as error:
        raise UsageError(
            f"{folder} can't be written ({error.strerror}): a process needs a file there to join."
        ) from None


def addresses_in(folder: Path) -> set[str]:
    """The addresses of the newest lives of all workers that have a file in the folder."""
    newest: dict[int, tuple[int, Path]] = {}
    addresses = set()
    with contextlib.suppress(OSError):
        for position, life, path in claims(folder):
            newest[position] = max(newest.get(position, (0, path)), (life, path))
    for _, path in newest.values():
        with contextlib.suppress(OSError, ValueError):
            text = read_text(path, 300)
            if text.endswith("\n"):  # Else it is being written.
                addresses.add(text.strip())
    return addresses


def claims(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Position, life and file of every worker that has a file in the folder."""
    for path in folder.iterdir():
        if match := _CLAIM.fullmatch(path.name):
            yield int(match[1]), int(match[2]), path
