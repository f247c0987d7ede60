"""Faults of the links between processes, injected by a file that says which there are at the moment."""

import os
from pathlib import Path
from typing import Any

from lsgd_jax import files
from lsgd_jax.asynchronous.transport import Faults

LINKS = "LSGD_LINKS"
"""Environment variable with the path of the file: JSON like {"0": {"127.0.0.1:4711": "drop", "127.0.0.1:4712": 0.3}}.

For each process, by its first worker, it has the addresses to which requests are lost, or the seconds of their delay.
"""


class Links:
    """What becomes of a process's requests, by their address."""

    def __init__(self, path: Path, position: int) -> None:
        """Read nothing yet.

        Args:
          path: of the file.
          position: the first worker of this process.
        """
        self._path, self._position = path, position
        self._version: tuple[int, int] | None = None
        self._faults: dict[str, Any] = {}

    def __call__(self, address: str) -> Any:
        """Seconds of delay before a request to an address, or "drop"."""
        try:
            status = self._path.stat()
            if self._version != (version := (status.st_ino, status.st_mtime_ns)):
                self._faults = files.parse_json(files.read_text(self._path)).get(str(self._position), {})
                self._version = version
        except (OSError, ValueError):  # There is no file yet.
            return 0.0
        return self._faults.get(address, 0.0)


def injected_faults(position: int) -> Faults | None:
    """The faults of this process's links; None if none are injected.

    Args:
      position: the first worker of this process.
    """
    path = os.environ.get(LINKS)
    return Links(Path(path), position) if path else None
