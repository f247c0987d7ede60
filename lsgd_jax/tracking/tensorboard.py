"""TensorBoard event files with a run's metrics."""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax.errors import UsageError
from lsgd_jax.task import Headline

TAGS = {
    "train_losses": "training_loss/worker_{}",
    "learning_rate_factor": "learning_rate_factor",
    "bytes_sent": "bytes_sent_by_a_worker",
    "leader": "leader/of_all",
    "local_leaders": "leader/of_group_{}",
    "scores": "score/worker_{}",
    "distances": "distance_to_leader/worker_{}",
    "local_distances": "distance_to_local_leader/worker_{}",
    "worker_steps": "steps/worker_{}",
    # Exchanges of a single worker:
    "local_leader": "leader/of_group_of_worker_{}",
    "distance": "distance_to_leader/worker_{}",
    "local_distance": "distance_to_local_leader/worker_{}",
    "worker_step": "steps/worker_{}",
}
"""TensorBoard tags of the metrics besides the measures; TensorBoard groups tags with the same prefix."""


class EventFile:
    """An event file that is written while metrics are logged.

    It is opened with the first event and starts with a session marker that makes TensorBoard discard older files in
    the folder: a resumed run adds its earlier metrics again, so that no point appears twice and none is missing.
    """

    def __init__(self, folder: Path, headline: Headline) -> None:
        """Open nothing yet.

        Args:
          folder: for event files.
          headline: measure of the workers.

        Raises:
          UsageError: if tensorboardX is not installed.
        """
        if importlib.util.find_spec("tensorboardX") is None:
            raise UsageError("tensorboard needs tensorboardX: pip install tensorboardX.")
        self._folder, self._headline, self._leader = folder, headline, -1
        self._writer: Any = None

    def add(self, entry: dict[str, Any]) -> None:
        """Write the scalars of one event of the metrics."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))
            self._writer.write_event(
                Event(step=0, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
            )
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in self._scalars(entry)]
        self._writer.write_event(Event(step=entry["step"], wall_time=time.time(), summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
        measures = {name: f"test_{name.removeprefix('center_')}/center" for name in entry if name.startswith("center_")}
        tags = TAGS | measures | {self._headline.workers: f"test_{self._headline.name}/worker_{{}}"}
        for name in tags.keys() & entry.keys():
            values = entry[name]
            several = (
                enumerate(np.ravel(values).tolist()) if isinstance(values, list) else [(entry.get("worker"), values)]
            )
            yield from ((tags[name].format(i), value) for i, value in several if value is not None)
        self._leader = -1 if entry["event"] == "resume" else entry.get("leader", self._leader)
        if entry["event"] == "evaluation":
            losses = [loss for loss in np.ravel(entry["train_losses"]).tolist() if loss is not None]
            if losses:
                yield "training_loss/mean", float(np.mean(losses))
            of_workers = np.ravel(entry[self._headline.workers])
            if self._leader >= 0 and of_workers[self._leader] is not None:
                yield f"test_{self._headline.name}/leader", of_workers[self._leader]
