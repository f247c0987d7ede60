"""A run's folder: its configuration, its environment, its metrics (one JSON line an event), its pictures."""

import json
import os
import platform
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsgd_jax.config import Config
from lsgd_jax.distributed import process_count, process_index
from lsgd_jax.errors import UsageError


class RunFolder:
    """The folder that a run writes; made anew, so that nothing already written is lost.

    Of several processes the first writes it, and the others do nothing.
    """

    def __init__(self, path: Path, config: Config) -> None:
        """Make the folder and write the configuration and the environment.

        Raises:
          UsageError: if the folder has files in it or can't be made.
        """
        self.path = path
        self._lock = threading.Lock()
        if process_index() > 0:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise UsageError(f"the run folder {path} is not empty: name another with --run-dir, or remove it.")
            with (path / "config.json").open("x") as file:  # Of two that come at once, one fails.
                file.write(config.to_json() + "\n")
            (path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
            (path / "metrics.jsonl").touch()
        except OSError as error:
            raise UsageError(f"the run folder {path} can't be written ({error.strerror}): name another.") from None

    def log(self, event: str, **values: Any) -> None:
        """Append an event to the metrics; arrays become nested lists, and numbers that are not finite null.

        Threads may do so at the same time.
        """
        if process_index() > 0:
            return
        line = {"event": event} | {name: _jsonable(value) for name, value in values.items()}
        with self._lock, (self.path / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line, allow_nan=False) + "\n")


def _jsonable(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.kind == "f":
        array = array.astype(object)
        array[~np.isfinite(np.asarray(value, float))] = None
    return array.tolist()


def environment() -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, machine, devices, command."""
    packages = ("lsgd-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "processes": process_count(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def read_metrics(path: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind that a run has logged, in order."""
    with (path / "metrics.jsonl").open() as lines:
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]
