"""Saving of posted workers: each in a file of its own, which appears as a whole or not at all."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lsgd_jax import files
from lsgd_jax.asynchronous import Exchanges, Worker
from lsgd_jax.errors import UsageError
from lsgd_jax.train.saved_arrays import Part, SavedArray, arrays_of, loaded
from lsgd_jax.train.step import TrainState

FORMAT = 1
"""Version of what is saved; raise it when the arrays of the state or the fields of `SavedWorker` change."""


class SavedWorker(NamedTuple):
    """A worker as it was saved."""

    life: int
    step: int
    """Steps that it had taken, in all its lives."""
    pulled: bool
    """Whether it had been pulled at that step, if it was."""
    eligible_from: int
    """Steps after which it may lead."""
    score: float
    state: Any
    """Its `TrainState` on the host, with the axes [group, worker] of size 1."""


def save(path: Path, saved: SavedWorker) -> None:
    """Save a worker.

    Raises:
      OSError: if it can't be written; what was saved before is kept.
    """
    fields = saved._replace(state=None)._asdict() | {"format": FORMAT, "arrays": arrays_of(saved.state)}
    with files.replacing(path) as file:
        np.savez(  # With checksums.
            file,
            metadata=np.frombuffer(json.dumps(fields).encode(), np.uint8),
            row=np.concatenate([_bytes_of(x) for x in jax.tree.leaves(saved.state)]),
        )


def restore(path: Path, like: TrainState) -> SavedWorker | None:
    """A worker as it was saved; None if it has not been.

    Args:
      path: of the file.
      like: a worker's state, or its shapes and dtypes, with the axes [group, worker] of size 1.

    Raises:
      UsageError: if the file can't be read, or is not of this run.
    """
    if not path.exists():
        return None
    try:
        with files.reading(path) as opened, loaded(opened) as file:
            fields, row = json.loads(bytes(file["metadata"])), file["row"]
        arrays = [SavedArray(str(name), str(dtype), tuple(shape)) for name, dtype, shape in fields["arrays"]]
        if fields["format"] != FORMAT or arrays != arrays_of(like):
            raise ValueError("its arrays are not those of this run")
        values = [x[None, None] for _, x in Part(row, None).values(arrays)]
        state = jax.tree.unflatten(jax.tree.structure(like), values)
        life, step, eligible_from = (int(fields[name]) for name in ("life", "step", "eligible_from"))
        return SavedWorker(life, step, bool(fields["pulled"]), eligible_from, float(fields["score"]), state)
    except Exception as error:  # Whatever a damaged or foreign file makes of its readers.
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the worker saved in {path} can't be read ({why})") from None


def checksum(params: Any) -> str:
    """SHA-256 of the bytes of all arrays, in the order of the tree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(_bytes_of(leaf).data)
    return found.hexdigest()


def _bytes_of(x: Any) -> np.ndarray:
    """The bytes of an array, without a copy."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


class Saved:
    """The exchanges of workers whom it saves in the background, each after every so many of its steps.

    A step waits for a copy of the worker on the host, but neither for its checksum nor for the disk: while a worker is
    being written, it is not saved again.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        path: Callable[[int], Path],
        every: int,
        *,
        life: int,
        log: Callable[..., None],
        warn: Callable[[str], None],
    ) -> None:
        """Save nothing yet.

        Args:
          exchanges: of the workers.
          path: from a worker's position to its file.
          every: steps of a worker between two saves; 0: never.
          life: of the workers.
          log: takes the values of a "checksum" event, in a thread of its own; what it raises is raised by the worker's
            next save.
          warn: takes a sentence about a worker that can't be saved; what was saved before is kept.
        """
        self._exchanges, self._path, self._every, self._log, self._warn = exchanges, path, every, log, warn
        self._life = life
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: dict[int, Future[None]] = {}

    def compile(self, worker: Worker) -> None:
        """Compile the exchange's programs."""
        self._exchanges.compile(worker)

    def exchange(self, worker: Worker) -> Iterator[threading.Event | None]:
        """Exchange if an exchange is due."""
        return self._exchanges.exchange(worker)

    def after_step(self, worker: Worker) -> None:
        """Count and publish the step, and save the worker if that is due."""
        self._exchanges.after_step(worker)
        last = self._writing.get(worker.position)
        if self._every and worker.step % self._every == 0 and (last is None or last.done()):
            self._save(worker, pulled=False)

    def at_end(self, worker: Worker) -> None:
        """Save the worker where it has ended, and wait until it is written."""
        self._save(worker, pulled=True).result()

    def close(self) -> None:
        """Wait until everything is written."""
        self._disk.shutdown()

    def _save(self, worker: Worker, *, pulled: bool) -> Future[None]:
        if (last := self._writing.get(worker.position)) is not None:
            last.result()  # Raises what its log has raised.
        state = jax.device_get(TrainState(*worker.model, worker.optimizer))  # The next step donates the optimizer's.
        saved = SavedWorker(self._life, worker.step, pulled, worker.eligible_from, worker.score, state)
        self._writing[worker.position] = writing = self._disk.submit(self._write, worker.position, saved)
        return writing

    def _write(self, position: int, saved: SavedWorker) -> None:
        told = {"step": saved.step, "sha256": checksum(saved.state.params), "pulled": saved.pulled}
        self._log(worker=position, life=saved.life, **told)
        try:
            if self._every:
                save(self._path(position), saved)
        except OSError as error:
            self._warn(f"worker {position} can't be saved ({error.strerror}); what was saved before is kept")
