"""A run's checkpoints: arrays and JSON, nothing that is executed when it is read."""

import dataclasses
import io
import itertools
import json
import math
import shutil
import threading
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsgd_jax import files
from lsgd_jax.data import Stretch
from lsgd_jax.distributed import (
    STACKED,
    Placement,
    failing_together,
    process_count,
    process_index,
    to_first_process,
)
from lsgd_jax.errors import AgreedError, Interrupted, UsageError
from lsgd_jax.step import TrainState


@dataclasses.dataclass
class Progress:
    """How far a run has come; lists by worker are `[group][worker]`."""

    shape: tuple[int, int]
    """Groups, and workers in each."""
    processes: int
    devices: int
    """Of all processes."""
    step: int = 0
    """Local steps of every worker."""
    seconds: float = 0.0
    """Of training."""
    metrics_length: int = 0
    """Bytes of the metrics file."""
    losses: list[Any] = dataclasses.field(default_factory=list)
    """Every program's mean training losses by worker, since the last evaluation."""
    scores: list[list[float]] = dataclasses.field(default_factory=list)
    """By which workers are compared, the lower the better; infinite for workers that have failed."""
    failed_since: dict[str, int] = dataclasses.field(default_factory=dict)
    """The steps since which workers have failed, by the worker's position among all."""
    error: float | None = None
    """The center's test error at the last evaluation, in [0, 1]."""
    bytes_before: float = 0.0
    """What each worker sent beyond what the present number of workers would have sent until now."""
    earlier: list[Stretch] = dataclasses.field(default_factory=list)
    """The first steps, as far as other workers than the present have taken them: the rest of an epoch depends on it."""

    @staticmethod
    def at_start(placement: Placement) -> "Progress":
        """Nothing yet."""
        return Progress(placement.shape, process_count(), placement.mesh.size)

    @property
    def has_workers(self) -> bool:
        """Whether there is a worker that has not failed."""
        return len(self.failed_since) < self.shape[0] * self.shape[1]

    @staticmethod
    def from_json(fields: Any) -> "Progress":
        """What `dataclasses.asdict` and JSON have made of it.

        Raises:
          ValueError: if it is not that.
        """
        try:
            progress = Progress(**fields)
            groups, workers = progress.shape
            shape = (int(groups), int(workers))
            earlier = [Stretch(*stretch) for stretch in progress.earlier]
            counts = [progress.step, progress.metrics_length, *shape, progress.processes, progress.devices]
            counts += [*map(int, progress.failed_since), *progress.failed_since.values()]
            counts += [count for stretch in earlier for count in stretch]
            if not all(isinstance(count, int) and 0 <= count < 2**63 for count in counts):
                raise ValueError("a count is not one")
            of_none = any(stretch.workers * stretch.batch_size == 0 for stretch in earlier)
            if of_none or sum(stretch.steps for stretch in earlier) > progress.step:
                raise ValueError("the steps of earlier workers are not the run's")
            numbers = [progress.seconds, progress.bytes_before, 0 if progress.error is None else progress.error]
            if not all(abs(number) < files.LARGEST_NUMBER for number in numbers):
                raise ValueError("a number is out of range")
            scores = np.asarray(progress.scores, float)
            if scores.shape != shape:
                raise ValueError("the scores are not the workers'")
            losses = [np.asarray(loss, np.float32) for loss in progress.losses]
            if any(loss.shape != shape for loss in losses):
                raise ValueError("the losses are not the workers'")
            seconds = float(progress.seconds)
            return dataclasses.replace(
                progress, shape=shape, losses=losses, scores=scores.tolist(), seconds=seconds, earlier=earlier
            )
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from None


