"""What a run writes and shows: metrics, TensorBoard event files and the progress line."""

import math
import time
from collections import deque
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, Int

from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train.evaluate import Evaluation
from lsgd_jax.train.progress import Progress
from lsgd_jax.train.step import Leaders, StepMetrics

BEHIND = 2
"""Compiled programs whose metrics may still be on the devices, so that the next one starts without waiting for them."""


class Clock:
    """Seconds of training."""

    def __init__(self, seconds: float = 0.0) -> None:
        """Start the clock."""
        self.start(seconds)

    def start(self, seconds: float = 0.0) -> None:
        """Start again, from this many seconds of training."""
        self._zero = time.perf_counter() - seconds

    def seconds(self, at: float | None = None) -> float:
        """Seconds of training now, or at a time of `time.perf_counter`."""
        return (time.perf_counter() if at is None else at) - self._zero


class Recorder:
    """Writes what happens in a run to its folder and shows it; the first process does, the others only keep up."""

    def __init__(self, config: Config, folder: RunFolder, display: RunProgress) -> None:
        """Record nothing yet.

        Args:
          config: of the run.
          folder: of the run.
          display: of the run.
        """
        self.config, self.folder, self.display = config, folder, display
        self._leader: int | None = None
        """Global index of the last leader of all workers; None for methods without leaders."""

    def record_leaders(self, step: int, leaders: Leaders, **more: Any) -> None:
        """Record an exchange of all workers, if one was due, and the workers that it has revived.

        Args:
          step: the last local step of every worker.
          leaders: after that step, on the host.
          more: further values of the event.
        """
        positions, distances = leaders.positions, leaders.distances
        self._leader = int(positions[0, 0, -1])
        if step % self.config.period != 0:
            return
        levels: dict[str, Any] = {}
        if self.config.groups > 1:
            levels = {"local_leaders": positions[:, 0, 0], "local_distances": distances[:, :, 0]}
        if step % self.config.levels[-1].period == 0:
            levels |= {"leader": positions[0, 0, -1], "distances": distances[:, :, -1]}
        self.folder.log("exchange", step=step, scores=leaders.score, **levels, **more)
        if leaders.revived is not None and leaders.revived.any():
            self.folder.log("revival", step=step, workers=np.flatnonzero(leaders.revived))

    def _record_evaluation(
        self, step: int, seconds: float, result: Evaluation, train_losses: np.ndarray, loss: float, **more: Any
    ) -> None:
        headline = self.config.task.headline
        self.folder.log(
            "evaluation",
            step=step,
            seconds=seconds,
            **more,
            train_losses=train_losses,
            **{f"center_{name}": value for name, value in result.center.items()},
            **{headline.workers: result.workers},
        )
        measured = f"{headline.title} {headline.text(result.center[headline.name])}"
        self.display.update(step, loss=loss, measured=measured, leader=self._leader, steps_per_second=step / seconds)


class SynchronousRecorder(Recorder):
    """Records workers in step, a few programs behind the computation."""

    def __init__(
        self, config: Config, folder: RunFolder, display: RunProgress, params: optax.Params, progress: Progress
    ) -> None:
        """Record nothing yet.

        Args:
          config: of the run.
          folder: of the run.
          display: of the run.
          params: one worker's, or their shapes and dtypes.
          progress: of the run, updated as it is recorded.
        """
        super().__init__(config, folder, display)
        self.progress, self._params = progress, params
        self._pending: deque[tuple[int, StepMetrics]] = deque()
        self._rate_factor = self._of_ladder = np.float32(1)

    def record(self, step: int, metrics: StepMetrics, rate_factor: np.float32) -> None:
        """Record a compiled program.

        Args:
          step: its last local step.
          metrics: what it returned, which may still be computed.
          rate_factor: the learning-rate factor of its last step.
        """
        self._pending.append((step, metrics))
        self._rate_factor = rate_factor
        while len(self._pending) > BEHIND:
            self._record_next()

    def catch_up(self) -> None:
        """Wait for the metrics of all programs and record them."""
        while self._pending:
            self._record_next()

    def record_evaluation(self, result: Evaluation) -> None:
        """Record an evaluation at `progress.step`, after `catch_up`."""
        progress = self.progress
        train_losses = np.mean(progress.losses, axis=0)
        progress.losses.clear()
        value = result.center[self.config.task.headline.name]
        progress.error = value if math.isfinite(value) else None
        self._record_evaluation(
            progress.step,
            progress.seconds,
            result,
            train_losses,
            float(np.mean(train_losses)),
            bytes_sent=progress.bytes_before + bytes_sent(self.config, self._params, progress.step),
            learning_rate_factor=self._rate_factor * self._of_ladder,
        )

    def _record_next(self) -> None:
        step, metrics = self._pending.popleft()
        loss, failed, leaders = jax.device_get(metrics)
        progress = self.progress
        progress.losses.append(loss)
        progress.scores = np.where(failed, np.inf, loss if leaders is None else leaders.score).tolist()
        if leaders is not None:
            self.record_leaders(step, leaders)
            if leaders.rate_factor is not None:
                self._of_ladder = leaders.rate_factor.flat[0]
        since, now = progress.failed_since, np.flatnonzero(failed).tolist()
        if new := [worker for worker in now if str(worker) not in since]:
            self.folder.log("failure", step=step, workers=new)
        progress.failed_since = {str(worker): since.get(str(worker), step) for worker in now}


class AsynchronousRecorder(Recorder):
    """Records workers that run at their own speeds; their threads may call it."""

    def __init__(self, config: Config, folder: RunFolder, display: RunProgress) -> None:
        """Record nothing yet, and start the clock."""
        super().__init__(config, folder, display)
        self.clock = Clock()

    def record(self, event: str, *, count: int, **values: Any) -> None:
        """Record an event of one worker.

        Args:
          event: its name.
          count: local steps of all workers together.
          values: of the event.
        """
        self._leader = values.get("leader", self._leader)
        workers = self.config.groups * self.config.workers
        values = {"step": count // workers, "seconds": self.clock.seconds(), "count": count, **values}
        self.folder.log(event, **values)

    def record_evaluation(
        self,
        result: Evaluation,
        *,
        seconds: float,
        worker_steps: Int[np.ndarray, "group worker"],
        train_losses: Float[np.ndarray, "group worker"],
        bytes_sent: float,
    ) -> None:
        """Record an evaluation.

        Args:
          result: of the evaluation.
          seconds: of training, when the workers were where they were evaluated.
          worker_steps: local steps that each worker had taken.
          train_losses: each worker's mean training loss; NaN if it is not known.
          bytes_sent: per worker so far, the mean over workers.
        """
        count = int(worker_steps.sum())
        self._record_evaluation(
            count // worker_steps.size,
            seconds,
            result,
            train_losses,
            float(np.nanmean(train_losses)) if np.isfinite(train_losses).any() else math.nan,
            count=count,
            worker_steps=worker_steps,
            bytes_sent=bytes_sent,
        )
