"""A run's checkpoints: arrays and JSON, nothing that is executed when it is read."""

import dataclasses
import json
import logging
import math
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from lsgd_jax.data import Stretch
from lsgd_jax.distributed import STACKED, Placement, failing_together, process_count, process_index
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.step import TrainState

# What goes wrong in orbax's threads is raised here, too, and told in a sentence; in its log it has a traceback.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


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
            counts = [progress.step, progress.metrics_length, *shape, *progress.failed_since.values()]
            counts += [count for stretch in earlier for count in stretch]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise ValueError("a count is not one")
            of_none = any(stretch.workers * stretch.batch_size == 0 for stretch in earlier)
            if of_none or sum(stretch.steps for stretch in earlier) > progress.step:
                raise ValueError("the steps of earlier workers are not the run's")
            if progress.step and np.shape(progress.scores) != shape:
                raise ValueError("the scores are not the workers'")
            losses = [np.asarray(loss, np.float32) for loss in progress.losses]
            if any(loss.shape != shape for loss in losses):
                raise ValueError("the losses are not the workers'")
            seconds = float(progress.seconds)
            return dataclasses.replace(progress, shape=shape, losses=losses, seconds=seconds, earlier=earlier)
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: `lsgd_jax.interruption` stops runs."""
        return False


class _Rows(ocp.JsonCheckpointHandler):
    """Writes a file a process, as JSON is written, but for its content: what each of its workers has, in bytes.

    Orbax's own ways to write arrays take their time by the array and the device, which are many here and small.
    """

    async def async_save(self, directory: Path, item: None = None, args: Any = None) -> list[ocp.future.Future]:
        path = directory / f"{process_index()}.npz"
        return [CommitFutureAwaitingContractedSignals(self._write(path, args), name="rows")]

    async def _write(self, path: Path, args: "_SaveRows") -> None:
        with path.open("wb") as file:
            np.savez(file, workers=args.workers, rows=args.rows)  # With checksums.
            file.flush()
            os.fsync(file.fileno())


@ocp.args.register_with_handler(_Rows, for_save=True, for_restore=True)  # Orbax asks for both.
@dataclasses.dataclass
class _SaveRows(ocp.args.CheckpointArgs):
    workers: list[int]
    """Their positions among all."""
    rows: np.ndarray
    """The bytes of each, [worker, byte]."""


class Checkpoints:
    """The checkpoints of a run: the last few, and the one whose center had the lowest test error.

    They are written in the background, and each appears as a whole or not at all. Of several processes each writes
    what its workers hold; all must see the same folder. As a context, it ends when all is written.
    """

    def __init__(self, folder: Path, placement: Placement, keep: int) -> None:
        """Name the folder.

        Args:
          folder: of the checkpoints; it is made at the first save.
          placement: of the workers.
          keep: how many of the last are kept.
        """
        self._folder, self._placement, self._keep = folder.absolute(), placement, keep
        self._writer: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        """Nothing is under way yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is written, unless the other processes may have gone, who write their part of it."""
        if self._writer is not None and (error is None or isinstance(error, UsageError | Interrupted)):
            with failing_together():
                self._finish()
            self._writer.close()

    def save(self, state: TrainState, progress: Progress, error: float | None = None) -> None:
        """Begin to save; it waits only for the last one to be written.

        Args:
          state: of all workers, which may be given up after the call.
          progress: of the run.
          error: the center's test error in this state, in [0, 1], if it is known.

        Raises:
          UsageError: if this one or the last one can't be written.
        """
        with failing_together():
            self._finish()
        told = dataclasses.asdict(progress) | {"losses": [np.asarray(loss).tolist() for loss in progress.losses]}
        own = self._placement.own_workers
        rows = [x.reshape(len(own), -1).view(np.uint8) for x in jax.tree.leaves(self._placement.take(state))]
        items = ocp.args.Composite(
            state=_SaveRows(own, np.concatenate(rows, 1)),
            progress=ocp.args.JsonSave({"progress": told, "arrays": _arrays(state)}),
        )
        try:
            if self._writer is None:
                self._writer = self._open_writer()
            self._writer.save(progress.step, args=items, metrics=None if error is None else {"error": error})
        except Exception as problem:  # Of the file system or in between: of many types.
            raise UsageError(self._unwritten(problem)) from None

    def _open_writer(self) -> ocp.CheckpointManager:
        with failing_together():
            self._folder.mkdir(exist_ok=True)
        best = BestN(
            get_metric_fn=lambda metrics: metrics["error"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=AnyPreservationPolicy([LatestN(self._keep), best]),
            multiprocessing_options=_among(set(range(process_count())), "writer"),
        )
        return _Manager(self._folder, options=options, item_names=("state", "progress"))

    def _finish(self) -> None:
        try:
            if self._writer is not None:
                self._writer.wait_until_finished()
        except Exception as problem:
            raise UsageError(self._unwritten(problem)) from None

    def _unwritten(self, problem: Exception) -> str:
        return f"a checkpoint can't be written to {self._folder} ({_first_line(problem)}); those before it are kept."

    def steps(self) -> list[int]:
        """The steps of the checkpoints, the last one first."""
        if not self._folder.is_dir():
            return []
        return sorted((int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()), reverse=True)

    def progress(self, step: int) -> Progress:
        """How far the run had come.

        Raises:
          UsageError: if the checkpoint can't be read.
        """
        return self._told(step)[0]

    def _told(self, step: int) -> tuple[Progress, list["_Array"]]:
        """The progress, and what arrays a worker has."""
        try:
            told = json.loads((self._folder / str(step) / "progress" / "metadata").read_text())
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
        if [array for array in arrays if not array.of_leaders] != [array for array in now if not array.of_leaders]:
            raise UsageError("its arrays are not this run's")
        saved = self._read(step, arrays, [sources[worker] for worker in self._placement.own_workers])
        leaves = [
            leaf if array.of_leaders else self._placement.put(saved[array.name], STACKED)
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
                with path.open("rb") as opened, np.load(opened) as file:
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
        """Move a checkpoint that can't be read out of the way; returns where to."""
        aside = self._folder.with_name(f"unreadable-checkpoint-{step}")
        if process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
        return aside


def _among(processes: set[int], prefix: str) -> ocp.options.MultiprocessingOptions:
    """Let orbax wait for these processes only, and by the coordination service: collectives would mix with training."""
    return ocp.options.MultiprocessingOptions(
        primary_host=min(processes), active_processes=processes, barrier_sync_key_prefix=prefix
    )


class _Array(NamedTuple):
    """An array of one worker's state."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def of_leaders(self) -> bool:
        """Whether it is what the worker knows of its leaders."""
        return ".leaders[" in self.name


def _arrays(state: TrainState) -> list[_Array]:
    """Those of one worker, of the state of all."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [_Array(jax.tree_util.keystr(path), x.dtype.name, x.shape[2:]) for path, x in leaves]


def _first_line(problem: Exception) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:300]
