"""The run folder of a posted run, which several processes write: each its own events, and files of its workers."""

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lsgd_jax import files
from lsgd_jax.config import Config
from lsgd_jax.errors import InUseError, UsageError
from lsgd_jax.tracking.run_folder import RunFolder, making_sense_of, read_config

PATIENCE = 10.0
"""Seconds to wait for another process that opens the folder."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock the folder of a run while this process opens it, or looks who has which worker.

    Raises:
      InUseError: if another process has it for longer than `PATIENCE`.
      OSError: if the lock file can't be written.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            locked: io.FileIO = files.lock(folder, "name another run_dir")
            break
        except InUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    with locked:
        yield


class MemberFolder(RunFolder):
    """The run folder as one process of a posted run has it.

    A process locks the folders of its workers, so that no other can have the same ones while it lives. It may begin
    them in a folder in which another process has begun the same run with other workers.
    """

    def __init__(
        self, path: Path, config: Config, positions: Sequence[int], *, resume: bool = False, tensorboard: bool = False
    ) -> None:
        """Make the folder and begin the run in it, or check that these workers can be begun or resumed there.

        Args:
          path: of the folder.
          config: of the run.
          positions: of the workers of this process.
          resume: whether these workers may have begun before.
          tensorboard: whether to write the events as TensorBoard event files, too.

        Raises:
          UsageError: as for `RunFolder`, or if another process has one of these workers.
        """
        self._positions = positions
        super().__init__(path, config, resume=resume, tensorboard=tensorboard)

    @property
    def _metrics(self) -> Path:
        return self.path / f"events-{self._positions[0]}.jsonl"

    @property
    def _tensorboard(self) -> Path:
        alone = len(self._positions) == self._config.groups * self._config.workers
        return self.path / "tensorboard" / ("" if alone else f"events-{self._positions[0]}")

    def _open(self, resume: bool) -> None:
        with alone(self.path):
            if files.is_empty(self.path):
                self._begin()
            begun = any(self.of_worker(position).exists() for position in self._positions)
            if resume:
                self._check_can_resume()
                self._check_same_workers()
            elif begun or read_config(self.path).effective != self._config.effective:
                raise self._not_empty()
            for position in self._positions:
                self.of_worker(position).mkdir(parents=True, exist_ok=True)
                self._owned.append(files.lock(self.of_worker(position), "leave this worker to it"))
            if not self._locked_elsewhere():  # The time until now is not of training.
                self._begun.unlink(missing_ok=True)
            self.members.mkdir(exist_ok=True)
            if resume and read_config(self.path).effective != self._config.effective:
                files.write(self.path / "config.json", self._config.to_json() + "\n")
            self._take_up_events()

    def _check_same_workers(self) -> None:
        before, now = ((config.groups, config.workers) for config in (read_config(self.path), self._config))
        if before != now:
            shapes = "{} x {}, not {} x {}".format(*before, *now)
            raise UsageError(f"the posted run in {self.path} can only be resumed with as many workers: {shapes}.")

    def _take_up_events(self) -> None:
        """Make the file of events, or remove a last line that a killed process has not finished."""
        with self._metrics.open("a+b") as events:
            events.seek(0)
            *lines, _ = events.read().split(b"\n")
            events.truncate(sum(len(line) + 1 for line in lines))
        if self._event_file is not None:
            with making_sense_of(self.path):
                for line in lines:  # TensorBoard forgets the events of earlier files.
                    self._event_file.add(files.parse_json(line.decode()))

    @property
    def members(self) -> Path:
        """The folder by which the processes of the run find each other."""
        return self.path / "members"

    def of_worker(self, position: int) -> Path:
        """The folder of a worker."""
        return self.path / "workers" / str(position)

    def state_of(self, position: int) -> Path:
        """The file in which a worker is saved."""
        return self.of_worker(position) / "state.npz"

    @property
    def center(self) -> Path:
        """The file in which the center is saved, with methods that have one."""
        return self.path / "workers" / "center.npz"

    @property
    def _begun(self) -> Path:
        return self.path / "workers" / "begun"

    def begun(self, trained: float = 0.0) -> float:
        """When the run began to train, in seconds since the epoch, as if it had never stopped.

        Args:
          trained: seconds for which it has trained, if no process trains now.
        """
        with alone(self.path):
            if not self._begun.exists():
                files.write(self._begun, f"{time.time() - trained!r}\n")
            return float(files.read_text(self._begun))

    def _locked_elsewhere(self) -> set[int]:
        others = set(range(self._config.groups * self._config.workers)) - set(self._positions)
        return {position for position in others if files.is_locked(self.of_worker(position))}

    def finish(self) -> None:
        """Tell all processes that the run has taken its steps and has been evaluated."""
        self._finish(self.path / "workers")

    @property
    def is_finished(self) -> bool:
        """Whether a process has told so."""
        return self._has_finished(self.path / "workers")

    def finish_workers(self) -> None:
        """Tell all processes, also those that can't reach this one, that its workers have taken their steps."""
        for position in self._positions:
            self._finish(self.of_worker(position))

    def unfinished_elsewhere(self) -> set[int]:
        """The workers that other processes have, reachable or not, and that are not known to have taken their steps."""
        return {position for position in self.held_elsewhere() if not self._has_finished(self.of_worker(position))}

    def held_elsewhere(self) -> set[int]:
        """The workers whose folders other processes have locked: these live, whether they can be reached or not."""
        with alone(self.path):
            return self._locked_elsewhere()

    def _finish(self, folder: Path) -> None:
        files.write(folder / "finished", f"{self._config.steps}\n")

    def _has_finished(self, folder: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return int(files.read_text(folder / "finished")) >= self._config.steps
        return False

    def log(self, event: str, **values: Any) -> None:
        """Append an event to this process's, with the `time` in seconds since the epoch.

        Raises:
          UsageError: if it can't be written or the file is gone.
        """
        super().log(event, time=time.time(), **values)
