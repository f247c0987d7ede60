"""Resuming from a run's last checkpoint, also with other workers, processes or devices than it was saved with.

With fewer workers than were saved, those with the lowest scores resume, in their order. With more, all saved workers
resume, and the others start as copies of the one with the lowest score. Each worker's random keys follow from its new
global index. The current epoch continues with the examples that are left of it, in new shards, as
`lsgd_jax.data.BatchIndices` describes. Groups are formed anew, so that what workers knew of their leaders is dropped:
nothing pulls them before the next exchange, an int8 wire starts with whole parameters, and the center of a quorum with
the mean of the workers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.data import Stretch
from lsgd_jax.distributed import failing_together
from lsgd_jax.errors import AgreedError, UsageError
from lsgd_jax.tracking.run_folder import RunFolder, read_config
from lsgd_jax.train.checkpoint import Checkpoints
from lsgd_jax.train.progress import Progress
from lsgd_jax.train.setup import Prepared
from lsgd_jax.train.step import TrainState, init_state, state_shapes


def resumed(
    config: Config, prepared: Prepared, folder: RunFolder, checkpoints: Checkpoints, message: Callable[[str], None]
) -> tuple[TrainState, Progress] | None:
    """The state and progress in the last checkpoint that can be read; None where there is no checkpoint yet.

    Newer checkpoints that can't be read are moved aside, and the metrics file is cut to its length at the checkpoint.
    Where there is no checkpoint, the metrics that a killed run has logged are kept in a file of their own.

    Args:
      config: with which the run resumes.
      prepared: for this configuration.
      folder: of the run.
      checkpoints: of the run.
      message: prints a sentence.

    Raises:
      UsageError: if no checkpoint can be read, another version of lsgd_jax has written one, or the run has taken more
        steps than configured.
    """
    placement, _, model, optimizer = prepared
    if changed := folder.changed_settings():
        message(f"the run started with other settings, so that its results may differ: {changed}")
    workers = math.prod(placement.shape)
    with failing_together():
        before = read_config(folder.path)
        checkpoints.check_formats()
    problems: dict[int, UsageError] = {}
    for step in checkpoints.steps():
        try:
            with failing_together():
                progress = checkpoints.progress(step)
                folder.check_length(progress.metrics_length)
                sources = _sources(progress, workers)
                if progress.shape == placement.shape:
                    state = checkpoints.restore(step, state_shapes(model, optimizer, placement))
                else:
                    fresh = init_state(model, optimizer, placement)
                    state = checkpoints.restore_resized(step, fresh, sources, optimizer.init)
            break
        except UsageError as problem:
            problems[step] = problem
    else:
        if problems:
            newest = max(problems)
            raise AgreedError(
                f"none of the checkpoints in {folder.path} can be read; the one of step {newest}: {problems[newest]}."
            )
        with failing_together():
            beside = folder.start_anew()
        moved = f", and its earlier metrics are in {beside.name} now" if beside else ""
        message(f"there is no checkpoint in {folder.path} yet: the run starts{moved}")
        return None
    if step > config.steps:
        raise AgreedError(f"steps must be at least the {step} that the run has taken, got {config.steps}.")
    for unreadable, problem in problems.items():
        with failing_together():
            aside = checkpoints.set_aside(unreadable)
        message(f"the checkpoint of step {unreadable} can't be read, since {problem}: it is {aside} now")
    with failing_together():
        folder.resume(progress.metrics_length)
    message(f"the run resumes from step {step}")
    if config.learning_rate_drops and config.learning_rate_drops_in == "seconds":
        message(f"learning rates drop by the clock, which continues from {progress.seconds:.1f} seconds")

    now = Progress.at_start(placement)
    machine, machine_now = ((of.processes, of.devices, of.chips) for of in (progress, now))
    if (progress.shape, machine) == (now.shape, machine_now):
        return state, progress
    if (progress.shape, progress.chips) != (now.shape, now.chips):
        groups, workers = progress.shape
        before = before.replace(groups=groups, workers=workers, chips_per_worker=progress.chips)
        params = nnx.state(model, nnx.Param)
        sent, sent_now = (bytes_sent(of, params, step) for of in (before, config))
        progress.bytes_before += sent - sent_now
    if progress.shape != now.shape:
        message(_resizing(progress, now.shape, sources))
        progress = _resized(progress, now.shape, sources)
        steps = step - sum(stretch.steps for stretch in progress.earlier)
        progress.earlier.append(Stretch(steps, before.groups * before.workers, before.worker_batch_size))
    folder.log(
        "resume",
        step=step,
        workers_from=np.reshape(sources, now.shape),
        processes=now.processes,
        devices=now.devices,
    )
    message(
        f"on {now.devices} devices of {now.processes} processes, before on {progress.devices} of {progress.processes}"
    )
    if progress.chips != now.chips:
        message(f"chips of each worker: {now.chips}, before {progress.chips}")
    return state, dataclasses.replace(progress, processes=now.processes, devices=now.devices, chips=now.chips)


def _sources(progress: Progress, workers: int) -> list[int]:
    """For each of this many workers, the global index of the saved worker that it resumes from.

    Raises:
      UsageError: if no worker was saved.
    """
    saved = progress.shape[0] * progress.shape[1]
    if not saved:
        raise UsageError("it has no workers")
    best_first = np.argsort(np.nan_to_num(np.ravel(progress.scores), nan=np.inf), kind="stable").tolist()
    if workers <= saved:
        return sorted(best_first[:workers])
    return [*range(saved), *[best_first[0]] * (workers - saved)]


def _resized(progress: Progress, shape: tuple[int, int], sources: list[int]) -> Progress:
    """The progress of the workers that resume from these sources."""

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
    """What becomes of the saved workers, in a sentence."""
    saved = progress.shape[0] * progress.shape[1]
    sizes = f"{shape[0]} x {shape[1]} workers in place of {progress.shape[0]} x {progress.shape[1]}"
    if len(sources) > saved:
        return f"{sizes}: those from {saved} on start as copies of worker {sources[-1]}, which had the lowest score"
    if len(sources) < saved:
        return f"{sizes}: those with the lowest scores resume, formerly {', '.join(map(str, sources))}"
    return f"{sizes}: all resume, in other groups"
