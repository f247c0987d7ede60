"""The run folder: configuration, environment, metrics (one JSON line per event) and figures of a run.

Its checkpoints are written by `lsgd_jax.train.checkpoint`.
"""

import contextlib
import datetime
import io
import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from lsgd_jax import files
from lsgd_jax.config import Config
from lsgd_jax.distributed import process_index
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tracking.tensorboard import EventFile

MAY_CHANGE = (
    *("steps", "groups", "workers", "chips_per_worker"),
    *("data_processes", "checkpoint_every", "keep_checkpoints"),
)
"""Fields of the configuration that may change when a run is resumed."""
MOST_BYTES = 2**20
"""Maximum size of a configuration or environment file."""


class RunFolder:
    """The folder that a run writes: a new or empty one, so that nothing is overwritten, or that of the run to resume.

    Of several processes, the first writes it and the others do nothing. No other run can write it until this one ends:
    leaving the context releases the folder and closes its files.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool = False, tensorboard: bool = False) -> None:
        """Make the folder and write configuration and environment, or check that the run in it can be resumed.

        Args:
          path: of the folder.
          config: of the run.
          resume: whether the folder may contain a run; it must have this configuration, except for `MAY_CHANGE`.
          tensorboard: whether to write the metrics as TensorBoard event files, too.

        Raises:
          UsageError: if another run is writing the folder, it has other files in it or can't be made, or tensorboardX
            is not installed.
        """
        self.path, self._config = path, config
        self._lock = threading.Lock()
        self._event_file: EventFile | None = None
        self._owned: list[io.FileIO] = []
        if process_index() > 0:
            return
        if tensorboard:
            self._event_file = EventFile(self._tensorboard, config.task.headline)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._open(resume)
        except OSError as error:
            self._release()
            raise UsageError(f"the run folder {path} can't be written ({error.strerror}): name another.") from None
        except UsageError:
            self._release()
            raise

    @property
    def _metrics(self) -> Path:
        """The file of the events that this process logs."""
        return self.path / "metrics.jsonl"

    @property
    def _tensorboard(self) -> Path:
        """The folder of its event files for TensorBoard."""
        return self.path / "tensorboard"

    def _open(self, resume: bool) -> None:
        """Lock the folder; begin the run, or check that the one in it can be resumed."""
        self._owned.append(files.lock(self.path, "name another run_dir"))
        if files.is_empty(self.path):
            self._begin(self._metrics.name)
        elif resume:
            self._check_can_resume()
        else:
            raise self._not_empty()

    def _not_empty(self) -> UsageError:
        return UsageError(f"the run folder {self.path} is not empty: name another run_dir, or resume the run.")

    def __enter__(self) -> Self:
        """Return the folder."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the event file and release the folder.

        Raises:
          UsageError: if the event file can't be completed.
        """
        try:
            if self._event_file is not None:
                self._event_file.close()
        except OSError as error:
            if kind is None:
                raise self._unwritten(error) from None
        finally:
            self._release()

    def _release(self) -> None:
        for locked in self._owned:
            locked.close()

    def _unwritten(self, error: OSError) -> UsageError:
        return UsageError(f"the run folder {self.path} can't be written ({error.strerror}).")

    def _begin(self, *empty: str) -> None:
        """Write the first files, or none of them: an empty folder can be used again once there is room.

        Args:
          *empty: names of files to begin without content.
        """
        try:
            config = self._config.to_json()
        except ValueError as error:  # A task that no file can hold.
            raise UsageError(str(error)) from None
        contents = {
            "config.json": config + "\n",
            "environment.json": json.dumps(environment() | {"date": _now()}, indent=2) + "\n",
            **dict.fromkeys(empty, ""),
        }
        try:
            for name, content in contents.items():
                files.write(self.path / name, content)
        except UsageError:
            for name in contents:
                (self.path / name).unlink(missing_ok=True)
            raise

    def _check_can_resume(self) -> None:
        for path in self.path.iterdir():
            if path.is_symlink():
                raise UsageError(f"{path} is a link that would lead the run elsewhere: replace it by a copy.")
            if not (path.is_file() or path.is_dir()):
                raise UsageError(f"{path} is neither a file nor a folder: remove it.")
        before, config = read_config(self.path), self._config
        if not before.checkpoint_period and before.asynchronous != "posted":
            raise UsageError(
                f"the run in {self.path} can't be resumed: its checkpoint_every is 0, and nothing was saved."
            )
        try:  # Options may follow from the number of workers, which may change.
            filled = METHODS[before.method].filled(before.method_options, config.groups, config.workers)
        except ValueError as error:
            raise UsageError(f"the run in {self.path} can't be resumed with these workers: {error}") from None
        olds = before.flat | filled | {"task": type(before.task)}
        news = config.flat | config.options | {"task": type(config.task)}
        for name in news:
            if name not in olds or not (before.has_effect(name) and config.has_effect(name)):
                continue
            old, new = olds[name], news[name]
            depends = name == "steps" and config.rate_depends_on_steps
            may_change = name in MAY_CHANGE and not depends
            if old != new and not may_change:
                why = ", on which its learning rate depends" if name in MAY_CHANGE else ""
                raise UsageError(
                    f"the run in {self.path} can't be resumed with another {name}{why}: {new!r}, not {old!r}."
                )

    def check_seen_by_all(self) -> None:
        """Raise UsageError in a process that does not see the folder."""
        if not (self.path / "config.json").exists():
            raise UsageError(
                f"process {process_index()} does not see the run folder {self.path}, in which its checkpoints"
                " are saved: name one that all hosts share, or set checkpoint_every to 0."
            )

    def changed_settings(self) -> str:
        """The settings that have changed since the run started, as text; empty if none are known to."""
        try:
            before = dict(json.loads(files.read_text(self.path / "environment.json", MOST_BYTES))["settings"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # There are none, or the file is damaged.
            return ""
        now = environment()["settings"]
        changed = [name for name in now if before.get(name, now[name]) != now[name]]
        return ", ".join(f"{name} {now[name]!r} (was {before[name]!r})" for name in changed)

    def check_length(self, length: int) -> None:
        """Raise UsageError unless the metrics file has whole lines up to this length in bytes."""
        if process_index() > 0 or length == 0:
            return
        try:
            with files.reading(self.path / "metrics.jsonl") as metrics:
                metrics.seek(length - 1)
                if metrics.read(1) != b"\n":
                    raise UsageError(f"no line of metrics.jsonl ends after {length} bytes")
        except OSError as error:
            raise UsageError(f"metrics.jsonl can't be read ({error.strerror})") from None

    def resume(self, length: int) -> None:
        """Cut the metrics file to a length in bytes, and write the configuration with which the run resumes.

        Raises:
          UsageError: if they can't be written.
        """
        if process_index() > 0:
            return
        try:
            with (self.path / "metrics.jsonl").open("ab") as metrics:
                metrics.truncate(length)
            files.write(self.path / "config.json", self._config.to_json() + "\n")
            if self._event_file is not None:
                with making_sense_of(self.path):
                    for entry in read_metrics(self.path):
                        self._event_file.add(entry)
        except OSError as error:
            raise self._unwritten(error) from None

    def start_anew(self) -> Path | None:
        """Move existing metrics to a file of their own, and write the configuration with which the run starts.

        Returns:
          That file; None if there were no metrics, and in all processes but the first.

        Raises:
          UsageError: if they can't be written.
        """
        metrics, beside = self.path / "metrics.jsonl", None
        try:
            if process_index() == 0 and metrics.exists() and metrics.stat().st_size:
                names = (f"metrics-before-{number}.jsonl" for number in itertools.count(1))
                beside = next(path for name in names if not (path := self.path / name).exists())
                metrics.rename(beside)
        except OSError as error:
            raise self._unwritten(error) from None
        self.resume(0)
        return beside

    def length(self) -> int:
        """Length of the metrics file in bytes, synced to disk; 0 in all processes but the first.

        Raises:
          UsageError: if it can't be written or is gone.
        """
        if process_index() > 0:
            return 0
        try:
            with (self.path / "metrics.jsonl").open("rb") as metrics:
                os.fsync(metrics.fileno())
                return metrics.seek(0, os.SEEK_END)
        except OSError as error:
            raise UsageError(f"the metrics in {self.path} can't be written ({error.strerror}).") from None

    def log(self, event: str, **values: Any) -> None:
        """Append an event to the metrics; arrays become nested lists, and numbers that are not finite become null.

        Thread-safe.

        Raises:
          UsageError: if they can't be written or are gone.
        """
        if process_index() > 0:
            return
        line = {"event": event} | {name: _jsonable(value) for name, value in values.items()}
        try:
            with self._lock, open(self._metrics, "a", opener=_open_existing) as metrics:
                metrics.write(json.dumps(line, allow_nan=False) + "\n")
                if self._event_file is not None:
                    self._event_file.add(line)
        except OSError as error:
            raise UsageError(f"the metrics in {self.path} can't be written ({error.strerror}).") from None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _open_existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _jsonable(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.kind == "f":
        array = array.astype(object)
        array[~np.isfinite(np.asarray(value, float))] = None
    return array.tolist()


def read_config(path: Path | str) -> Config:
    """The configuration of the run in a folder.

    Raises:
      UsageError: if it is not a run folder.
    """
    try:
        return Config.from_json(files.read_text(Path(path) / "config.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        why, inner = _in_a_line(error), [*Path(path).glob("*/config.json"), *Path(path).glob("*/*/config.json")]
        run = f", but {min(inner).parent} is one" if inner else ""
        raise UsageError(f"{path} is not a run folder, its config.json can't be read ({why}){run}.") from None


def read_metrics(path: Path | str, *events: str) -> list[dict[str, Any]]:
    """The events that a run has logged, all or only of some kinds, in order, without an unfinished last line.

    Those that several processes have logged, each in a file of its own, are merged by time.

    Raises:
      UsageError: if the metrics can't be read.
    """
    path = Path(path)
    found = [each for each in [path / "metrics.jsonl"] if each.exists()] + sorted(path.glob("events-*.jsonl"))
    entries: list[dict[str, Any]] = []
    try:
        for each in found or [path / "metrics.jsonl"]:
            *lines, _ = files.read_text(each).split("\n")
            entries += [_event(files.parse_json(line)) for line in lines]
        if len(found) > 1:
            entries.sort(key=lambda entry: entry.get("time", 0.0))
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"the metrics in {path} can't be read ({_in_a_line(error)}).") from None
    return [entry for entry in entries if not events or entry["event"] in events]


def _event(entry: Any) -> dict[str, Any]:
    if isinstance(entry, dict) and isinstance(entry.get("event"), str) and isinstance(entry.get("step"), int):
        return entry
    raise ValueError("a line is not an event with a step")


@contextlib.contextmanager
def making_sense_of(path: Path) -> Iterator[None]:
    """Turn the errors that malformed metrics cause in their readers into one sentence.

    Raises:
      UsageError: instead of those errors.
    """
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {_in_a_line(error)}"
        raise UsageError(f"the metrics in {path} are not those of a run ({why}).") from None


def _in_a_line(error: Exception) -> str:
    """An error's message in one line of limited length, whatever the file contains."""
    return " ".join(str(error).split())[:300]
