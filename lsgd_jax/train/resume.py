"""Going on from a run's last checkpoint, also with other workers, processes or devices than it was saved with.

Of more workers than there are now, those with the lowest scores go on, in their order. Where there are more now, all
saved ones go on, and the others start as copies of the one with the lowest score. Keys are those of a worker's position
now. An epoch goes on with the examples that are left of it, in new shards, as `lsgd_jax.data.BatchIndices` tells. The
groups are formed anew, so that what workers knew of their leaders is left behind: until the next exchange nothing pulls
them, and an int8 wire starts with whole parameters.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.data import Stretch
from lsgd_jax.distributed import Placement, failing_together
from lsgd_jax.errors import AgreedError, UsageError
from lsgd_jax.tracking.run_folder import RunFolder, read_config
from lsgd_jax.train.checkpoint import Checkpoints, Progress
from lsgd_jax.train.step import TrainState


def resumed(
    checkpoints: Checkpoints,
    folder: RunFolder,
    config: Config,
    placement: Placement,
    start: Callable[[], TrainState],
    shapes: TrainState,
    params: Any,
    tell: Callable[[str], None],
) -> tuple[TrainState, Progress] | None:
    """What the last checkpoint that can be read holds; None where there is none yet.

    Newer ones that can't be read are moved out of the way, and the metrics file is cut to what it was. Where there is
    none, metrics that a killed run has logged are kept beside.

    Args:
      checkpoints: of the run.
      folder: of the run.
      config: of the run, as it goes on.
      placement: of the workers that there are now.
      start: makes their state at the start.
      shapes: of that state, with its shardings.
      params: one worker's, or their shapes and dtypes.
      tell: prints a sentence.

    Raises:
      UsageError: if no checkpoint can be read, or the run has taken more steps than it is to take.
    """
    if changed := folder.changed_settings():
        tell(f"the run started with other settings, so that its results may differ: {changed}")
    workers = math.prod(placement.shape)
    with failing_together():
        before = read_config(folder.path)
    problems: dict[int, UsageError] = {}
    for step in checkpoints.steps():
        try:
            with failing_together():
                progress = checkpoints.progress(step)
                folder.check_length(progress.metrics_length)
                sources = _sources(progress, workers)
                if progress.shape == placement.shape:
                    state = checkpoints.restore(step, shapes)
                else:
                    state = checkpoints.restore_resized(step, start(), sources)
            break
        except UsageError as problem:
            problems[step] = problem
    else:
        if problems:
            newest = max(problems)
            raise AgreedError(
                f"none of the checkpoints in {folder.path} can be read, that of step {newest} since {problems[newest]}."
            )
        with failing_together():
            beside = folder.start_anew()
        moved = f", and its metrics of before are in {beside.name} now" if beside else ""
        tell(f"there is no checkpoint in {folder.path} yet: the run starts{moved}")
        return None
    if step > config.steps:
        raise AgreedError(f"steps must be at least the {step} that the run has taken, got {config.steps}.")
    for unreadable, problem in problems.items():
        with failing_together():
            aside = checkpoints.set_aside(unreadable)
        tell(f"the checkpoint of step {unreadable} can't be read, since {problem}: it is {aside} now")
    with failing_together():
        folder.go_on(progress.metrics_length)
    tell(f"the run goes on from step {step}")
    if config.learning_rate_drops and config.learning_rate_drops_in == "seconds":
        tell(f"learning rates drop by the clock, which goes on from {progress.seconds:.1f} seconds")

    now = Progress.at_start(placement)
    if (progress.shape, progress.processes, progress.devices) == (now.shape, now.processes, now.devices):
        return state, progress
    if progress.shape != now.shape:
        before = before.replace(groups=progress.shape[0], workers=progress.shape[1])
        sent, sent_now = (bytes_sent(of, params, step) for of in (before, config))
        tell(_resizing(progress, now.shape, sources))
        progress = _resized(progress, now.shape, sources)
        progress.bytes_before += sent - sent_now
        steps = step - sum(stretch.steps for stretch in progress.earlier)
        progress.earlier.append(Stretch(steps, before.groups * before.workers, before.worker_batch_size))
    folder.log(
        "resume",
        step=step,
        workers_from=np.reshape(sources, now.shape),
        processes=now.processes,
        devices=now.devices,
    )
    tell(f"on {now.devices} devices of {now.processes} processes, before on {progress.devices} of {progress.processes}")
    return state, dataclasses.replace(progress, processes=now.processes, devices=now.devices)


def _sources(progress: Progress, workers: int) -> list[int]:
    """For so many workers, the position of the saved worker that each goes on from.

    Raises:
      UsageError: if there is none.
    """
    saved = progress.shape[0] * progress.shape[1]
    if not saved:
        raise UsageError("it has no workers")
    best_first = np.argsort(np.nan_to_num(np.ravel(progress.scores), nan=np.inf), kind="stable").tolist()
    if workers <= saved:
        return sorted(best_first[:workers])
    return [*range(saved), *[best_first[0]] * (workers - saved)]


def _resized(progress: Progress, shape: tuple[int, int], sources: list[int]) -> Progress:
    """The progress of the workers that go on."""

    def of_sources(values: Any) -> np.ndarray:
        return np.ravel(values)[sources].reshape(shape)

    since = progress.failed_since
    return dataclasses.replace(
        progress,
        shape=shape,
        losses=[of_sources(loss) for loss in progress.losses],
        scores=of_sources(progress.scores).tolist(),
        failed_since={str(i): since[str(source)] for i, source in enumerate(sources) if str(source) in since},
    )


def _resizing(progress: Progress, shape: tuple[int, int], sources: list[int]) -> str:
    """What became of the workers, in a sentence."""
    saved = progress.shape[0] * progress.shape[1]
    sizes = f"{shape[0]} x {shape[1]} workers in place of {progress.shape[0]} x {progress.shape[1]}"
    if len(sources) > saved:
        return f"{sizes}: those from {saved} on start as copies of worker {sources[-1]}, which had the lowest score"
    if len(sources) < saved:
        return f"{sizes}: those with the lowest scores go on, formerly {', '.join(map(str, sources))}"
    return f"{sizes}: all go on, in other groups"
