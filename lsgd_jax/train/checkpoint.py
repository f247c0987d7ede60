"""Checkpoints of a run: arrays and JSON, nothing that is executed when it is read."""

import dataclasses
import itertools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsgd_jax import files
from lsgd_jax.distributed import (
    Placement,
    failing_together,
    process_count,
    process_index,
    to_first_process,
)
from lsgd_jax.errors import AgreedError, Interrupted, UsageError
from lsgd_jax.train.progress import Progress
from lsgd_jax.train.saved_arrays import Part, SavedArray, arrays_of, joined, loaded
from lsgd_jax.train.step import TrainState

FORMAT = 1
"""Version of what a checkpoint holds; raise it when arrays of the state or fields of `Progress` change.

A new field of `Progress` whose default is right for older checkpoints, as that of `chips` is, needs no new version."""
UNREADABLE = (OSError, ValueError, RecursionError)
"""Errors of reading a damaged JSON file."""


class Checkpoints:
    """The checkpoints of a run: the last few, and the one with the lowest headline measure of the evaluated model.

    They are written in the background, and each appears as a whole or not at all. Each of several processes writes the
    state of its own workers, or its part of it; all must see the same folder. As a context, it ends when everything is
    written.
    """

    _numbers = itertools.count()
    """Numbers of all saves, which all processes make in the same order."""

    def __init__(self, folder: Path, placement: Placement, keep: int) -> None:
        """Write and read nothing yet.

        Args:
          folder: of the checkpoints; it is made at the first save.
          placement: of the workers.
          keep: number of last checkpoints to keep.
        """
        self._folder, self._placement, self._keep = folder.absolute(), placement, keep
        self._writing: threading.Thread | None = None
        self._problem = ""
        """Why the last checkpoint was not written; empty if it was."""

    def __enter__(self) -> "Checkpoints":
        """Return the checkpoints."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything is written, unless other processes, which write their parts, may have ended."""
        all_are_here = process_count() == 1 or not isinstance(error, UsageError) or isinstance(error, AgreedError)
        if all_are_here and (error is None or isinstance(error, UsageError | Interrupted)):
            with failing_together():
                self._finish()

    def save(self, state: TrainState, progress: Progress, error: float | None = None) -> None:
        """Save in the background; waits only until the previous checkpoint is written.

        Args:
          state: of all workers; may be donated after the call.
          progress: of the run.
          error: headline measure of the evaluated model in this state; None if it is not known.

        Raises:
          UsageError: if this checkpoint or the previous one can't be written.
        """
        new = self._folder / f"{progress.step}.new"
        with failing_together():
            self._finish()
            try:
                if process_index() == 0:
                    self._folder.mkdir(exist_ok=True)
                    for left in self._folder.glob("*.new"):  # Left by a run that was killed.
                        shutil.rmtree(left)
                    for part in ("state", "progress"):
                        (new / part).mkdir(parents=True)
            except OSError as problem:
                shutil.rmtree(new, ignore_errors=True)
                raise UsageError(self._unwritten(problem)) from None
        fields = dataclasses.asdict(progress) | {"losses": [np.asarray(loss).tolist() for loss in progress.losses]}
        metadata = json.dumps({"format": FORMAT, "progress": fields, "arrays": arrays_of(state), "error": error})
        own = self._placement.own_workers
        rows = np.concatenate(
            [x.reshape(len(own), -1).view(np.uint8) for x in jax.tree.leaves(self._placement.take(state))], 1
        )
        parts: dict[str, Any] = {"workers": np.asarray(own), "rows": rows}
        if self._placement.chips > 1:
            ends = [axis for x in jax.tree.leaves(state) for axis in self._placement.box(x)]
            parts["ends"] = np.reshape(ends, (-1, 2))
        name = f"checkpoint/{next(self._numbers)}"
        # A daemon, so that a slow disk never keeps a process from ending.
        self._writing = threading.Thread(target=self._write, args=(new, name, metadata, parts), daemon=True)
        self._writing.start()

    def _write(self, new: Path, name: str, metadata: str, parts: dict[str, Any]) -> None:
        """Write this process's part; process 0 waits for the others' parts and then makes the checkpoint visible."""
        try:
            with files.replacing(new / "state" / f"{process_index()}.npz") as file:
                np.savez(file, **parts)  # With checksums.
            if process_index() == 0:
                with files.replacing(new / "progress" / "metadata") as file:
                    file.write(metadata.encode())
        except Exception as problem:  # Whatever it is, the other processes have to know.
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
            shutil.rmtree(new, ignore_errors=True)  # Its room may be needed for metrics.

    def _remove_old(self) -> None:
        """Remove all checkpoints except the last few and the best."""
        steps = self.steps()
        errors = {step: error for step in steps if (error := self._error(step)) is not None}
        best = min(errors, key=errors.__getitem__, default=None)
        for step in steps[self._keep :]:
            if step != best:
                old = self._folder / f"{step}.old.new"  # Removed at the next save if the process is killed.
                (self._folder / str(step)).rename(old)
                shutil.rmtree(old)

    def _error(self, step: int) -> float | None:
        """Headline measure of the evaluated model in a checkpoint; None if it is not known."""
        try:
            error = self._metadata(step)["error"]
        except (*UNREADABLE, LookupError, TypeError):
            return None
        return error if isinstance(error, float) else None

    def _metadata(self, step: int) -> Any:
        """What a checkpoint holds as JSON."""
        return json.loads(files.read_text(self._folder / str(step) / "progress" / "metadata"))

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._problem:
            problem, self._problem = self._problem, ""
            raise UsageError(problem)

    def _unwritten(self, problem: Exception) -> str:
        return f"a checkpoint can't be written to {self._folder} ({_first_line(problem)}); earlier ones are kept."

    def steps(self) -> list[int]:
        """The steps of the checkpoints, last one first.

        Raises:
          UsageError: if their folder can't be read.
        """
        try:
            names = [path.name for path in self._folder.iterdir()] if self._folder.exists() else []
        except OSError as error:
            raise UsageError(f"the checkpoints in {self._folder} can't be read ({error.strerror}).") from None
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def progress(self, step: int) -> Progress:
        """How far the run had come at a checkpoint.

        Raises:
          UsageError: if the checkpoint can't be read.
        """
        return self._progress_and_arrays(step)[0]

    def check_formats(self) -> None:
        """Check that no checkpoint is of another format; damaged ones pass.

        Raises:
          UsageError: if one is.
        """
        for step in self.steps():
            try:
                metadata = self._metadata(step)
            except UNREADABLE:
                continue
            if problem := _other_format(metadata):
                raise UsageError(f"the checkpoint of step {step} in {self._folder.parent} can't be read: {problem}.")

    def _progress_and_arrays(self, step: int) -> tuple[Progress, list[SavedArray]]:
        """The progress at a checkpoint, and the arrays of one worker's state."""
        try:
            metadata = self._metadata(step)
            if not (problem := _other_format(metadata)):
                progress = Progress.from_json(metadata["progress"])
                arrays = [
                    SavedArray(str(name), jnp.dtype(dtype).name, tuple(shape))
                    for name, dtype, shape in metadata["arrays"]
                ]
        except Exception as error:  # Whatever a damaged or foreign file makes of its readers.
            raise UsageError(f"its metadata is not that of a run ({_first_line(error)})") from None
        if problem:
            raise UsageError(problem)
        if progress.step != step:
            raise UsageError(f"its metadata is that of step {progress.step}")
        return progress, arrays

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """The state of the same workers that were saved, each on its device.

        Args:
          step: one of `steps`.
          shapes: of the state.

        Raises:
          UsageError: if the checkpoint can't be read or belongs to another kind of run.
        """
        _, arrays = self._progress_and_arrays(step)
        if arrays != arrays_of(shapes):
            raise UsageError("its arrays are not those of this run")
        saved = self._read(step, arrays, self._placement.own_workers)
        specs = jax.tree.map(lambda x: x.sharding.spec, shapes)
        return self._placement.put(jax.tree.unflatten(jax.tree.structure(shapes), saved.values()), specs)

    def restore_resized(
        self, step: int, fresh: TrainState, sources: list[int], init: Callable[[Any], Any]
    ) -> TrainState:
        """The state of another number of workers than were saved.

        What workers knew of their leaders is dropped, since groups and positions in them have changed: it is as if the
        workers started from where they are.

        Args:
          step: one of `steps`.
          fresh: state of the present workers at the start.
          sources: for each of them, the global index of the saved worker that it resumes from.
          init: of the optimizer, from one worker's parameters to its state.

        Raises:
          UsageError: if the checkpoint can't be read or belongs to another kind of run.
        """
        _, arrays = self._progress_and_arrays(step)
        now = arrays_of(fresh)
        left_behind = _of_leaders(arrays) | _of_leaders(now)
        if [array for array in arrays if array not in left_behind] != [each for each in now if each not in left_behind]:
            raise UsageError("its arrays are not those of this run")
        saved = self._read(step, arrays, [sources[worker] for worker in self._placement.own_workers])

        def restored(tree: TrainState) -> TrainState:
            leaves = [
                leaf if array in left_behind else self._placement.put(saved[array.name], leaf.sharding.spec)
                for array, leaf in zip(now, jax.tree.leaves(tree), strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)

        state = restored(fresh)
        shardings = jax.tree.map(lambda x: x.sharding, state.optimizer)
        started = jax.jit(jax.vmap(jax.vmap(init)), out_shardings=shardings)(state.params)
        return restored(state._replace(optimizer=started))

    def _read(self, step: int, arrays: list[SavedArray], workers: list[int]) -> dict[str, np.ndarray]:
        """The saved arrays of some workers, given by their global indices: [worker, ...], by name.

        Raises:
          UsageError: if it can't be read.
        """
        found: dict[int, list[Part]] = {}
        try:
            for path in (self._folder / str(step) / "state").glob("*.npz"):
                with files.reading(path) as opened, loaded(opened) as file:
                    own = file["workers"].tolist()
                    if not set(own).isdisjoint(workers):
                        ends = file.get("ends")
                        for worker, row in zip(own, file["rows"], strict=True):
                            found.setdefault(worker, []).append(Part(row, ends))
            whole = {worker: joined(found[worker], arrays) for worker in set(workers)}
            return {array.name: np.stack([whole[worker][i] for worker in workers]) for i, array in enumerate(arrays)}
        except Exception as problem:  # Whatever a damaged or foreign file makes of its readers.
            raise UsageError(f"its arrays can't be read ({_first_line(problem)})") from None

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint that can't be read aside; returns the new path.

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


def _of_leaders(arrays: list[SavedArray]) -> set[SavedArray]:
    """What a worker knows of its leaders: the links of `leader_pull`, and all of levels beyond the first.

    The first level's counts of steps stay, one per fragment if it is streamed.
    """
    levels = list(dict.fromkeys(array.name.split(".link.")[0] for array in arrays if ".link." in array.name))
    starts = (*(f"{level}.link." for level in levels[:1]), *(f"{level}." for level in levels[1:]))
    return {
        array
        for array in arrays
        if array.name.startswith(starts) and not (array.name.startswith(starts[0]) and array.name.endswith(".step"))
    }


def _other_format(metadata: Any) -> str:
    """What is wrong and what to do if another version of lsgd_jax has written this metadata; empty otherwise."""
    found = metadata.get("format") if isinstance(metadata, dict) else FORMAT
    if found == FORMAT:
        return ""
    written = "without a format version" if found is None else f"in format {str(found)[:20]!r}"
    return (
        f"it was written by another version of lsgd_jax, {written} where this one reads format {FORMAT}:"
        " start anew in another folder, or use that version"
    )


def _first_line(problem: Exception) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:300]
