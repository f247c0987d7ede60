"""How far a run has come, as it is saved with each checkpoint."""

import dataclasses
from typing import Any

import numpy as np

from lsgd_jax import files
from lsgd_jax.data import Stretch
from lsgd_jax.distributed import Placement, process_count


@dataclasses.dataclass
class Progress:
    """How far a run has come; per-worker lists are `[group][worker]`."""

    shape: tuple[int, int]
    """Groups, and workers in each."""
    processes: int
    devices: int
    """In all processes."""
    step: int = 0
    """Local steps of every worker."""
    seconds: float = 0.0
    """Seconds of training."""
    metrics_length: int = 0
    """Length of the metrics file in bytes."""
    losses: list[Any] = dataclasses.field(default_factory=list)
    """Mean training losses per worker of every compiled program since the last evaluation."""
    scores: list[list[float]] = dataclasses.field(default_factory=list)
    """Scores by which workers are compared, lower is better; infinite for failed workers."""
    failed_since: dict[str, int] = dataclasses.field(default_factory=dict)
    """Step at which each failed worker was found to have failed, by the worker's global index."""
    error: float | None = None
    """Headline measure of the evaluated model at the last evaluation; None before, or if it is not finite."""
    bytes_before: float = 0.0
    """Bytes that each worker has sent beyond what the present number of workers would have sent."""
    earlier: list[Stretch] = dataclasses.field(default_factory=list)
    """The first steps, as far as a different number of workers took them: what is left of the epoch depends on them."""

    @staticmethod
    def at_start(placement: Placement) -> "Progress":
        """The progress before the first step."""
        return Progress(placement.shape, process_count(), placement.mesh.size)

    @property
    def has_workers(self) -> bool:
        """Whether any worker has not failed."""
        return len(self.failed_since) < self.shape[0] * self.shape[1]

    @staticmethod
    def from_json(fields: Any) -> "Progress":
        """The progress from its fields as read from JSON.

        Raises:
          ValueError: if they are not those of a progress.
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
                raise ValueError("a count is not a non-negative integer")
            has_empty = any(stretch.workers * stretch.batch_size == 0 for stretch in earlier)
            if has_empty or sum(stretch.steps for stretch in earlier) > progress.step:
                raise ValueError("the steps of earlier workers are not steps of this run")
            numbers = [progress.seconds, progress.bytes_before, 0 if progress.error is None else progress.error]
            if not all(abs(number) < files.LARGEST_NUMBER for number in numbers):
                raise ValueError("a number is out of range")
            scores = np.asarray(progress.scores, float)
            if scores.shape != shape:
                raise ValueError("the scores do not have one entry per worker")
            losses = [np.asarray(loss, np.float32) for loss in progress.losses]
            if any(loss.shape != shape for loss in losses):
                raise ValueError("the losses do not have one entry per worker")
            seconds = float(progress.seconds)
            return dataclasses.replace(
                progress, shape=shape, losses=losses, scores=scores.tolist(), seconds=seconds, earlier=earlier
            )
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from None