class Checkpoints:
    """The checkpoints of a run: the last few, and the one whose center had the lowest test error.

    They are written in the background, and each appears as a whole or not at all. Of several processes each writes
    what its workers hold; all must see the same folder. As a context, it ends when all is written.
    """

    _numbers = itertools.count()
    """Of all saves, which all processes make in one order."""

    def __init__(self, folder: Path, placement: Placement, keep: int) -> None:
        """Name the folder.

        Args:
          folder: of the checkpoints; it is made at the first save.
          placement: of the workers.
          keep: how many of the last are kept.
        """
        self._folder, self._placement, self._keep = folder.absolute(), placement, keep
        self._writing: threading.Thread | None = None
        self._problem = ""
        """What has kept the last one from being written."""

    def __enter__(self) -> "Checkpoints":
        """Nothing is under way yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is written, unless the other processes may have gone, who write their part of it."""
        all_are_here = process_count() == 1 or not isinstance(error, UsageError) or isinstance(error, AgreedError)
        if all_are_here and (error is None or isinstance(error, UsageError | Interrupted)):
            with failing_together():
                self._finish()

    def save(self, state: TrainState, progress: Progress, error: float | None = None) -> None:
        """Begin to save; it waits only for the last one to be written.

        Args:
          state: of all workers, which may be given up after the call.
          progress: of the run.
          error: the center's test error in this state, in [0, 1], if it is known.

        Raises:
          UsageError: if this one or the last one can't be written.
        """
        new = self._folder / f"{progress.step}.new"
        with failing_together():
            self._finish()
            try:
                if process_index() == 0:
                    self._folder.mkdir(exist_ok=True)
                    for left in self._folder.glob("*.new"):  # By a run that was killed.
                        shutil.rmtree(left)
                    for part in ("state", "progress"):
                        (new / part).mkdir(parents=True)
            except OSError as problem:
                shutil.rmtree(new, ignore_errors=True)
                raise UsageError(self._unwritten(problem)) from None
        told = dataclasses.asdict(progress) | {"losses": [np.asarray(loss).tolist() for loss in progress.losses]}
        about = json.dumps({"progress": told, "arrays": _arrays(state), "error": error})
        own = self._placement.own_workers
        rows = np.concatenate(
            [x.reshape(len(own), -1).view(np.uint8) for x in jax.tree.leaves(self._placement.take(state))], 1
        )
        name = f"checkpoint/{next(self._numbers)}"
        # A daemon: nothing that the disk does keeps a process from ending.
        self._writing = threading.Thread(target=self._write, args=(new, name, about, own, rows), daemon=True)
        self._writing.start()

    def _write(self, new: Path, name: str, about: str, workers: list[int], rows: np.ndarray) -> None:
        """Write this process's part; the first process waits for the others' and lets the checkpoint appear."""
        try:
            with files.replacing(new / "state" / f"{process_index()}.npz") as file:
                np.savez(file, workers=workers, rows=rows)  # With checksums.
            if process_index() == 0:
                with files.replacing(new / "progress" / "metadata") as file:
                    file.write(about.encode())
        except Exception as problem:  # Whatever it is, the others have to know.
            self._problem = self._unwritten(problem)
        try:
            self._problem = next(filter(None, to_first_process(name, self._problem)), self._problem)
            if process_index() == 0 and not self._problem:
                files.sync(new)
                new.rename(new.with_suffix(""))
                files.sync(self._folder)
                self._remove_old()
        except Exception as problem:
            self._problem = self._unwritten(problem)
        if process_index() == 0 and self._problem:
            shutil.rmtree(new, ignore_errors=True)  # For what was logged and is yet to be, it may take the room.

    def _remove_old(self) -> None:
        """Remove all checkpoints but the last few and the best."""
        steps = self.steps()
        errors = {step: error for step in steps if (error := self._error(step)) is not None}
        best = min(errors, key=errors.__getitem__, default=None)
        for step in steps[self._keep :]:
            if step != best:
                old = self._folder / f"{step}.old.new"  # Removed at the next save if the process is killed.
                (self._folder / str(step)).rename(old)
                shutil.rmtree(old)

    def _error(self, step: int) -> float | None:
        """The center's test error in a checkpoint, if it is known."""
        try:
            error = json.loads(self._about(step)).get("error")
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        return error if isinstance(error, float) else None

    def _about(self, step: int) -> str:
        return files.read_text(self._folder / str(step) / "progress" / "metadata")

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._problem:
            problem, self._problem = self._problem, ""
            raise UsageError(problem)

    def _unwritten(self, problem: Exception) -> str:
        return f"a checkpoint can't be written to {self._folder} ({_first_line(problem)}); those before it are kept."

    def steps(self) -> list[int]:
        """The steps of the checkpoints, the last one first.

        Raises:
          UsageError: if their folder can't be read.
        """
        try:
            names = [path.name for path in self._folder.iterdir()] if self._folder.exists() else []
        except OSError as error:
            raise UsageError(f"the checkpoints in {self._folder} can't be read ({error.strerror}).") from None
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def progress(self, step: int) -> Progress:
        """How far the run had come.

        Raises:
          UsageError: if the checkpoint can't be read.
        """
        return self._told(step)[0]

    def _told(self, step: int) -> tuple[Progress, list["_Array"]]:
        """The progress, and what arrays a worker has."""
        try:
            told = json.loads(self._about(step))
            progress = Progress.from_json(told["progress"])
            arrays = [_Array(str(name), jnp.dtype(dtype).name, tuple(shape)) for name, dtype, shape in told["arrays"]]
        except Exception as problem:  # Whatever a damaged or foreign file makes of its readers.
            raise UsageError(f"what it tells is not of a run ({_first_line(problem)})") from None
        if progress.step != step:
            raise UsageError(f"it tells of step {progress.step}")
        return progress, arrays

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """The state of the same workers, each on its device.

        Args:
          step: one of `steps`.
          shapes: of the state.

        Raises:
          UsageError: if the checkpoint can't be read or is of something else.
        """
        _, arrays = self._told(step)
        if arrays != _arrays(shapes):
            raise UsageError("its arrays are not this run's")
        saved = self._read(step, arrays, self._placement.own_workers)
        return self._placement.put(jax.tree.unflatten(jax.tree.structure(shapes), saved.values()), STACKED)

    def restore_resized(self, step: int, fresh: TrainState, sources: list[int]) -> TrainState:
        """The state of other workers than were saved.

        What workers knew of their leaders is left behind: the groups are others, and so are positions in them.

        Args:
          step: one of `steps`.
          fresh: the state at the start, of the workers that there are now.
          sources: for each of them, the position of the saved worker that it goes on from.

        Raises:
          UsageError: if the checkpoint can't be read or is of something else.
        """
        _, arrays = self._told(step)
        now = _arrays(fresh)
        left_behind = _of_leaders(arrays) | _of_leaders(now)
        if [array for array in arrays if array not in left_behind] != [each for each in now if each not in left_behind]:
            raise UsageError("its arrays are not this run's")
        saved = self._read(step, arrays, [sources[worker] for worker in self._placement.own_workers])
        leaves = [
            leaf if array in left_behind else self._placement.put(saved[array.name], STACKED)
            for array, leaf in zip(now, jax.tree.leaves(fresh), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(fresh), leaves)

    def _read(self, step: int, arrays: list["_Array"], workers: list[int]) -> dict[str, np.ndarray]:
        """What the workers at some positions had, [worker, ...], by name.

        Raises:
          UsageError: if it can't be read.
        """
        found: dict[int, np.ndarray] = {}
        try:
            for path in (self._folder / str(step) / "state").glob("*.npz"):
                with files.reading(path) as opened, _loaded(opened) as file:
                    own = file["workers"].tolist()
                    if not set(own).isdisjoint(workers):
                        found |= dict(zip(own, file["rows"], strict=True))
            rows = np.stack([found[worker] for worker in workers])
            ends = np.cumsum([math.prod(shape) * jnp.dtype(dtype).itemsize for _, dtype, shape in arrays])
            *parts, rest = np.split(rows, ends, 1)
            if rest.size:
                raise ValueError("there are more bytes than numbers")
            return {
                name: np.ascontiguousarray(part).view(jnp.dtype(dtype)).reshape(len(workers), *shape)
                for (name, dtype, shape), part in zip(arrays, parts, strict=True)
            }
        except Exception as problem:  # Whatever a damaged or foreign file makes of its readers.
            raise UsageError(f"its arrays can't be read ({_first_line(problem)})") from None

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint that can't be read out of the way; returns where to.

        Raises:
          UsageError: if it can't be moved.
        """
        aside = self._folder.with_name(f"unreadable-checkpoint-{step}")
        try:
            if process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(step)).rename(aside)
        except OSError as error:
            raise UsageError(f"the checkpoint of step {step} can't be moved to {aside} ({error.strerror}).") from None
        return aside


def _loaded(opened: BinaryIO) -> np.lib.npyio.NpzFile:
    """The arrays in a file. None may say that it is larger than the file, where nothing is compressed.

    Raises:
      ValueError: if one does.
    """
    size = opened.seek(0, io.SEEK_END)
    with zipfile.ZipFile(opened) as archive:
        for member in archive.infolist():
            with archive.open(member) as array:
                np.lib.format.read_magic(array)
                shape, _, dtype = np.lib.format.read_array_header_1_0(array)
            claimed = max(member.file_size, math.prod(shape) * dtype.itemsize)
            if claimed > size:
                raise ValueError(f"{member.filename} claims {claimed:,} bytes in a file of {size:,}")
    opened.seek(0)
    return np.load(opened)


class _Array(NamedTuple):
    """An array of one worker's state."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def _arrays(state: TrainState) -> list[_Array]:
    """Those of one worker, of the state of all."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [_Array(jax.tree_util.keystr(path), x.dtype.name, x.shape[2:]) for path, x in leaves]


def _of_leaders(arrays: list[_Array]) -> set[_Array]:
    """What a worker knows of its leaders: the links of `leader_pull`, and all of levels beyond the first."""
    levels = list(dict.fromkeys(array.name.split(".link.")[0] for array in arrays if ".link." in array.name))
    starts = (*(f"{level}.link." for level in levels[:1]), *(f"{level}." for level in levels[1:]))
    return {array for array in arrays if array.name.startswith(starts) and array.name != f"{levels[0]}.link.step"}


def _first_line(problem: Exception) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:300]
